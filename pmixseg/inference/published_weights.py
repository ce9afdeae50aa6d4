"""Convert checkpoints of the published RFNet and mmFormer code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pmixseg.argument_checks import checked
from pmixseg.backbones import Backbone, MMFormer, RFNet
from pmixseg.data.cohorts.problems import listed
from pmixseg.data.scans.normalisation import JOINT_MASK
from pmixseg.errors import InputError, first_line
from pmixseg.losses.rfnet import RFNetCriterion
from pmixseg.modules import SegmentationModule, StudentModule
from pmixseg.modules.checkpoint import write_checkpoint
from pmixseg.modules.preparation import Preparation
from pmixseg.task import BRATS, Task

ORDER = ("flair", "t1ce", "t1", "t2")
"""Modalities of both codes, in the order of their channels."""

DIFFERENCE = (
    f"scans are prepared for this model as in the published code (normalisation '{JOINT_MASK}'). "
    "The published code takes the mask of the brain from all four scans; of a patient who has "
    "fewer, it comes from these, which the model has not seen in training."
)
"""What remains between an imported model and the published pipeline."""

_LAYER = (
    (r"cross_attention_list\.0\.fn\.norm\.", "norm_attention."),
    (r"cross_attention_list\.0\.fn\.fn\.", ""),
    (r"cross_ffn_list\.0\.fn\.norm\.", "norm_feed."),
    (r"cross_ffn_list\.0\.fn\.fn\.net\.0\.", "feed_in."),
    (r"cross_ffn_list\.0\.fn\.fn\.net\.3\.", "feed_out."),
)

_NAMES = "|".join(ORDER)

RULES: Mapping[str, Sequence[tuple[str, str]]] = {
    "rfnet": ((rf"({_NAMES})_encoder\.", "encoders.<>."),),
    "mmformer": (
        (rf"({_NAMES})_encoder\.", "encoders.<>.encoder."),
        (rf"({_NAMES})_encode_conv\.", "encoders.<>.encode_conv."),
        (rf"({_NAMES})_pos$", "encoders.<>.pos"),
        *(
            (rf"({_NAMES})_transformer\.{old}", f"encoders.<>.transformer.{new}")
            for old, new in _LAYER
        ),
        *(
            (rf"multimodal_transformer\.{old}", f"multimodal_transformer.{new}")
            for old, new in _LAYER
        ),
    ),
}
"""Beginning of a published name -> beginning of ours; ``<>`` is the modality's channel."""

UNUSED: Mapping[str, str] = {"mmformer": rf"({_NAMES})_decode_conv\."}
"""Parts that are in the published checkpoints, but that the published network never runs."""


