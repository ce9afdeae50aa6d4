"""Knowledge distillation from a frozen teacher as a callback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from pmixseg.callbacks.term import TermCallback
from pmixseg.describe import build
from pmixseg.errors import InputError
from pmixseg.losses.distillation import DistillationTerm, LatentMatch, LogitKL
from pmixseg.losses.term import Term
from pmixseg.modules.base import SegmentationModule
from pmixseg.modules.checkpoint import load
from pmixseg.types import Batch, Scalar, SegOutput


class Distillation(TermCallback):
    """``Σ_j λ_j L_distill,j`` between a student and a frozen teacher (docs/method/distillation.md).

    The teacher sees everything acquired of the same augmented patch, whatever the student was
    built for. It is in no checkpoint of the student, stays in eval mode and gets no gradient.

    Args:
        teacher: checkpoint of a trained module, or the module itself.
        weight: factor of all terms together; 0 switches distillation off.
        terms: name -> term, each with its own weight; by default :class:`LogitKL` as ``logit`` and
            :class:`LatentMatch` as ``latent``.
        start_epoch: first epoch with a weight above 0.
        warmup_epochs: epochs over which the weight rises linearly.
        name: key in log and checkpoint.
        modules: Python modules whose classes the teacher's checkpoint may name, see
            :func:`pmixseg.load`.

    Raises:
        InputError: in ``setup``: no teacher, a teacher of another task or spacing, or no term.
    """

    def __init__(
        self,
        teacher: str | None = None,
        weight: float = 0.0,
        terms: dict[str, DistillationTerm] | None = None,
        start_epoch: int = 0,
        warmup_epochs: int = 0,
        name: str = "distill",
        modules: Sequence[str] = (),
    ) -> None:
        super().__init__(name, weight, start_epoch, warmup_epochs)
        self.teacher, self.modules = teacher, list(modules)
        given: Mapping[str, Any] = (
            terms if terms is not None else {"logit": LogitKL(), "latent": LatentMatch()}
        )
        self.terms: dict[str, DistillationTerm] = {k: build(v) for k, v in given.items()}

    def build_term(self, module: SegmentationModule) -> Term:
        """See :class:`TermCallback`."""
        if not self.terms:
            raise InputError(f"{self.name}.terms is empty; name at least one term.")
        taught = [name for name, term in self.terms.items() if not term.self_taught]
        if taught and self.teacher is None:
            raise InputError(
                f"{self.name}.weight is {self.weight} and the terms {taught} need a teacher, but "
                f"{self.name}.teacher names no checkpoint."
            )
        self._check_subsets(module)
        teacher = self.load_teacher() if taught else None
        if teacher is not None and teacher.task.to_dict() != module.task.to_dict():
            raise InputError(
                f"the teacher {self.teacher} was trained for the task '{teacher.task.name}' "
                f"(modalities {list(teacher.task.modalities)}, labels {list(teacher.task.labels)}),"
                f" the student is for '{module.task.name}' ({list(module.task.modalities)}, "
                f"{list(module.task.labels)}); train a teacher for this task."
            )
        for term in self.terms.values():
            source = module if teacher is None or term.self_taught else teacher
            term.bind(
                module.backbone,
                source.backbone,
                anchor=source.anchor,
            )
        return DistillationLoss(teacher, self.terms, student=module)

    def _check_subsets(self, module: SegmentationModule) -> None:
        """Refuse terms that compare the student with its own, unchanged output."""
        if module.draws and module.shows_subsets:
            return
        alone = len(module.backbone.slots) == 1
        empty = [
            name for name, t in self.terms.items() if t.self_taught and (t.needs_subsets or alone)
        ]
        if empty:
            raise InputError(
                f"{self.name}.terms: {empty} compare a network with itself on fewer sequences, but "
                f"this {type(module).__name__} hides none in training, so that they or a part of "
                "them are 0; use a StudentModule of several sequences that draws subsets (no "
                "combination, or a sampler), or leave the terms out."
            )

    def load_teacher(self) -> SegmentationModule:
        """The teacher, frozen and in eval mode."""
        teacher = self.teacher
        if isinstance(teacher, str | Path):
            module = load(teacher, modules=self.modules)
        else:
            module = cast(Any, teacher)
        return module.eval().requires_grad_(False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See :class:`TermCallback`; also compare the teacher's spacing with the data's."""
        super().setup(trainer, pl_module, stage)
        data = getattr(trainer, "datamodule", None)
        if stage != "fit" or self.weight == 0 or data is None:
            return
        assert isinstance(pl_module, SegmentationModule)
        teacher = cast(DistillationLoss, pl_module.terms[self.name]).teacher
        if teacher is None:
            return
        trained = teacher.preparation.spacing
        given = None if data.spacing is None else tuple(float(s) for s in data.spacing)
        if trained != given:
            raise InputError(
                f"the teacher {self.teacher} was trained at the spacing {trained} mm, the data are "
                f"at {given} mm; prepare a store at the teacher's spacing."
            )


class DistillationLoss(Term):
    """All distillation terms of one step, over one pass of each teacher.

    Args:
        teacher: frozen module; ``None`` where every term is taught by the student itself.
        terms: name -> bound term.
        student: the module in training; it teaches the terms that say ``self_taught``, without
            gradient.
    """

    def __init__(
        self,
        teacher: SegmentationModule | None,
        terms: Mapping[str, DistillationTerm],
        student: SegmentationModule,
    ) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(dict(terms))
        # A tuple hides modules from nn.Module: out of checkpoint, optimizer, DDP and train().
        self._sources = (teacher, student)

    @property
    def teacher(self) -> SegmentationModule | None:
        """The frozen teacher."""
        return self._sources[0]

    def forward(self, output: SegOutput, batch: Batch) -> Scalar:
        """See :class:`~pmixseg.losses.term.Term`."""
        lessons: dict[tuple[bool, str], SegOutput] = {}
        total: Tensor = output.logits.new_zeros((), dtype=torch.float32)
        for name, module in self.terms.items():
            term = cast(DistillationTerm, module)
            kind = (term.self_taught, term.lesson)
            if kind not in lessons:
                source = cast(SegmentationModule, self._sources[1 if term.self_taught else 0])
                lessons[kind] = _lesson(source, batch, drawn=term.lesson == "drawn")
            value = term(output, lessons[kind], batch)
            self.parts[name] = value.detach()
            total = total + term.weight * value
        return total


SECOND_DRAW = 0x5DEECE66D
"""Turns a sample's key into that of a second draw."""


@torch.no_grad()
def _lesson(teacher: SegmentationModule, batch: Batch, *, drawn: bool) -> SegOutput:
    """What a module makes of everything acquired, or of a combination drawn apart, as at test.

    Auxiliary decoders do not run, and nothing in it is random: no term reads the one or wants the
    other.
    """
    batch = batch.get("of_task", batch)
    image = batch["image"]
    if teacher.device != image.device:
        teacher.to(image.device)
    seen = batch["acquired"]
    if drawn:
        seen = teacher.draw_present(cast(Batch, {**batch, "key": batch["key"] ^ SECOND_DRAW}))
    seen = teacher.columns(seen)
    training = [part for part in teacher.backbone.modules() if part.training]
    try:
        teacher.backbone.eval()
        return teacher.decode(teacher.encode(teacher.columns(image), seen))
    finally:
        for part in training:
            part.training = True
