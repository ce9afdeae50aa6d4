"""Distillation losses that compare latents: voxel by voxel, and which channels go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from pmixseg.errors import InputError
from pmixseg.losses.anchors import Anchor
from pmixseg.losses.distances import PerSlot, mean_over_brain, mean_over_shown
from pmixseg.losses.distances.gaussian import floored_variance, raw_of_unit_variance
from pmixseg.losses.distillation.loss import Network
from pmixseg.losses.distillation.pairing import (
    LatentLoss,
    Pair,
    SlotwiseLoss,
    brain_of,
    latent_variance,
    mean_latent,
)
from pmixseg.types import Batch, Brain, Features, Scalar, SegOutput


class LatentMatch(LatentLoss):
    r"""Pull the student's latents towards the teacher's anchor, on the teacher's scale.

    .. math:: L = \sum_l \frac{1}{|A|} \sum_{m \in A}
              \frac{\operatorname{mean}\,(h_l(f_m^s) - \operatorname{sg} P^t)^2}
                   {\operatorname{sg}\operatorname{mean}_c \operatorname{Var}_c(f^t)}

    the mean over brain voxels; the variance over brain voxels, samples and all latents that the
    teacher was shown (and all processes). The scale is that of the teacher's *latents*, not its
    anchor: where latents differ between modalities their mean has less variance than they (0.28
    of it in an unaligned teacher that we measured, 1.0 in an aligned one), so that one λ would
    mean 3.6 times as much for the one teacher as for the other.

    Matching the mean of a teacher's latents is itself an alignment, of an unaligned teacher too:
    all modalities of the student are pulled towards one point (the gap between them fell from .76
    to .33).

    Args:
        weight: λ.
        target: ``"anchor"``; ``"same"``: the teacher's latent of the same modality (with
            independent encoders it carries no privileged information; modalities that the teacher
            was not shown are left out); ``"fused"``: the mean of the student's shown latents
            against the anchor, which is what networks with one bottleneck compare.
        strides: strides that are compared; the two coarsest that both have if not given.
        epsilon: added to the variance.

    Preset ``kdnet``: target ``fused`` at the bottleneck; its constants are from memory only.
    Preset ``smunet`` (content): 0.2. Theirs are plain squared errors, which the division by the
    variance makes comparable.

    Source: docs/method/distillation.md.
    """

    coarsest = 2

    def __init__(
        self,
        weight: float = 1.0,
        target: Literal["anchor", "same", "fused"] = "anchor",
        strides: Sequence[int] | None = None,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__(weight, strides)
        self.target, self.epsilon = target, epsilon
        self.partners: list[int] = []

    def build(self, student: Network, teacher: Network, anchor: Anchor | None) -> None:
        """Pair the levels; for ``same``, also find every modality in the teacher.

        Raises:
            InputError: a modality that the teacher has no encoder for.
        """
        super().build(student, teacher, anchor)
        if self.target == "same":
            lacking = [slot for slot in student.slots if slot not in teacher.slots]
            if lacking:
                raise InputError(
                    f"LatentMatch(target='same'): the teacher has the slots {list(teacher.slots)} "
                    f"and not {lacking}; use target='anchor'."
                )
            self.partners = [teacher.slots.index(slot) for slot in student.slots]

    def compare_level(
        self, student: SegOutput, teacher: SegOutput, batch: Batch, pair: Pair
    ) -> Scalar:
        """Return the loss of one level."""
        features, shown = self.student_latents(student, batch, pair)
        latents, usable = self.teacher_latents(teacher, pair)
        if self.target == "same":
            target, shown = latents[:, self.partners], shown & usable[:, self.partners]
        else:
            target = self.teacher_anchor(teacher, pair)
        if self.target == "fused":
            features, shown = mean_latent(features, shown), shown.any(1, keepdim=True)
        brain = brain_of(student, pair.student)
        squared = (self.to_teacher(features, pair) - target).square().mean(2)
        scale = latent_variance(latents, usable, brain) + self.epsilon
        return mean_over_shown(mean_over_brain(squared, brain) / scale, shown)


class SubsetMatch(LatentLoss):
    r"""Pull the fused latents of two drawn combinations of one sample together.

    .. math:: L = \sum_l
              \frac{\operatorname{mean}\,(\bar f_A - \operatorname{sg} \bar f_{A'})^2}
                   {\operatorname{sg}\operatorname{mean}_c \operatorname{Var}_c(f_{A'})},
              \qquad
              \bar f_A = \frac{1}{|A|} \sum_{m \in A} f_m

    A is what the student was shown in this step, A' a second draw of the same sampler, encoded by
    the same network and detached; means and variance are over brain voxels. The draws are
    exchangeable, so in expectation the gradient is half of the one with both sides moving.

    Args:
        weight: λ.
        strides: strides that are compared; the coarsest if not given.
        epsilon: added to the variance.

    Preset ``m3ae``: 0.2, which is their 0.1 with both sides moving.

    Source: Liu et al., M3AE (AAAI 2023).
    """

    mapped = False
    self_taught = True
    teacher_sees = "drawn"

    def __init__(
        self, weight: float = 0.2, strides: Sequence[int] | None = None, epsilon: float = 1e-5
    ) -> None:
        super().__init__(weight, strides)
        self.epsilon = epsilon

    def compare_level(
        self, student: SegOutput, teacher: SegOutput, batch: Batch, pair: Pair
    ) -> Scalar:
        """Return the loss of one level."""
        features, shown = self.student_latents(student, batch, pair)
        latents, usable = self.teacher_latents(teacher, pair)
        brain = brain_of(student, pair.student)
        difference = mean_latent(features, shown) - mean_latent(latents, usable)
        distances = mean_over_brain(difference.square().mean(2), brain)
        scale = latent_variance(latents, usable, brain) + self.epsilon
        return mean_over_shown(distances / scale, shown.any(1, keepdim=True))


class VariationalMatch(SlotwiseLoss):
    r"""Explain the teacher's features by the student's: variational information distillation.

    .. math:: D = \tfrac12 \operatorname{mean} \left(
              \frac{(h(f_m^s) - P^t)^2}{\sigma^2} + \log \sigma^2 \right), \qquad
              \sigma_c^2 = \operatorname{softplus}(\cdot) + 10^{-2}

    a negative log-likelihood of the teacher's anchor given the student's latent, with one
    learnable variance per channel of the teacher, over brain voxels.

    Args:
        weight: λ.
        strides: strides that are compared; the coarsest that both have if not given.

    Preset ``acn``: 0.5.

    Source: Ahn et al. (CVPR 2019), eq. 5; Wang et al., ACN (MICCAI 2021).
    """

    def __init__(self, weight: float = 0.5, strides: Sequence[int] | None = None) -> None:
        super().__init__(weight, strides)
        self.raw_variances = nn.ParameterDict()

    def build(self, student: Network, teacher: Network, anchor: Anchor | None) -> None:
        """Pair the levels and create σ², which starts at 1."""
        super().build(student, teacher, anchor)
        for pair in self.pairs:
            raw = torch.full((teacher.channels[pair.teacher],), raw_of_unit_variance())
            self.raw_variances[str(pair.stride)] = nn.Parameter(raw)

    def between(self, features: Features, target: Features, brain: Brain, pair: Pair) -> PerSlot:
        """Return the difference between a student's and a teacher's features."""
        variance = floored_variance(self.raw_variances[str(pair.stride)].to(features.dtype))
        squared = (features - target).square() / variance[:, None, None, None]
        return 0.5 * mean_over_brain(squared.mean(2) + variance.log().mean(), brain)


class GramMatch(SlotwiseLoss):
    r"""Compute the squared difference of Gram matrices ("style").

    .. math:: D = \operatorname{mean}_{c,c'} (G^s - G^t)^2, \qquad
              G_{cc'} = \frac{1}{N} \sum_v f_{cv} f_{c'v}

    over the N brain voxels of the level; the teacher's side is its anchor.

    Args:
        weight: λ.
        strides: strides that are compared; the coarsest that both have if not given.
        normalisation: ``mean``, as above, or that of the code of SMU-Net, ``smunet``:
            :math:`D = \sum_{c,c'} (G^s - G^t)^2 / (4 C^2 s^2)` with
            :math:`G_{cc'} = \sum_v f_{cv} f_{c'v} / (C N)`, and s the product of the level's first
            two sides. It is the former divided by :math:`4 C^2 s^2`, and next to nothing.

    Preset ``smunet``: 1e-4 with its own normalisation, beside :class:`LatentMatch` ("content")
    with 0.2.

    Source: Gatys et al. (CVPR 2016); Azad et al., SMU-Net (MIDL 2022).
    """

    def __init__(
        self,
        weight: float = 1e-4,
        strides: Sequence[int] | None = None,
        normalisation: Literal["mean", "smunet"] = "mean",
    ) -> None:
        super().__init__(weight, strides)
        self.normalisation = normalisation

    def between(self, features: Features, target: Features, brain: Brain, pair: Pair) -> PerSlot:
        """Return the difference between a student's and a teacher's features."""
        distances = (_gram(features, brain) - _gram(target, brain)).square().mean((2, 3))
        if self.normalisation == "mean":
            return distances
        size = features.shape[3] * features.shape[4]
        return distances / (4 * features.shape[2] ** 2 * size**2)


def _gram(features: Features, brain: Brain) -> torch.Tensor:
    inside = torch.where(brain[:, None, None], features, 0.0).flatten(3)
    number = brain.flatten(1).sum(1).clamp_min(1)
    return inside @ inside.mT / number[:, None, None, None]