@dataclass(frozen=True)
class Imported:
    """A published model in this package.

    Args:
        module: ready for inference, or to train on.
        tensors: how many were taken over.
        dropped: names of parts that the network has no use for.
        epoch: of the published training, if the file says.
    """

    module: SegmentationModule
    tensors: int
    dropped: tuple[str, ...]
    epoch: int | None

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint that :func:`pmixseg.load`, ``test`` and ``segment`` read."""
        checkpoint = {
            "pytorch-lightning_version": version("lightning"),  # Lightning asks for these three
            "epoch": 0,
            "global_step": 0,
            "state_dict": self.module.state_dict(),
            "pmixseg": self.module.payload().to_dict(),
        }
        return write_checkpoint(checkpoint, path)


@checked
def import_official(
    kind: Literal["rfnet", "mmformer"], path: str | Path, task: Task = BRATS
) -> Imported:
    """Read a checkpoint of the published code.

    Width, classes and patch are read off the tensors. Nothing but tensors is unpickled.

    Args:
        kind: ``rfnet`` (github.com/dyh127/RFNet) or ``mmformer`` (github.com/YaoZhang93/mmFormer).
        path: a ``.pth`` file, ``{epoch, state_dict, optim_dict}`` or a bare state dict; names may
            begin with ``module.``.
        task: a task with these four modalities and as many labels as the checkpoint has.

    Raises:
        InputError: no such file, not a checkpoint of this network, tensors that are missing, too
            many, or of other shapes, or a task that does not fit.
    """
    path = Path(path)
    state, epoch = _read(path)
    tensors = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    dropped = tuple(n for n in tensors if kind in UNUSED and re.match(UNUSED[kind], n))
    renamed = {_ours(n, RULES[kind]): t for n, t in tensors.items() if n not in dropped}
    backbone, patch = _network(kind, renamed, path, task)
    _check(backbone, renamed, kind, path)
    module = StudentModule(task=task, backbone=backbone, fill="zero", criterion=RFNetCriterion())
    module.backbone.load_state_dict(renamed)
    module.preparation = Preparation(
        spacing=(1.0, 1.0, 1.0), normalisation=JOINT_MASK, dtype="float32", patch=(patch,) * 3
    )
    return Imported(module.eval(), len(renamed), dropped, epoch)


def _read(path: Path) -> tuple[dict[str, Tensor], int | None]:
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}; give the .pth file of the published code.")
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way, KeyError included
        reason = first_line(error).split(". ")[0]
        raise InputError(
            f"{path} cannot be read as a file of tensors ({reason}); it is damaged or empty, or "
            "holds more than tensors and is not opened for safety."
        ) from error
    state = raw.get("state_dict", raw) if isinstance(raw, dict) else None
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(t, Tensor) for t in state.values())
    ):
        raise InputError(f"{path} holds no state dict; give a checkpoint of the published code.")
    epoch = raw.get("epoch")
    return state, epoch if isinstance(epoch, int) else None


def _ours(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for old, new in rules:
        match = re.match(old, name)
        if match:
            channel = ORDER.index(match[1]) if "<>" in new else 0
            return new.replace("<>", str(channel)) + name[match.end() :]
    return name


def _network(
    kind: str, state: Mapping[str, Tensor], path: Path, task: Task
) -> tuple[Backbone, int]:
    """Return the network that the tensors' shapes describe, and its patch size."""
    head = state.get("decoder_fuse.seg_layer.weight")
    if head is None or head.ndim != 5:
        raise InputError(f"{path} is no {kind} checkpoint (no decoder_fuse.seg_layer).")
    classes, width = head.shape[:2]
    if set(task.modalities) != set(ORDER) or task.num_classes != classes:
        raise InputError(
            f"{path} segments {classes} classes from {', '.join(ORDER)}, but task '{task.name}' "
            f"has {task.num_classes} and {', '.join(task.modalities)}; give a task that fits."
        )
    if task.modalities != ORDER:
        raise InputError(
            f"task '{task.name}' has the modalities in the order {', '.join(task.modalities)}, the "
            f"checkpoint in the order {', '.join(ORDER)}; use that order in the task."
        )
    # Sizes that the weights tell.
    if kind == "rfnet":
        return RFNet(ORDER, classes, width=width), 80
    position, hidden = state.get("encoders.0.pos"), state.get("multimodal_transformer.feed_in.bias")
    if position is None or hidden is None or position.ndim != 3:
        raise InputError(f"{path} is no mmformer checkpoint (no positions or transformer).")
    patch = 16 * round(position.shape[1] ** (1 / 3))
    network = MMFormer(
        ORDER,
        classes,
        width=width,
        patch_size=patch,
        embedding=position.shape[2],
        hidden=len(hidden),
        official=True,
    )
    return network, patch


def _check(backbone: Backbone, state: Mapping[str, Tensor], kind: str, path: Path) -> None:
    expected: dict[str, Any] = backbone.state_dict()
    problems = {
        "are missing": [n for n in expected if n not in state],
        "are unknown": [n for n in state if n not in expected],
        "have other shapes": [
            n for n in expected if n in state and state[n].shape != expected[n].shape
        ],
    }
    faults = [
        f"{len(names)} tensors {what} ({listed(names)})"
        for what, names in problems.items()
        if names
    ]
    if faults:
        raise InputError(
            f"{path} does not fit the published {kind}: {'; '.join(faults)}. Is it of another "
            "network, or of changed code?"
        )
