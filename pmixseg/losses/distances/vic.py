r"""Squared difference with guards against collapse."""

from __future__ import annotations

import torch

from pmixseg.describe import NOT_NEGATIVE, Ranges
from pmixseg.losses.anchors import Anchor
from pmixseg.losses.distances.contract import (
    Detach,
    Distance,
    LevelLatents,
    PerSlot,
    point_and_target,
)
from pmixseg.losses.distances.moments import mean_over_brain, pooled_covariance, standardise


class VIC(Distance):
    r"""Compute the squared difference per channel, with guards on variance and covariance: ``vic``.

    .. math:: D = \operatorname{mean}_{c,v} \frac{(f - P)^2}{\operatorname{Var}_c}
                  + \frac{4}{C^2} \sum_{c \neq d} R_{cd}^2
                  + \operatorname{mean}_c \max(0, 1 - s_c)

    R is the correlation matrix of the channels and s their standard deviation, both over the brain
    voxels of all shown latents *around the mean of each modality*: the gap itself must not count
    as rank. The guards keep the channels different and alive. They can be bought with codes of
    the position, which are the same in every sequence: they are not enough alone.

    Args:
        covariance_weight: factor of the second summand.
        variance_weight: factor of the third.
        epsilon: added to variances.

    Source: Bardes et al., VICReg (ICLR 2022) for the guards; docs/method/alignment.md.
    """

    name = "vic"

    ranges = Ranges(covariance_weight=NOT_NEGATIVE, variance_weight=NOT_NEGATIVE)

    def __init__(
        self, covariance_weight: float = 4.0, variance_weight: float = 1.0, epsilon: float = 1e-5
    ) -> None:
        super().__init__()
        self.covariance_weight, self.variance_weight = covariance_weight, variance_weight
        self.epsilon = epsilon

    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """Return the distance per sample and modality, ``[B, M]``."""
        features, target = point_and_target(standardise(latents, self.epsilon), anchor, detach)
        difference = mean_over_brain((features - target).square().mean(2), latents.brain)
        covariance = pooled_covariance(
            latents.features, latents.shown, latents.brain, latents.sums, within=True
        )
        deviation = (covariance.diagonal() + self.epsilon).sqrt()
        between = covariance / (deviation[:, None] * deviation)
        between = between - torch.diag_embed(between.diagonal())
        guard = self.covariance_weight * between.square().mean()
        guard = guard + self.variance_weight * (1 - deviation).clamp_min(0).mean()
        return difference + guard
