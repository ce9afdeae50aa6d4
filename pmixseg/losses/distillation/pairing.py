r"""What distillation terms over latents share.

Student and teacher levels are paired by stride; a learnable 1x1x1 map h takes the student's
channels to the teacher's. The teacher's side is, by default, its anchor
:math:`P^t = \sum_m w_m^t f_m^t` over everything acquired: privileged information that no single
latent of the student's own modalities carries. Each modality of the student is compared on its
own, and the mean over the modalities it was shown is taken, as in the alignment loss.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pmixseg.errors import InputError
from pmixseg.losses.anchors import Anchor, MixtureAnchor, hide, weighted_sum
from pmixseg.losses.distances import mean_over_shown
from pmixseg.losses.distillation.term import DistillationTerm, Network, full_precision
from pmixseg.losses.projections import SlotLinear
from pmixseg.types import Batch, Features, Presence, Scalar, SegOutput


class Pair(NamedTuple):
    """A stride that both networks have, and the level where each has it."""

    stride: int
    student: int
    teacher: int


def shared_strides(
    student: Network, teacher: Network, wanted: Sequence[int] | None, coarsest: int
) -> list[Pair]:
    """Levels of two networks at the same stride, finest first.

    Args:
        student: the student's backbone.
        teacher: the teacher's.
        wanted: these strides, or
        coarsest: as many of the coarsest that both have.

    Raises:
        InputError: a wanted stride that one of them lacks, or none in common.

    Example:
        >>> from types import SimpleNamespace as Net
        >>> small, large = Net(strides=(1, 2, 4)), Net(strides=(2, 4, 8))
        >>> shared_strides(small, large, None, coarsest=1)
        [Pair(stride=4, student=2, teacher=1)]
    """
    both = sorted(set(student.strides) & set(teacher.strides))
    chosen = both[-coarsest:] if wanted is None else sorted(set(wanted))
    if not chosen or not set(chosen) <= set(both):
        raise InputError(
            f"latents at the strides {list(wanted or [])} cannot be compared: the student has "
            f"{list(student.strides)}, the teacher {list(teacher.strides)}; choose strides that "
            "both have."
        )
    # A network may have two levels of one stride; the last is the deepest.
    last = [{stride: level for level, stride in enumerate(n.strides)} for n in (student, teacher)]
    return [Pair(stride, last[0][stride], last[1][stride]) for stride in chosen]


class LatentTerm(DistillationTerm):
    """A term over latents at the strides that student and teacher share.

    Args:
        weight: λ.
        strides: strides that are compared; the coarsest that both have if not given.

    Attributes:
        coarsest: how many of the coarsest are taken by default.
        mapped: whether h is built.
    """

    coarsest: int = 1
    mapped: bool = True

    def __init__(self, weight: float = 1.0, strides: Sequence[int] | None = None) -> None:
        super().__init__(weight)
        self.strides = strides
        self.pairs: list[Pair] = []
        self.maps = nn.ModuleDict()
        self.uniform: MixtureAnchor | None = None
        self._borrowed: tuple[Anchor, ...] = ()

    def build(self, student: Network, teacher: Network, anchor: Anchor | None) -> None:
        """Pair the levels, build h for each, and choose the teacher's anchor."""
        self.pairs = shared_strides(student, teacher, self.strides, self.coarsest)
        for pair in self.pairs if self.mapped else ():
            inputs, outputs = student.channels[pair.student], teacher.channels[pair.teacher]
            self.maps[str(pair.stride)] = SlotLinear(
                1, inputs, outputs, bias=True, identity=inputs == outputs
            )
        if anchor is not None and anchor.can_fill:
            # A tuple hides it from nn.Module: it belongs to the teacher.
            self._borrowed = (anchor,)
        else:
            self.uniform = MixtureAnchor("uniform")
            self.uniform.bind(teacher.slots, len(teacher.channels))

    def student_latents(
        self, student: SegOutput, batch: Batch, pair: Pair
    ) -> tuple[Features, Presence]:
        """Clean latents ``[B, M, C, D, H, W]`` of the student and its shown slots A."""
        shown = self.shown(student, batch, pair.student)
        return hide(full_precision(student.latents.features[pair.student]), shown), shown

    def teacher_anchor(self, teacher: SegOutput, pair: Pair) -> Features:
        """sg[P^t], ``[B, 1, C, D, H, W]``."""
        anchor = self._borrowed[0] if self._borrowed else self.uniform
        assert anchor is not None  # bind() chooses one
        latents = teacher.latents
        with torch.no_grad():
            features = full_precision(latents.features[pair.teacher])
            return anchor(features, latents.usable[pair.teacher], pair.teacher)[:, None]

    def to_teacher(self, features: Features, pair: Pair) -> Features:
        """h: the student's channels to the teacher's."""
        mapped: Tensor = self.maps[str(pair.stride)](features)
        return mapped

    def compare(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Scalar:
        """Sum over the paired levels."""
        values = [self.compare_level(student, teacher, batch, pair) for pair in self.pairs]
        return torch.stack(values).sum()

    @abstractmethod
    def compare_level(
        self, student: SegOutput, teacher: SegOutput, batch: Batch, pair: Pair
    ) -> Scalar:
        """Value at one pair of levels."""


class SlotwiseTerm(LatentTerm):
    """A term that compares every shown latent of the student with the teacher's anchor.

    Subclasses implement :meth:`between`.
    """

    @abstractmethod
    def between(self, features: Features, target: Features, pair: Pair) -> Tensor:
        """Distance ``[B, M]`` of mapped latents ``[B, M, C, ...]`` from ``[B, 1, C, ...]``."""

    def compare_level(
        self, student: SegOutput, teacher: SegOutput, batch: Batch, pair: Pair
    ) -> Scalar:
        """Mean over samples of (1/|A|) Σ_{m∈A} :meth:`between`."""
        features, shown = self.student_latents(student, batch, pair)
        distances = self.between(
            self.to_teacher(features, pair), self.teacher_anchor(teacher, pair), pair
        )
        return mean_over_shown(distances, shown)


def mean_latent(features: Features, shown: Presence) -> Features:
    """Mean over the shown slots, ``[B, 1, C, D, H, W]``; 0 where none is shown."""
    weights = (shown / shown.sum(1, keepdim=True).clamp_min(1)).to(features.dtype)
    return weighted_sum(features, weights, shown)[:, None]
