"""Knowledge distillation from a frozen teacher as a callback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from pmixseg.borrowed import Borrowed, evaluating
from pmixseg.callbacks.term import TermCallback
from pmixseg.describe import build
from pmixseg.errors import InputError
from pmixseg.losses.distillation import DistillationLoss, LatentMatch, LogitKL, case_numbers
from pmixseg.losses.term import Term
from pmixseg.modules.base import SegmentationModule
from pmixseg.modules.checkpoint import load, read_checkpoint
from pmixseg.types import Batch, Scalar, SegOutput

SECOND_DRAW = 0x5DEECE66D
"""Turns a sample's key into that of a second draw."""


class Distillation(TermCallback):
    """Teach a student what a frozen teacher knows, by a weighted sum of losses.

    The loss is ``Σ_j λ_j L_distill,j`` (docs/method/distillation.md).
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
        terms: dict[str, DistillationLoss] | None = None,
        start_epoch: int = 0,
        warmup_epochs: int = 0,
        name: str = "distill",
        modules: Sequence[str] = (),
    ) -> None:
        super().__init__(name, weight, start_epoch, warmup_epochs)
        self.teacher, self.modules = teacher, list(modules)
        chosen: Mapping[str, Any] = (
            terms if terms is not None else {"logit": LogitKL(), "latent": LatentMatch()}
        )
        if not isinstance(chosen, Mapping):
            raise InputError(
                f"{name}.terms is {chosen}; give a loss for each name, as in "
                '{"logit": LogitKL()}.'
            )
        self.terms: dict[str, DistillationLoss] = {k: build(v) for k, v in chosen.items()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the term when a training starts, or see that a teacher of weight 0 exists.

        Raises:
            InputError: as every callback of a term, or the teacher's checkpoint cannot be read.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self.active and isinstance(self.teacher, str | Path):
            read_checkpoint(self.teacher)  # a wrong name is one at any weight of a sweep

    def build_term(self, module: SegmentationModule) -> Term:
        """Build the distillation term for a module and its teacher."""
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
        if teacher is not None:
            if {id(p) for p in teacher.parameters()} & {id(p) for p in module.parameters()}:
                raise InputError(
                    f"{self.name}.teacher has weights in common with its student, which would be "
                    "frozen; give a copy of it (copy.deepcopy), or its checkpoint."
                )
            teacher.eval().requires_grad_(False)
        # Each term is told which two networks it compares.
        for term in self.terms.values():
            source = module if teacher is None or term.self_taught else teacher
            term.bind(module.backbone, source.backbone, anchor=source.anchor)
        return DistillationTerm(teacher, self.terms, student=module)

    def _check_subsets(self, module: SegmentationModule) -> None:
        """Refuse terms that compare the student with its own, unchanged output."""
        alone = len(module.backbone.slots) == 1
        if module.draws and module.shows_subsets and not alone:
            return
        empty = [
            name
            for name, loss in self.terms.items()
            if loss.self_taught and (loss.needs_subsets or alone)
        ]
        if empty:
            raise InputError(
                f"{self.name}.terms: {empty} compare a network with itself on fewer sequences, but "
                f"this {type(module).__name__} hides none in training, so that they or a part of "
                "them are 0; use a StudentModule of several sequences that draws subsets (no "
                "combination, or a sampler), or leave the terms out."
            )

    def load_teacher(self) -> SegmentationModule:
        """Load the teacher, or return the module that it is."""
        teacher: Any = self.teacher
        module = load(teacher, modules=self.modules) if isinstance(teacher, str | Path) else teacher
        if not isinstance(module, SegmentationModule):
            raise InputError(f"{self.name}.teacher is {teacher!r}; name a checkpoint, or load it.")
        return module

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the teacher's data with the student's, and move it, as nobody else does.

        Raises:
            InputError: the teacher was trained at another spacing or normalisation.
        """
        term = self._term(pl_module)
        if term is not None and term.teacher is not None:
            student = cast(SegmentationModule, pl_module)
            term.teacher.preparation.refuse_other(student.preparation, "the teacher")
            student.preparation = student.preparation.building_on(term.teacher.preparation)
            term.teacher.to(pl_module.device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell losses with a ramp of their own which epoch it is."""
        term = self._term(pl_module)
        if term is not None:
            term.begin_epoch(trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Number the cases, where a loss tells them apart: names cannot enter a compiled step."""
        term = self._term(pl_module)
        named = "case_id" in batch  # the step says what a batch lacks
        if named and term is not None and any(t.compares_cases for t in self.terms.values()):
            numbers, device = case_numbers(batch["case_id"]), batch["label"].device
            batch["case"] = numbers.to(device, non_blocking=True)

    def _term(self, module: LightningModule) -> DistillationTerm | None:
        """Return this callback's term in the module in training; ``None`` where its weight is 0."""
        if self.weight == 0:
            return None
        return cast(DistillationTerm, cast(SegmentationModule, module).terms[self.name])


class DistillationTerm(Term):
    """Sum the distillation losses of one step, over one pass of each teacher.

    Without a frozen ``teacher`` every loss is taught by the student itself: the module in training
    teaches the losses that say ``self_taught``, without gradient, and decodes single modalities for
    those that compare them.
    """

    strengths: Tensor

    def __init__(
        self,
        teacher: SegmentationModule | None,
        terms: Mapping[str, DistillationLoss],
        student: SegmentationModule,
    ) -> None:
        super().__init__()
        self.terms = cast(Mapping[str, DistillationLoss], nn.ModuleDict(dict(terms)))
        self.needs_acquired = any(loss.student_sees == "single" for loss in terms.values())
        self._teacher, self._student = Borrowed(teacher), Borrowed(student)
        # A tensor, since a number that changes would have a compiled step compiled again.
        self.register_buffer("strengths", torch.ones(len(terms)), persistent=False)
        self.begin_epoch(0)

    @property
    def teacher(self) -> SegmentationModule | None:
        """The frozen teacher."""
        return self._teacher.value

    def begin_epoch(self, epoch: int) -> None:
        """Set the ramps of an epoch, counted from 0."""
        values = [loss.strength(epoch) for loss in self.terms.values()]
        self.strengths.copy_(torch.tensor(values))

    def prepare(self, batch: Batch) -> Batch:
        """Move the teacher to the batch, and draw a second time where a loss compares draws."""
        whole = batch.get("of_task", batch)
        if self.teacher is not None and self.teacher.device != whole["image"].device:
            self.teacher.to(whole["image"].device)
        if not any(loss.teacher_sees == "drawn" for loss in self.terms.values()):
            return batch
        key = whole["key"] ^ SECOND_DRAW
        drawn = self._student.value.draw_present(cast(Batch, {**whole, "key": key}))
        return cast(Batch, {**batch, "drawn": drawn})

    def forward(self, output: SegOutput, batch: Batch) -> Scalar:
        """Return the weighted sum of the losses between student and teacher."""
        targets: dict[tuple[bool, str, bool], SegOutput] = {}
        total: Tensor = output.logits.new_zeros((), dtype=torch.float32)
        for (name, loss), strength in zip(self.terms.items(), self.strengths, strict=True):
            kind = (loss.self_taught, loss.teacher_sees, loss.self_taught and loss.reads_extras)
            if kind not in targets:
                targets[kind] = self._teach(batch, *kind)
            outputs = self._student_outputs(output, batch, loss)
            value = torch.stack([loss(out, targets[kind], of) for out, of in outputs]).sum()
            self.parts[name] = value.detach()
            total = total + loss.weight * strength * value
        return total

    @torch.no_grad()
    def _teach(self, batch: Batch, own: bool, which: str, with_extras: bool) -> SegOutput:
        """Return what a teacher makes of everything acquired, or of a combination drawn apart.

        As at test: auxiliary decoders do not run, and nothing in it is random. With extras it is as
        in training, but for the auxiliary decoders of single modalities. ``own``: the student is
        the teacher.
        """
        teacher = self._student.value if own else self.teacher
        assert teacher is not None  # build_term() loads one if a loss needs it
        whole = batch.get("of_task", batch)
        image = teacher.columns(whole["image"])
        seen = teacher.columns(batch["drawn"] if which == "drawn" else whole["acquired"])
        if with_extras:
            return teacher.decode(teacher.encode(image, seen).slots_only())
        with evaluating(teacher.backbone):
            return teacher.decode(teacher.encode(image, seen))

    def _student_outputs(
        self, output: SegOutput, batch: Batch, loss: DistillationLoss
    ) -> Iterator[tuple[SegOutput, Batch]]:
        """Yield the student's outputs that are compared, each with the batch as it was shown."""
        if loss.student_sees == "shown":
            yield output, batch
            return
        latents = output.latents.slots_only()
        acquired = batch["acquired"]
        for slot in range(acquired.shape[1]):
            alone = torch.zeros_like(acquired)
            alone[:, slot] = acquired[:, slot]
            # No decoder is made to read nothing: a sample without the modality, which counts as
            # 0, is decoded from all it has.
            readable = torch.where(alone.any(1, keepdim=True), alone, acquired)
            decoded = self._student.value.decode(latents.restrict(readable))
            yield decoded, cast(Batch, {**batch, "present": alone})
