"""Trained models for other programs, for a fixed combination: torch.export, ONNX, MONAI bundle.

What is exported maps one window of normalised scans to class probabilities. The caller brings
scans to RAS and to the model's spacing, z-scores each inside its own non-zero voxels, leaves the
background 0, and slides the window; a MONAI bundle holds a configuration that does all of it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from pmixseg.argument_checks import checked
from pmixseg.data.scans.normalisation import JOINT_MASK
from pmixseg.errors import InputError, explained, writing
from pmixseg.evaluation.prediction.segmentation import NOTICE
from pmixseg.files import not_among, whole
from pmixseg.inference.bundle import write_bundle
from pmixseg.inference.tracing import FixedCombination
from pmixseg.modules import SegmentationModule
from pmixseg.task import format_combination, parse_combination
from pmixseg.version import __version__

ALLOWED_DIFFERENCE = 1e-4
"""Largest difference in probability between the model and what was exported."""

FACTS = "pmixseg.json"
"""Name under which an exported file holds what it is."""


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Args:
        path: file, or folder of a bundle.
        facts: what is written beside the weights; primitives.
        difference: largest difference in probability on another window of noise.
    """

    path: Path
    facts: dict[str, Any]
    difference: float


@checked
def export(
    module: SegmentationModule,
    path: str | Path,
    kind: Literal["torch", "onnx", "bundle"] = "torch",
    combination: str | tuple[str, ...] | None = None,
) -> Exported:
    """Write a model for one combination, and compare what was written with the model.

    Args:
        module: a loaded model.
        path: file to write (``.pt2``, ``.onnx``), or the folder of a bundle.
        kind: ``torch`` (``torch.export``), ``onnx`` (needs the extra ``export``) or ``bundle``
            (MONAI, weights as TorchScript).
        combination: modalities that will be given, in task order; by default all of the model's.

    Raises:
        InputError: an unknown format or combination, a package that is not installed, a file that
            cannot be written, or a bundle of a model whose normalisation MONAI cannot express.
        RuntimeError: the exported model answers otherwise than the model.
    """
    ready = module.preparation
    if kind == "bundle" and ready.normalisation == JOINT_MASK:
        raise InputError(
            f"MONAI has no transform for the normalisation '{JOINT_MASK}' of this model, so a "
            "bundle would prepare scans wrongly; export it as torch or onnx, and prepare scans "
            "as the published code does."
        )
    shown = parse_combination(combination or module.modalities, module.modalities)
    window = ready.window(module.evaluation, module.strides)
    path = Path(path)
    if module.loaded_from is not None:
        not_among(path, [Path(module.loaded_from)])
    facts = describe_export(module, shown, window)
    network = FixedCombination(module.cpu(), shown)
    noise = torch.randn(2, 1, len(shown), *window, generator=torch.Generator().manual_seed(0))
    with writing(path), torch.no_grad(), _quiet():
        # A graph of plain operators: backbones may run Python that other formats cannot hold.
        program = torch.export.export(network, (noise[0],), strict=False)
        again = WRITERS[kind](program, noise[0], path, facts)
        difference = float((again(noise[1]) - network(noise[1])).abs().max())
    if not difference <= ALLOWED_DIFFERENCE:
        raise RuntimeError(
            f"the exported model differs from the model by {difference:.2g} in probability: the "
            "backbone does something that depends on the values it is traced with."
        )
    return Exported(path, facts, difference)


def describe_export(
    module: SegmentationModule, combination: tuple[str, ...], window: tuple[int, int, int]
) -> dict[str, Any]:
    """Say what a user of the exported model must know; primitives.

    ``temperature`` T, where one was fitted, is not in the graph: it belongs after the averaging of
    windows, as softmax(log p / T), where ``pmixseg segment`` applies it. Labels do not need it.
    """
    ready = module.preparation
    return {
        "notice": NOTICE,
        "task": module.task.to_dict(),
        "combination": format_combination(combination),
        "channels": list(combination),
        "classes": ["background", *module.task.labels],
        "window": list(window),
        "overlap": module.evaluation.overlap,
        "blend": module.evaluation.blend,
        "orientation": "RAS",
        "spacing": None if ready.spacing is None else list(ready.spacing),
        "normalisation": ready.normalisation,
        "temperature": module.evaluation.temperature(len(combination)),
        "checkpoint": None if module.identity is None else dict(module.identity),
        "versions": {"pmixseg": __version__, "torch": version("torch")},
    }


Again = Callable[[Tensor], Tensor]
"""The exported model, read back."""


def _write_torch(
    program: ExportedProgram, example: Tensor, path: Path, facts: dict[str, Any]
) -> Again:
    # PyTorch's own writer aborts the process where a disk is full; a file of Python's does not.
    packed = BytesIO()
    torch.export.save(program, packed, extra_files={FACTS: json.dumps(facts)})
    with whole(path) as part:
        part.write_bytes(packed.getbuffer())
    again: Again = torch.export.load(path).module()
    return again


def _write_onnx(
    program: ExportedProgram, example: Tensor, path: Path, facts: dict[str, Any]
) -> Again:
    with explained("ONNX needs an extra", "pip install 'pmixseg[export]'", ImportError):
        for package in ("onnx", "onnxscript"):
            importlib.import_module(package)
        onnxruntime = importlib.import_module("onnxruntime")
    made = torch.onnx.export(
        program,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["image"],
        output_names=["probabilities"],
    )
    assert made is not None  # it is only None where a file is named
    made.model.metadata_props.update({k: json.dumps(v) for k, v in facts.items()})
    with whole(path) as part:
        made.save(part, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def again(image: Tensor) -> Tensor:
        (answer,) = session.run(["probabilities"], {"image": image.numpy()})
        return torch.from_numpy(answer)

    return again


def _write_bundle(
    program: ExportedProgram, example: Tensor, path: Path, facts: dict[str, Any]
) -> Again:
    # A trace cannot hold the checks that newer versions of torch put into the module.
    unguarded = {"check_guards"} & set(inspect.signature(program.module).parameters)
    plain = program.module(**dict.fromkeys(unguarded, False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch discourages TorchScript; MONAI's bundles hold it
        traced = torch.jit.trace(plain, (example,), check_trace=False)  # type: ignore[no-untyped-call]  # torch ships no type
        return write_bundle(traced, path, facts)


WRITERS: dict[str, Callable[[ExportedProgram, Tensor, Path, dict[str, Any]], Again]] = {
    "torch": _write_torch,
    "onnx": _write_onnx,
    "bundle": _write_bundle,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what a user cannot act on: exporters warn of unneeded operators and their own age."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
