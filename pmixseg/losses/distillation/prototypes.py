r"""Distillation through class prototypes, and self-distillation, which uses it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pmixseg.losses.anchors import Anchor
from pmixseg.losses.distances import mean_over_shown
from pmixseg.losses.distillation.outputs import LogitKL
from pmixseg.losses.distillation.pairing import LatentTerm, Pair
from pmixseg.losses.distillation.term import DistillationTerm, Network
from pmixseg.losses.segmentation import area_fractions
from pmixseg.types import Batch, Features, Scalar, SegOutput


def similarity_maps(features: Features, fractions: Tensor, epsilon: float = 1e-6) -> Tensor:
    r"""Cosine similarity of every voxel to the prototype of every class.

    .. math:: c_k = \frac{\sum_v a_{kv} f_v}{\sum_v a_{kv}}, \qquad
              s_{kv} = \frac{f_v \cdot c_k}{\sqrt{(|f_v|^2 + ε)(|c_k|^2 + ε)}}

    Args:
        features: ``[B, M, C, D, H, W]``.
        fractions: share a of every class in every voxel, ``[B, K, D, H, W]``.
        epsilon: keeps vectors of length 0 differentiable; their similarity is 0.

    Returns:
        ``[B, M, K, D * H * W]``.
    """
    flat, weights = features.flatten(3), fractions.flatten(2).to(features.dtype)
    sums = weights[:, None] @ flat.mT
    prototypes = sums / weights.sum(2)[:, None, :, None].clamp_min(1)
    flat = flat * (flat.square().sum(2, keepdim=True) + epsilon).rsqrt()
    prototypes = prototypes * (prototypes.square().sum(3, keepdim=True) + epsilon).rsqrt()
    return prototypes @ flat


class PrototypeMatch(LatentTerm):
    r"""Mean squared difference between the similarity maps of student and teacher.

    .. math:: D = \frac{1}{|K|} \sum_{k \in K} \operatorname{mean}_v (s^s_{kv} - s^t_{kv})^2

    for every shown modality of the student, against the teacher's anchor. Prototypes are made per
    sample from area fractions of the label at the latent's stride. K are the classes, background
    included, with a mass of at least one voxel of the level; a sample without any gives 0.
    Similarities have no channels, so nothing is mapped, and networks of any width compare.

    Args:
        weight: λ.
        strides: strides that are compared; the two coarsest that both have if not given.

    Presets ``protokd`` and ``passion``: 0.1.

    Source: Wang et al., ProtoKD (ICASSP 2023); Shi et al., PASSION (ACM MM 2024).
    """

    coarsest = 2
    mapped = False

    def __init__(self, weight: float = 0.1, strides: Sequence[int] | None = None) -> None:
        super().__init__(weight, strides)

    def compare_level(
        self, student: SegOutput, teacher: SegOutput, batch: Batch, pair: Pair
    ) -> Scalar:
        """See the class."""
        features, shown = self.student_latents(student, batch, pair)
        classes = student.logits.shape[1]
        fractions = area_fractions(batch["label"], classes, features.shape[3:])
        counts = fractions.sum((2, 3, 4)) >= 1
        with torch.no_grad():
            target = similarity_maps(self.teacher_anchor(teacher, pair), fractions)
        errors = (similarity_maps(features, fractions) - target).square().mean(3)
        total = torch.where(counts[:, None], errors, 0.0).sum(2)
        return mean_over_shown(total / counts.sum(1, keepdim=True).clamp_min(1), shown)


class SelfDistillation(DistillationTerm):
    r"""The network on everything acquired teaches itself on fewer modalities.

    .. math:: L = w_\mathrm{logit} \, T^2 KL(p_\mathrm{acquired} \| p_A)
                  + w_\mathrm{proto} L_\mathrm{proto}

    with :class:`LogitKL` and :class:`PrototypeMatch`; the teaching side is detached. The teacher
    that the callback gives it is the student network itself (``self_taught``).

    Args:
        weight: λ of the sum.
        logit_weight: of the pixel-wise KL.
        prototype_weight: of the prototypes.
        temperature: T.
        strides: of the prototypes; the two coarsest if not given.

    Preset ``passion``-like: 0.5, 0.1, T = 4 with T²; without their preference weights.

    Source: Shi et al., PASSION (ACM MM 2024).
    """

    self_taught = True

    def __init__(
        self,
        weight: float = 1.0,
        logit_weight: float = 0.5,
        prototype_weight: float = 0.1,
        temperature: float = 4.0,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__(weight)
        self.logit = LogitKL(logit_weight, temperature)
        self.prototype = PrototypeMatch(prototype_weight, strides)
        # Prototypes compare each latent with the anchor of all, which differ with nothing hidden.
        self.needs_subsets = logit_weight > 0

    def build(self, student: Network, teacher: Network, anchor: Anchor | None) -> None:
        """Pair the levels of the prototypes."""
        self.prototype.build(student, teacher, anchor)

    def compare(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Scalar:
        """See the class."""
        logit = self.logit.compare(student, teacher, batch)
        prototype = self.prototype.compare(student, teacher, batch)
        return self.logit.weight * logit + self.prototype.weight * prototype
