"""Distillation terms that compare latents: match, Gram, variational, contrastive."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pmixseg.errors import InputError
from pmixseg.losses.anchors import Anchor, hide
from pmixseg.losses.distances import mean_over_shown, pooled_moments
from pmixseg.losses.distances.gaussian import floored_variance, raw_of_unit_variance
from pmixseg.losses.distillation.pairing import LatentTerm, Pair, SlotwiseTerm, mean_latent
from pmixseg.losses.distillation.term import Network, full_precision
from pmixseg.losses.ranks import SharedSums, gather_constants
from pmixseg.types import Batch, Features, Scalar, SegOutput


class LatentMatch(LatentTerm):
    r"""Relative squared distance of the student's latents from the teacher's anchor.

    .. math:: L = \sum_l \frac{1}{|A|} \sum_{m \in A}
              \frac{\operatorname{mean}\,(h_l(f_m^s) - \operatorname{sg} P^t)^2}
                   {\operatorname{sg}\operatorname{mean}_c \operatorname{Var}_c(P^t)}

    the variance over batch and voxels (and all processes).

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

    Raises:
        InputError: an unknown target.

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
        if target not in ("anchor", "same", "fused"):
            raise InputError(f"LatentMatch: target is '{target}'; use 'anchor', 'same' or 'fused'.")
        self.target, self.epsilon = target, epsilon
        self.partners: list[int] = []

    def build(self, student: Network, teacher: Network, anchor: Anchor | None) -> None:
        """See :meth:`LatentTerm.build`; for ``same``, also find every modality in the teacher.

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
        """See the class."""
        features, shown = self.student_latents(student, batch, pair)
        if self.target == "same":
            latents = teacher.latents
            known = latents.usable[pair.teacher][:, self.partners]
            raw = latents.features[pair.teacher].detach()[:, self.partners]
            target, shown = hide(full_precision(raw), known), shown & known
        else:
            target = self.teacher_anchor(teacher, pair)
            known = teacher.latents.usable[pair.teacher].any(1, keepdim=True)
            if self.target == "fused":
                features, shown = mean_latent(features, shown), shown.any(1, keepdim=True)
        _, variance = pooled_moments(target, known, SharedSums())
        difference = self.to_teacher(features, pair) - target
        distances = difference.square().mean((2, 3, 4, 5)) / (variance.mean() + self.epsilon)
        return mean_over_shown(distances, shown)


class SubsetMatch(LatentTerm):
    r"""Distance between the fused latents of two drawn combinations of one sample.

    .. math:: L = \sum_l
              \frac{\operatorname{mean}\,(\bar f_A - \operatorname{sg} \bar f_{A'})^2}
                   {\operatorname{sg}\operatorname{mean}_c \operatorname{Var}_c(\bar f_{A'})},
              \qquad
              \bar f_A = \frac{1}{|A|} \sum_{m \in A} f_m

    A is what the student was shown in this step, A' a second draw of the same sampler, encoded by
    the same network and held still. The draws are exchangeable, so in expectation the gradient is
    half of the one with both sides moving.

    Args:
        weight: λ.
        strides: strides that are compared; the coarsest if not given.
        epsilon: added to the variance.

    Preset ``m3ae``: 0.2, which is their 0.1 with both sides moving.

    Source: Liu et al., M3AE (AAAI 2023).
    """

    mapped = False
    self_taught = True
    lesson = "drawn"

    def __init__(
        self, weight: float = 0.2, strides: Sequence[int] | None = None, epsilon: float = 1e-5
    ) -> None:
        super().__init__(weight, strides)
        self.epsilon = epsilon

    def compare_level(
        self, student: SegOutput, teacher: SegOutput, batch: Batch, pair: Pair
    ) -> Scalar:
        """See the class."""
        features, shown = self.student_latents(student, batch, pair)
        known = teacher.latents.usable[pair.teacher]
        raw = full_precision(teacher.latents.features[pair.teacher].detach())
        target = mean_latent(hide(raw, known), known)
        _, variance = pooled_moments(target, known.any(1, keepdim=True), SharedSums())
        difference = mean_latent(features, shown) - target
        distances = difference.square().mean((2, 3, 4, 5)) / (variance.mean() + self.epsilon)
        return mean_over_shown(distances, shown.any(1, keepdim=True))


class GramMatch(SlotwiseTerm):
    r"""Squared difference of Gram matrices ("style").

    .. math:: D = \operatorname{mean}_{c,c'} (G^s - G^t)^2, \qquad
              G_{cc'} = \frac{1}{N} \sum_v f_{cv} f_{c'v}

    over the N voxels of the level; the teacher's side is its anchor.

    Args:
        weight: λ.
        strides: strides that are compared; the coarsest that both have if not given.

    Preset ``smunet``: 1e-4, beside :class:`LatentMatch` ("content") with 0.2. How they divide the
    Gram matrix is not stated in an opened source.

    Source: Gatys et al. (CVPR 2016); Azad et al., SMU-Net (MIDL 2022).
    """

    def __init__(self, weight: float = 1e-4, strides: Sequence[int] | None = None) -> None:
        super().__init__(weight, strides)

    def between(self, features: Features, target: Features, pair: Pair) -> Tensor:
        """See the class."""
        return (_gram(features) - _gram(target)).square().mean((2, 3))


def _gram(features: Features) -> Tensor:
    flat = features.flatten(3)
    return flat @ flat.mT / flat.shape[3]


class VariationalMatch(SlotwiseTerm):
    r"""Variational information distillation.

    .. math:: D = \tfrac12 \operatorname{mean} \left(
              \frac{(h(f_m^s) - P^t)^2}{\sigma^2} + \log \sigma^2 \right), \qquad
              \sigma_c^2 = \operatorname{softplus}(\cdot) + 10^{-2}

    a negative log-likelihood of the teacher's anchor given the student's latent, with one
    learnable variance per channel of the teacher.

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
        """See :meth:`LatentTerm.build`; σ² starts at 1."""
        super().build(student, teacher, anchor)
        for pair in self.pairs:
            raw = torch.full((teacher.channels[pair.teacher],), raw_of_unit_variance())
            self.raw_variances[str(pair.stride)] = nn.Parameter(raw)

    def between(self, features: Features, target: Features, pair: Pair) -> Tensor:
        """See the class."""
        variance = floored_variance(self.raw_variances[str(pair.stride)].to(features.dtype))
        squared = (features - target).square() / variance[:, None, None, None]
        distance: Tensor = 0.5 * (squared.mean((2, 3, 4, 5)) + variance.log().mean())
        return distance


class ContrastiveMatch(LatentTerm):
    r"""Global embeddings of the same case close, of other cases apart.

    .. math:: L = \operatorname{mean}_i \left[ \tfrac12 \operatorname{mean}_{j: same} d_{ij}^2 +
              \tfrac12 \operatorname{mean}_{j: other} \max(0, \text{margin} - d_{ij})^2 \right]

    :math:`d_{ij}` is the distance between the student's embedding of sample i and the teacher's of
    sample j: voxel means of h(mean shown latent) and of the anchor, scaled to length 1. Cases are
    told apart by ``case_id``; samples of all processes are compared.

    Args:
        weight: λ.
        margin: as above; distances lie in [0, 2].
        strides: strides that are compared; the coarsest that both have if not given.

    Preset ``pmkl``: 0.5, margin 1.

    Source: Hadsell et al. (CVPR 2006); Chen et al., PMKL (IEEE TMI 2022).
    """

    def __init__(
        self, weight: float = 0.5, margin: float = 1.0, strides: Sequence[int] | None = None
    ) -> None:
        super().__init__(weight, strides)
        self.margin = margin

    def compare_level(
        self, student: SegOutput, teacher: SegOutput, batch: Batch, pair: Pair
    ) -> Scalar:
        """See the class."""
        features, shown = self.student_latents(student, batch, pair)
        mine = _embed(self.to_teacher(mean_latent(features, shown), pair))
        theirs = gather_constants(_embed(self.teacher_anchor(teacher, pair)))
        numbers = [zlib.crc32(case.encode()) for case in batch["case_id"]]
        case = torch.tensor(numbers, device=mine.device)
        same = case[:, None] == gather_constants(case)[None]
        squared = (mine[:, None] - theirs[None]).square().sum(2)
        # √ has no slope at 0; the shift is far below any distance that matters.
        apart = (self.margin - (squared + 1e-12).sqrt()).clamp_min(0).square()
        return 0.5 * (mean_over_shown(squared, same) + mean_over_shown(apart, ~same))


def _embed(features: Features) -> Tensor:
    means = features.mean((3, 4, 5))[:, 0]
    return means * (means.square().sum(1, keepdim=True) + 1e-12).rsqrt()
