"""Take model and data settings from a checkpoint, and tell where the command line differs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pmixseg.cli.arguments import option
from pmixseg.data.parts import PARTS
from pmixseg.data.training_cases import TrainingCases
from pmixseg.describe import describe
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.modules.checkpoint import describing, read_checkpoint
from pmixseg.modules.payload import Payload
from pmixseg.modules.trust import resolve


def with_checkpoint_defaults(args: Sequence[str], modules: Sequence[str] = ()) -> list[str]:
    """Put a checkpoint's model and data settings in front of the flags, so that flags win.

    ``test --ckpt_path x.ckpt`` then needs nothing else: store, split, patch and window are those
    of the training.
    """
    words = list(args)
    if not words or words[0] not in ("validate", "test", "predict"):
        return words
    path = option(words, "--ckpt_path")
    if path is None:
        return words
    raw = read_checkpoint(path)["pmixseg"]
    payload = Payload.from_dict(raw, path)
    trained = payload.preparation
    data: dict[str, Any] = {"task": payload.task.to_dict()}
    if trained.spacing is not None:
        data["spacing"] = list(trained.spacing)
    if trained.patch is not None:
        data["patch_size"] = list(trained.patch)
    if trained.cases is not None:
        data |= data_of(trained.cases, words, path)
    config = {"model": resolve(describing(raw), modules, path), "data": data}
    return [words[0], f"--config={json.dumps(config)}", *words[1:]]


def data_of(cases: TrainingCases, args: Sequence[str], path: str) -> dict[str, Any]:
    """Return a training's store and split, as far as the command line does not name its own."""
    data: dict[str, Any] = {}
    files = ("-c", "--config", "--data=", "--data.root", "--data.store")
    if cases.store and not any(a.startswith(files) for a in args):
        if not Path(cases.store).is_dir():
            raise InputError(
                f"{path} was trained on the store {cases.store}, which is not there; say where it "
                "is with --data.store."
            )
        data["store"] = cases.store
    if (cases.train or cases.test) and not any(a.startswith("--data.split") for a in args):
        lists = {part: list(getattr(cases, part)) for part in (*PARTS, "lacking")}
        arguments = {**lists, "source": path}
        data["split"] = {"class_path": "pmixseg.data.SplitLists", "init_args": arguments}
    return data


def with_evaluation(description: dict[str, Any]) -> dict[str, Any]:
    """Return class and arguments of a described module, with every evaluation setting."""
    arguments = description["init_args"]
    settings = EvaluationSettings.of(arguments.get("evaluation"))
    kind = description["class_path"].rpartition(".")[2]
    return {"class": kind, **arguments, "evaluation": describe(settings)}
