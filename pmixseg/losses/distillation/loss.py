"""The contract of distillation losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import nn

from pmixseg.describe import NOT_NEGATIVE, Described, Ranges
from pmixseg.errors import InputError
from pmixseg.losses.anchors import Anchor
from pmixseg.types import Batch, Presence, Scalar, SegOutput


class Network(Protocol):
    """What a loss must know of a backbone; every backbone of this package has it."""

    modalities: tuple[str, ...]
    num_classes: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the latents' slots."""


class DistillationLoss(nn.Module, Described, ABC):
    """Compare a student with a teacher: one summand of what distillation adds to the loss.

    Subclasses implement :meth:`compare`, and :meth:`build` if they have parameters that depend on
    the two networks, which may differ in architecture, widths and modalities. A loss asks for no
    tensor's value and its shapes do not depend on the data, so that a compiled training step is
    one graph: masks weigh, they do not index.

    Args:
        weight: λ_j, applied by whoever sums the losses, not by :meth:`forward`.

    Attributes:
        couples_samples: see :class:`~pmixseg.losses.distances.Distance`.
        self_taught: the teacher is the student network itself.
        needs_subsets: some part of a self-taught loss is 0 where nothing is hidden in training.
        teacher_sees: everything ``acquired``, or a combination ``drawn`` by the student's own
            sampler, apart from the student's draw (only if self-taught).
        student_sees: what the step has ``shown`` it, or ``single`` modalities, one after the other;
            the loss is then summed over them, and a sample that lacks one must count as 0.
        reads_extras: auxiliary outputs are compared, so a student that teaches itself does so in
            training mode: in eval mode a backbone has none.
        compares_cases: the loss tells cases apart, and reads ``batch["case"]`` where it is given.
    """

    __call__: Callable[..., Scalar]  # of forward, with its type
    couples_samples: bool = False
    self_taught: bool = False
    needs_subsets: bool = True
    teacher_sees: Literal["acquired", "drawn"] = "acquired"
    student_sees: Literal["shown", "single"] = "shown"
    reads_extras: bool = False
    compares_cases: bool = False
    ranges = Ranges(weight=NOT_NEGATIVE, epsilon=NOT_NEGATIVE)

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def strength(self, epoch: int) -> float:
        """Return the weight's factor in an epoch from 0, for losses with a ramp of their own."""
        return 1.0

    def bind(self, student: Network, teacher: Network, *, anchor: Anchor | None = None) -> None:
        """Connect the loss with the two networks, and create its parameters.

        Args:
            student: the student's backbone.
            teacher: the teacher's.
            anchor: the teacher's anchor, bound to its slots; a uniform mixture if not given, or
                if it cannot stand in for a latent.

        Raises:
            InputError: networks that cannot be compared.
        """
        if student.num_classes != teacher.num_classes:
            raise InputError(
                f"the teacher segments {teacher.num_classes} classes, the student "
                f"{student.num_classes}; distil from a teacher of the same task."
            )
        self.build(student, teacher, anchor)

    def build(self, student: Network, teacher: Network, anchor: Anchor | None) -> None:
        """Create parameters, where a loss has some."""

    def forward(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Scalar:
        """Return the value of the loss, without its weight, in float32 even under autocast.

        Args:
            student: the student's output in this step; gradients flow into it.
            teacher: the teacher's output for the same augmented batch, on everything acquired.
            batch: ``label`` ``[B, D, H, W]``; ``present`` and ``acquired`` ``[B, M]``, columns in
                the order of the student's slots.
        """
        with torch.autocast(student.logits.device.type, enabled=False):
            return self.compare(student, teacher, batch)

    @abstractmethod
    def compare(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Scalar:
        """Return what :meth:`forward` returns; called with autocast off."""

    def shown(self, student: SegOutput, batch: Batch, level: int) -> Presence:
        """Return A, the slots of the student that it was shown at a level, ``[B, slots]``."""
        encoded = student.latents.usable[level]
        present = batch.get("present")
        # Latents of early fusion have one slot that is no modality: it is shown whenever it exists.
        if present is None or present.shape[1] != encoded.shape[1]:
            return encoded
        return encoded & present.to(encoded.device)
