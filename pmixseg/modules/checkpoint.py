"""Load a checkpoint: one function for testing, segmentation, distillation and Python."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch

from pmixseg.argument_checks import checked
from pmixseg.describe import build, describe, find_class
from pmixseg.errors import InputError, first_line, memory_error
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.evaluation.records.sidecar import checkpoint_identity
from pmixseg.evaluation.scores.calibration import Temperatures
from pmixseg.files import whole
from pmixseg.modules.base import SegmentationModule
from pmixseg.modules.payload import Payload, weights_of
from pmixseg.modules.trust import offline, resolve
from pmixseg.task import Task
from pmixseg.weights import local_copy, read_published
from pmixseg.weights.published import WEIGHTS


@checked
def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file without running any code from it.

    Args:
        path: a file, a folder that ``pmixseg publish`` wrote, or any name or address that
            :func:`pmixseg.weights.local_copy` takes.

    Raises:
        InputError: no such file, not a checkpoint, not one of pmixseg, or of a newer format.
    """
    path = local_copy(path)
    if (path / "checkpoints").is_dir():
        raise InputError(f"{path} is the folder of a run; give {path}/checkpoints/best.ckpt.")
    if path.is_dir():
        return _checked(read_published(path), path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist; give the path of a .ckpt file.")
    try:
        with ZipFile(path) as archive:
            damaged = archive.testzip()  # against the checksums that it holds; PyTorch does not
        if damaged is not None:
            raise InputError(
                f"{path} is damaged: the checksum of its part {damaged} does not hold; copy it "
                "again."
            )
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as fault:  # a damaged pickle can fail in any way, KeyError included
        if named := re.search(r"Unsupported global: GLOBAL (\S+)", str(fault)):
            raise InputError(
                f"{path} holds an object of {named[1]}, and making one could run code, so it is "
                "not read; let whoever puts it there (a callback's state_dict, "
                "save_hyperparameters) give plain numbers and texts."
            ) from fault
        reason = first_line(fault).split(". ")[0]
        raise InputError(
            f"{path} cannot be read as a checkpoint ({reason}); it is damaged or another kind of "
            "file."
        ) from fault
    return _checked(checkpoint, path)


def _checked(checkpoint: Any, path: Path) -> dict[str, Any]:
    content = checkpoint if isinstance(checkpoint, dict) else {}
    Payload.from_dict(content.get("pmixseg"), str(path))
    weights_of(content, str(path))
    return content


@checked
def load(
    path: str | Path,
    *,
    modules: Sequence[str] = (),
    map_location: str | torch.device = "cpu",
    **arguments: Any,
) -> SegmentationModule:
    """Rebuild the module that a checkpoint holds, in eval mode.

    The file is always read with ``weights_only=True``. Terms of callbacks are not needed and not
    restored: the module alone reproduces its predictions. ``StudentModule.load_from_checkpoint``
    and its kin do the same.

    Args:
        path: a ``.ckpt`` file, or what :func:`read_checkpoint` takes besides it: a published
            folder, a name, ``hf://owner/repository``, an https address.
        modules: Python modules to import and trust, for classes outside pmixseg, MONAI and
            PyTorch (the command line's ``--import``); those of ``__main__`` need none.
        map_location: device of the weights.
        arguments: of the module, in place of those that the checkpoint holds.

    Returns:
        An instance of the class that was saved.

    Raises:
        InputError: see :func:`read_checkpoint`; or a class that must be named with ``modules``.
    """
    if str(map_location).partition(":")[0] == "meta":
        raise InputError(
            "map_location is meta, which holds no weights; name a device that does, such as cpu."
        )
    for name in modules:
        try:
            importlib.import_module(name)
        except (ImportError, TypeError, ValueError) as error:  # '.x' and '' are no names
            raise InputError(f"module '{name}' cannot be imported ({error}).") from error
    path = local_copy(path)
    checkpoint = read_checkpoint(path)
    payload = checkpoint["pmixseg"]
    description = resolve(describing(payload), modules, str(path))
    cls = find_class(description["class_path"])
    if not issubclass(cls, SegmentationModule):
        raise InputError(f"{path} holds a {cls.__name__}, which is no SegmentationModule.")
    description["init_args"] = {**description.get("init_args", {}), **arguments}
    # Classes that a person named may fetch what they are made of.
    try:
        with nullcontext() if modules else offline(str(path)):
            module: SegmentationModule = build(description, task=Task.from_dict(payload["task"]))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as fault:
        if modules or isinstance(fault, InputError):
            raise
        raise InputError(
            f"{path} describes a model that cannot be made ({fault}); it is damaged."
        ) from fault
    restore(module, checkpoint)
    file = path / WEIGHTS if path.is_dir() else path
    module.loaded_from, module.identity = str(file), checkpoint_identity(file)
    try:
        return module.to(map_location).eval()
    except (RuntimeError, AssertionError, TypeError) as fault:
        if (lack := memory_error(fault)) is not None:
            raise lack from fault
        raise InputError(
            f"map_location is '{map_location}', and the weights cannot be brought there "
            f"({first_line(fault).rstrip('.')}); name a device that there is, such as cpu or "
            "cuda:0."
        ) from fault


def describing(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a checkpoint's ``pmixseg`` entry that describes the module."""
    return {key: payload.get(key) for key in ("class_path", "init_args")}


@checked
def write_temperatures(source: str | Path, temperatures: Temperatures, out: str | Path) -> Path:
    """Write a checkpoint that equals another but for the temperatures of its probabilities.

    ``out`` may be ``source``: it is written as a whole or not at all.
    """
    checkpoint = read_checkpoint(source)
    arguments = checkpoint["pmixseg"]["init_args"]
    evaluation = EvaluationSettings.of(arguments.get("evaluation"))
    arguments["evaluation"] = describe(replace(evaluation, temperatures=temperatures.by_size))
    return write_checkpoint(checkpoint, out)


def write_checkpoint(checkpoint: dict[str, Any], out: str | Path) -> Path:
    """Write a checkpoint, complete or not at all."""
    out = Path(out)
    with whole(out) as part, part.open("wb") as file:
        torch.save(checkpoint, file)
    return out


def restore(module: SegmentationModule, checkpoint: Mapping[str, Any]) -> None:
    """Copy the weights of a checkpoint into a module, terms left out."""
    module.load_state_dict(module.take_over(checkpoint, fitting=False))
    module.preparation = Payload.from_dict(checkpoint["pmixseg"]).preparation
