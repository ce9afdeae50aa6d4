r"""How far a modality's latent is from the anchor: the contract, and distances between points.

Every distance returns one number per sample and modality; the mean over a sample's modalities and
over samples is taken by :class:`~pmixseg.losses.alignment.Alignment`. All compute in float32 or
float64, whichever the features have, and have finite gradients where latents coincide, are
constant, or have one voxel.

Sources: docs/method/alignment.md; Liu et al., Mind the Gap (arXiv 2409.19366).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pmixseg.describe import Described
from pmixseg.errors import InputError
from pmixseg.losses.anchors import Anchor, NormalAnchor, ProductAnchor
from pmixseg.losses.ranks import SharedSums
from pmixseg.types import Features, Presence, Scalar

Detach = Literal["anchor", "none", "features"]
"""What receives no gradient: the anchor (a fixed target), nothing, or the latents (the anchor
moves towards them)."""

PerSlot = Float[Tensor, "b m"]


@dataclass(frozen=True)
class LevelLatents:
    """The latents of one level, as a distance sees them.

    Args:
        features: ``[B, M, C, D, H, W]``, float32 or float64; exactly 0 outside ``subset``.
        shown: slots whose distance counts (A), ``[B, M]``, within ``subset``.
        subset: slots that make the anchor (S): acquired and encoded.
        level: which level of the network.
        log_variance: of variational encoders, shaped and cleaned like ``features``.
        sums: statistics are taken over all processes by these, and whoever gave them settles the
            loss; ``None``: over this process's samples alone.
    """

    features: Features
    shown: Presence
    subset: Presence
    level: int
    log_variance: Features | None = None
    sums: SharedSums | None = None


class Distance(nn.Module, Described, ABC):
    """Distance between the latent of a modality and the anchor.

    Attributes:
        couples_samples: a sample's value depends on the other samples of the batch in a way that
            is *not* summed over processes, so DDP differs from one process.
    """

    couples_samples: bool = False

    def bind(
        self, channels: Sequence[int], modalities: Sequence[str], levels: Sequence[int]
    ) -> None:
        """Create parameters, where the distance has some.

        Args:
            channels: channels of *every* level of the network, finest first.
            modalities: names of the M slots.
            levels: the levels that are aligned.
        """

    def check(self, anchor: Anchor) -> None:
        """Refuse anchors that the distance has no meaning for.

        Raises:
            InputError: a product of Gaussians without a distance between Gaussians.
        """
        if isinstance(anchor, ProductAnchor):
            raise InputError(
                f"ProductAnchor weighs latents by their precision, which {type(self).__name__} "
                "does not estimate; use --align.distance kl, or another anchor."
            )

    @abstractmethod
    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """Distance per sample and modality, ``[B, M]``; outside ``shown`` anything finite."""

    def __call__(self, *args: Any, **kwargs: Any) -> PerSlot:
        """Typed call of :meth:`forward`."""
        distance: PerSlot = super().__call__(*args, **kwargs)
        return distance


def point_and_target(
    latents: LevelLatents, anchor: Anchor, detach: Detach
) -> tuple[Tensor, Tensor]:
    """Latents ``[B, M, C, D, H, W]`` and anchor ``[B, 1, C, D, H, W]``, one of them detached.

    The anchor's weights never receive a gradient from an alignment loss (docs/method/anchors.md).
    """
    features = latents.features
    target = anchor(features, latents.subset, latents.level, detach_weights=True)[:, None]
    if detach == "anchor":
        return features, target.detach()
    return (features.detach() if detach == "features" else features), target


def mean_over_shown(distances: PerSlot, shown: Presence) -> Scalar:
    """Mean over the shown slots of each sample, then over samples.

    A sample that shows none counts as 0. What stands outside ``shown`` is never read.

    Args:
        distances: ``[B, M]``.
        shown: ``[B, M]``.
    """
    total = torch.where(shown, distances, 0.0).sum(1)
    return (total / shown.sum(1).clamp_min(1)).mean()


def pooled_moments(
    features: Features, subset: Presence, sums: SharedSums | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and population variance per channel, over samples, modalities and voxels.

    Gradients flow through both.

    Args:
        features: ``[B, M, C, D, H, W]``, finite in every slot.
        subset: slots that count, ``[B, M]``.
        sums: takes them over all processes; ``None``: over this one's samples.

    Returns:
        Two tensors ``[C]``; 0 where no slot counts.
    """
    over_all = _as_it_is if sums is None else sums.add
    # Per slot first, then between slots: no difference of large sums, and masks on small tensors.
    variance, mean = torch.var_mean(features, (3, 4, 5), correction=0)
    counts = subset.to(mean)[:, :, None]
    totals = over_all(torch.cat([counts.sum().view(1), (counts * mean).sum((0, 1))]))
    number = totals[0].detach().clamp_min(1)
    centre = totals[1:] / number
    # The sum of squares is least at the mean, so no gradient is lost by holding it still.
    apart = (mean - centre.detach()).square()
    spread = over_all((counts * (variance + apart)).sum((0, 1)))
    return centre, spread / number


