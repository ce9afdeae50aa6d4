r"""Distillation through class prototypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pmixseg.errors import InputError
from pmixseg.losses.distances import mean_over_shown
from pmixseg.losses.distillation.loss import DistillationLoss
from pmixseg.losses.distillation.pairing import LatentLoss, Pair, brain_of
from pmixseg.losses.segmentation import area_fractions
from pmixseg.types import Batch, Brain, Features, Scalar, SegOutput, full_precision

EPSILON = 1e-6
"""ε of :func:`similarity_maps`."""


def similarity_maps(features: Features, fractions: Tensor) -> Tensor:
    r"""Compute the cosine similarity of every voxel to the prototype of every class.

    .. math:: c_k = \frac{\sum_v a_{kv} f_v}{\sum_v a_{kv}}, \qquad
              s_{kv} = \frac{f_v \cdot c_k}{\sqrt{(|f_v|^2 + ε)(|c_k|^2 + ε)}}

    a is the share of every class in every voxel, ``[B, K, D, H, W]``, the maps are
    ``[B, M, K, D * H * W]``. ε keeps vectors of length 0 differentiable; their similarity is 0.
    """
    flat, weights = features.flatten(3), fractions.flatten(2).to(features.dtype)
    sums = weights[:, None] @ flat.mT
    prototypes = sums / weights.sum(2)[:, None, :, None].clamp_min(1)
    flat = flat * (flat.square().sum(2, keepdim=True) + EPSILON).rsqrt()
    prototypes = prototypes * (prototypes.square().sum(3, keepdim=True) + EPSILON).rsqrt()
    return prototypes @ flat


def map_difference(
    student: Features, teacher: Features, fractions: Tensor, voxels: Brain
) -> Float[Tensor, "b m"]:
    r"""Return the mean squared difference of two networks' similarity maps.

    .. math:: D = \frac{1}{|K|} \sum_{k \in K} \operatorname{mean}_v (s^s_{kv} - s^t_{kv})^2

    K are the classes with a mass of at least one voxel among those that count; without any it is 0.
    The teacher has latents ``[B, 1 or M, C', D, H, W]``; no gradient flows into it. Fractions are
    those of :func:`similarity_maps`.
    """
    fractions = torch.where(voxels[:, None], fractions, 0.0)
    counts = fractions.sum((2, 3, 4)) >= 1
    with torch.no_grad():
        target = similarity_maps(teacher, fractions)
    squared = (similarity_maps(student, fractions) - target).square()
    inside = voxels.flatten(1)[:, None, None]
    errors = torch.where(inside, squared, 0.0).sum(3) / inside.sum(3).clamp_min(1)
    total = torch.where(counts[:, None], errors, 0.0).sum(2)
    return total / counts.sum(1, keepdim=True).clamp_min(1)


class PrototypeMatch(DistillationLoss):
    r"""Match how similar each voxel of a decoder map is to the prototypes of the classes.

    Prototypes are class means of a decoder's feature map, per sample. The published terms take the
    map that the last convolution reads, the finest. Mean over classes and voxels of
    :func:`map_difference`; K are the classes of the sample, background included. Similarities have
    no channels, so networks of any width compare.

    Args:
        weight: λ.
        index: which of ``SegOutput.decoder``; -1 for the finest.

    Presets ``protokd`` and ``passion``: 0.1. ProtoKD leaves a class out unless every sample of the
    batch has it.

    Raises:
        InputError: in use: a network without decoder maps, or maps of different sizes.

    Source: Wang et al., ProtoKD (ICASSP 2023); Shi et al., PASSION (ACM MM 2024).
    """

    def __init__(self, weight: float = 0.1, index: int = -1) -> None:
        super().__init__(weight)
        self.index = index

    def compare(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Scalar:
        """Return the loss between the student's and the teacher's outputs."""
        return self.per_sample(student, teacher, batch).mean()

    def per_sample(
        self, student: SegOutput, teacher: SegOutput, batch: Batch
    ) -> Float[Tensor, " b"]:
        """Return the value of each sample."""
        learnt, taught = self._map(student, "student"), self._map(teacher, "teacher").detach()
        if learnt.shape[3:] != taught.shape[3:]:
            raise InputError(
                f"PrototypeMatch compares decoder map {self.index}, which is "
                f"{list(learnt.shape[3:])} voxels in the student and {list(taught.shape[3:])} in "
                "the teacher; use networks of one finest stride, or LatentPrototypeMatch."
            )
        fractions = area_fractions(batch["label"], student.logits.shape[1], learnt.shape[3:])
        every = torch.ones_like(fractions[:, 0], dtype=torch.bool)
        return map_difference(learnt, taught, fractions, every)[:, 0]

    def _map(self, output: SegOutput, whose: str) -> Features:
        if not -len(output.decoder) <= self.index < len(output.decoder):
            raise InputError(
                f"PrototypeMatch reads decoder map {self.index}, but the {whose}'s backbone gives "
                f"{len(output.decoder)} in SegOutput.decoder; return the maps there, or use "
                "LatentPrototypeMatch, which reads the encoder."
            )
        return full_precision(output.decoder[self.index])[:, None]


class LatentPrototypeMatch(LatentLoss):
    r"""Match how similar each latent is to the prototypes of the classes.

    :func:`map_difference` of every shown modality of the student against the teacher's anchor, over
    brain voxels, with area fractions of the label at the latent's stride. Not a published form:
    it acts on the encoders, where :class:`PrototypeMatch` acts on what was decoded.

    Args:
        weight: λ.
        strides: strides that are compared; the two coarsest that both have if not given.
    """

    coarsest = 2
    mapped = False

    def __init__(self, weight: float = 0.1, strides: Sequence[int] | None = None) -> None:
        super().__init__(weight, strides)

    def compare_level(
        self, student: SegOutput, teacher: SegOutput, batch: Batch, pair: Pair
    ) -> Scalar:
        """Return the loss of one level."""
        features, shown = self.student_latents(student, batch, pair)
        fractions = area_fractions(batch["label"], student.logits.shape[1], features.shape[3:])
        target, brain = self.teacher_anchor(teacher, pair), brain_of(student, pair.student)
        return mean_over_shown(map_difference(features, target, fractions, brain), shown)
