r"""Pair latents of a student with those of its teacher: equal strides, and which slots match.

Student and teacher levels are paired by stride; a learnable 1x1x1 map h takes the student's
channels to the teacher's. The teacher's side is, by default, its anchor
:math:`P^t = \sum_m w_m^t f_m^t` over everything acquired: privileged information that no single
latent of the student's own modalities carries. Each modality of the student is compared on its
own, and the mean over the modalities it was shown is taken, as in the alignment loss. Only brain
voxels count: background is half of a patch and more, and no network means anything there. Shapes
do not depend on the masks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pmixseg.borrowed import Borrowed
from pmixseg.errors import InputError
from pmixseg.losses.anchors import Anchor, MixtureAnchor
from pmixseg.losses.distances import PerSlot, mean_over_shown, pooled_moments
from pmixseg.losses.distillation.loss import DistillationLoss, Network
from pmixseg.losses.projections import SlotLinear
from pmixseg.losses.ranks import SharedSums
from pmixseg.slot_sums import hide, weighted_sum
from pmixseg.types import Batch, Brain, Features, Presence, Scalar, SegOutput, full_precision


class Pair(NamedTuple):
    """A stride that both networks have, and the level where each has it."""

    stride: int
    student: int
    teacher: int


def shared_strides(
    student: Network, teacher: Network, strides: Sequence[int] | None, coarsest: int
) -> list[Pair]:
    """Pair the levels of two networks that have the same stride, finest first.

    These are ``strides`` or, where they are not given, as many of the ``coarsest`` that both have.

    Raises:
        InputError: a wanted stride that one of them lacks, or none in common.

    Example:
        >>> from types import SimpleNamespace as Net
        >>> small, large = Net(strides=(1, 2, 4)), Net(strides=(2, 4, 8))
        >>> shared_strides(small, large, None, coarsest=1)
        [Pair(stride=4, student=2, teacher=1)]
    """
    both = sorted(set(student.strides) & set(teacher.strides))
    chosen = both[-coarsest:] if strides is None else sorted(set(strides))
    if not chosen or not set(chosen) <= set(both):
        raise InputError(
            f"latents at the strides {list(strides or [])} cannot be compared: the student has "
            f"{list(student.strides)}, the teacher {list(teacher.strides)}; choose strides that "
            "both have."
        )
    # A network may have two levels of one stride; the last is the deepest.
    last = [{stride: level for level, stride in enumerate(n.strides)} for n in (student, teacher)]
    return [Pair(stride, last[0][stride], last[1][stride]) for stride in chosen]


class LatentLoss(DistillationLoss):
    """A loss over latents at the strides that student and teacher share.

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
        # The teacher's own, if it has one that can stand in for a latent.
        self._anchor: Borrowed[Anchor | None] = Borrowed(None)

    def build(self, student: Network, teacher: Network, anchor: Anchor | None) -> None:
        """Pair the levels, build h for each, and choose the teacher's anchor."""
        self.pairs = shared_strides(student, teacher, self.strides, self.coarsest)
        for pair in self.pairs if self.mapped else ():
            inputs, outputs = student.channels[pair.student], teacher.channels[pair.teacher]
            self.maps[str(pair.stride)] = SlotLinear(
                1, inputs, outputs, bias=True, identity=inputs == outputs
            )
        if anchor is not None and anchor.can_fill:
            self._anchor = Borrowed(anchor)
        else:
            self.uniform = MixtureAnchor("uniform")
            self.uniform.bind(teacher.slots, len(teacher.channels))

    def student_latents(
        self, student: SegOutput, batch: Batch, pair: Pair
    ) -> tuple[Features, Presence]:
        """Clean latents ``[B, M, C, D, H, W]`` of the student and its shown slots A."""
        shown = self.shown(student, batch, pair.student)
        return hide(full_precision(student.latents.features[pair.student]), shown), shown

    def teacher_latents(self, teacher: SegOutput, pair: Pair) -> tuple[Features, Presence]:
        """Clean latents ``[B, M, C, D, H, W]`` of the teacher, detached, and what it was shown."""
        usable = teacher.latents.usable[pair.teacher]
        features = teacher.latents.features[pair.teacher].detach()
        return hide(full_precision(features), usable), usable

    def teacher_anchor(self, teacher: SegOutput, pair: Pair) -> Features:
        """Return sg[P^t], ``[B, 1, C, D, H, W]``."""
        anchor = self._anchor.value or self.uniform
        assert anchor is not None  # bind() chooses one
        with torch.no_grad():
            features, usable = self.teacher_latents(teacher, pair)
            return anchor(features, usable, pair.teacher)[:, None]

    def to_teacher(self, features: Features, pair: Pair) -> Features:
        """Map the student's channels to the teacher's: h."""
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
        """Return the value at one pair of levels."""


class SlotwiseLoss(LatentLoss):
    """A loss that compares every shown latent of the student with the teacher's anchor.

    Subclasses implement :meth:`between`.
    """

    @abstractmethod
    def between(self, features: Features, target: Features, brain: Brain, pair: Pair) -> PerSlot:
        """Return the distance ``[B, M]`` of mapped latents from the anchor ``[B, 1, C, D, H, W]``.

        A sample without any brain gives 0.
        """

    def compare_level(
        self, student: SegOutput, teacher: SegOutput, batch: Batch, pair: Pair
    ) -> Scalar:
        """Return the mean over samples of (1/|A|) Σ_{m∈A} :meth:`between`."""
        features, shown = self.student_latents(student, batch, pair)
        target, brain = self.teacher_anchor(teacher, pair), brain_of(student, pair.student)
        distances = self.between(self.to_teacher(features, pair), target, brain, pair)
        return mean_over_shown(distances, shown)


def mean_latent(features: Features, shown: Presence) -> Features:
    """Return the mean over the shown slots, ``[B, 1, C, D, H, W]``; 0 where none is shown."""
    weights = shown.to(features.dtype) / shown.sum(1, keepdim=True).clamp_min(1)
    return weighted_sum(features, weights, shown)[:, None]


def brain_of(output: SegOutput, level: int) -> Brain:
    """Return which voxels of a level hold brain; where the latents do not know it, all count."""
    latents = output.latents
    if latents.brain is not None:
        return latents.brain[level]
    features = latents.features[level]
    shape = (len(features), *features.shape[3:])
    return torch.ones(shape, dtype=torch.bool, device=features.device)


def mean_vector(features: Features, brain: Brain) -> Float[Tensor, "b m c"]:
    """Return the mean of every channel over brain voxels; 0 for a sample without any."""
    total = torch.where(brain[:, None, None], features, 0.0).sum((3, 4, 5))
    return total / brain.sum((1, 2, 3)).clamp_min(1)[:, None, None]


@torch.no_grad()
def latent_variance(features: Features, usable: Presence, brain: Brain) -> Scalar:
    """Return the mean over channels of the variance of latents: the scale of their distances.

    Every brain voxel of every usable slot of all samples, and of all processes, is one point.
    Latents are finite in every slot. The one number is 0 where no voxel counts; no gradient flows
    through it.
    """
    return pooled_moments(features, usable, brain, SharedSums())[1].mean()