def _as_it_is(own: Tensor) -> Tensor:
    return own


def standardise(latents: LevelLatents, epsilon: float) -> LevelLatents:
    r"""Latents with mean 0 and variance 1 per channel over the whole batch.

    The statistics are shared by all modalities: a scale of its own for each would hide the very
    gap that is to be closed. They are not detached, so no gradient points along the scale.
    """
    centre, variance = pooled_moments(latents.features, latents.subset, latents.sums)
    shape = (1, 1, -1, 1, 1, 1)
    scale = (variance + epsilon).rsqrt()
    features = (latents.features - centre.view(shape)) * scale.view(shape)
    return replace(latents, features=features, log_variance=None)


class MSE(Distance):
    r"""Half the mean squared difference: ``mse``.

    .. math:: D(f, P) = \tfrac12 \operatorname{mean}\,(f - P)^2

    It is KL(N(f, I) ‖ N(P, I)) per element. With four modalities the mean over them makes it the
    Σ MSE / 8 of the authors' public snippet. It can be met by shrinking the latents: prefer
    :class:`NMSE`.
    """

    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """See the class."""
        features, target = point_and_target(latents, anchor, detach)
        return 0.5 * (features - target).square().mean((2, 3, 4, 5))


class NMSE(Distance):
    r"""Half the mean squared difference, relative to the latents' variance: ``nmse``.

    .. math:: D(f_m, P) = \frac{\tfrac12 \operatorname{mean}\,(f_m - P)^2}
                               {\operatorname{mean}_c \operatorname{Var}_c(f) + \varepsilon}

    The variance is taken over the batch, the voxels and all acquired latents together (and over
    all processes), and is not detached: scaling all latents changes nothing, so the loss cannot
    be met by shrinking them. With a uniform mixture over complete samples it is half the share
    of the variance that lies between modalities, and never more than ½.

    Args:
        epsilon: added to the variance.

    Source: docs/method/alignment.md (plain ``mse`` cut the variance from 0.42 to 0.12 there).
    """

    def __init__(self, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """See the class."""
        features, target = point_and_target(latents, anchor, detach)
        numerator = 0.5 * (features - target).square().mean((2, 3, 4, 5))
        _, variance = pooled_moments(latents.features, latents.subset, latents.sums)
        return numerator / (variance.mean() + self.epsilon)


class SmoothL1(Distance):
    r"""Huber's loss between standardised latents and their anchor: ``smooth_l1``.

    .. math:: D = \operatorname{mean} h(\hat f - \hat P), \qquad
              h(x) = \begin{cases} x^2 / 2β & |x| < β \\ |x| - β/2 & \text{else} \end{cases}

    Args:
        beta: β, in standard deviations.
        epsilon: added to the variance in :func:`standardise`.
    """

    def __init__(self, beta: float = 1.0, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.beta, self.epsilon = beta, epsilon

    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """See the class."""
        features, target = point_and_target(standardise(latents, self.epsilon), anchor, detach)
        target = target.expand_as(features)
        loss = F.smooth_l1_loss(features, target, reduction="none", beta=self.beta)
        return loss.mean((2, 3, 4, 5))


class Cosine(Distance):
    r"""Angle between standardised latents and their anchor, voxel by voxel: ``cosine``.

    .. math:: D = \operatorname{mean}_v \tfrac12 \left\|
                  \frac{\hat f_v}{\sqrt{\|\hat f_v\|^2 + \varepsilon}} -
                  \frac{\hat P_v}{\sqrt{\|\hat P_v\|^2 + \varepsilon}} \right\|^2

    which is the mean of 1 - cos wherever vectors are longer than √ε, and 0 where f = P even if
    both vanish.

    Args:
        epsilon: as above, and added to the variance in :func:`standardise`.
    """

    def __init__(self, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon

    def check(self, anchor: Anchor) -> None:
        """Refuse anchors without a direction.

        Raises:
            InputError: a normal anchor, or a product of Gaussians.
        """
        super().check(anchor)
        if isinstance(anchor, NormalAnchor):
            raise InputError(
                "the distance 'cosine' compares directions, and NormalAnchor has none; use "
                "another distance or another anchor."
            )

    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """See the class."""
        features, target = point_and_target(standardise(latents, self.epsilon), anchor, detach)
        difference = self._unit(features) - self._unit(target)
        return 0.5 * difference.square().sum(2).mean((2, 3, 4))

    def _unit(self, vectors: Tensor) -> Tensor:
        return vectors * (vectors.square().sum(2, keepdim=True) + self.epsilon).rsqrt()
