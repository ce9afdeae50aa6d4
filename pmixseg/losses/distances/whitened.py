r"""Mahalanobis distance to the anchor, which does not change under a linear map."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pmixseg.losses.anchors import Anchor
from pmixseg.losses.distances.contract import (
    Detach,
    Distance,
    LevelLatents,
    PerSlot,
    point_and_target,
)
from pmixseg.losses.distances.moments import mean_over_brain, pooled_covariance
from pmixseg.types import Presence

SMALLEST_VARIANCE = 1e-8
"""Added to every variance: constant latents have finite gradients."""


class Whitened(Distance):
    r"""Compute half the mean squared Mahalanobis distance to the anchor: ``whitened``.

    .. math:: D = \frac{1}{2C} \operatorname{tr}\,(S_T + \varepsilon I)^{-1} S_W, \qquad
              S_W = \operatorname{mean}_v (f - P)(f - P)^T

    with :math:`S_T` the covariance of the channels over the brain voxels of all acquired latents.
    It is the sibling of ``nmse`` (a ratio of traces) that no invertible linear map changes, so
    putting all variance into the direction in which sequences agree most easily gains nothing.

    Latents are whitened before the anchor is formed and detached. Over complete samples and with
    a uniform mixture no gradient points along a linear map of all latents; where latents are hidden
    or weights differ, one along rotations is left. Latents that were not shown receive none
    through :math:`S_T`.

    Args:
        epsilon: ε relative to the mean variance of the channels. Where a batch has fewer brain
            voxels than channels, :math:`S_T` is singular without it.

    Source: docs/method/alignment.md; Fisher's discriminant criterion.
    """

    name = "whitened"

    def __init__(self, epsilon: float = 1e-3) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """Return the distance per sample and modality, ``[B, M]``."""
        with torch.no_grad():
            whole = self._factor(latents, latents.subset)
        own = self._factor(latents, latents.shown)
        flat = latents.features.transpose(1, 2).flatten(2)  # [B, C, M·V]
        # In value L_S⁻¹ f; in gradient that of L_A⁻¹ f, which no scale of the shown latents moves.
        white = torch.linalg.solve_triangular(own, flat, upper=False)
        white = torch.linalg.solve_triangular(whole, own.detach(), upper=False) @ white
        b, m, c, *spatial = latents.features.shape
        features = white.view(b, c, m, *spatial).transpose(1, 2)
        white_latents = replace(latents, features=features, log_variance=None)
        features, target = point_and_target(white_latents, anchor, detach)
        return 0.5 * mean_over_brain((features - target).square().mean(2), latents.brain)

    def _factor(self, latents: LevelLatents, slots: Presence) -> Tensor:
        """Return the Cholesky factor of S_T + εI over some slots."""
        covariance = pooled_covariance(latents.features, slots, latents.brain, latents.sums)
        ridge = self.epsilon * covariance.diagonal().mean() + SMALLEST_VARIANCE
        unit = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        # Without the check for a positive definite matrix, which would wait for the device.
        factor: Tensor = torch.linalg.cholesky_ex(covariance + ridge * unit).L
        return factor
