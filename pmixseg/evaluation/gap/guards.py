r"""Check that aligned latents still carry information: rank, whitened gap, decodability.

A small gap is worth nothing where the latents have collapsed onto what all sequences agree on.
The rank within a modality does not count the gap itself as rank; the whitened gap does not shrink
when variance moves into one direction; and decodability asks for the tumour.

Sources: docs/method/theory.md; Roy & Vetterli (EUSIPCO 2007) for the effective rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Vectors = Float[Tensor, "n m c"]

RANK_SHARE = 0.5
"""A rank within a modality below this share of the reference's is a collapse."""

DECODABILITY_SHARE = 0.8
"""The same of decodability."""

FEWEST_CASES = 5
"""With fewer cases decodability, which leaves out one at a time, says too little to judge by: two
trainings of one network, with three cases, gave 0.05 and 0.16."""

LEAST_DECODABILITY = 0.05
"""A reference that decodes less than this has nothing to lose."""

WHITENING_RIDGE = 1e-3
"""Added to every variance before whitening, relative to their mean."""

REGRESSION_RIDGE = 1e-2
"""Weight of the squared coefficients, of standardised channels, per voxel of the fit."""


def effective_rank(covariance: Float[Tensor, "c c"]) -> float:
    r"""Return exp of the entropy of the normalised eigenvalues; 0 for a zero matrix.

    Example:
        >>> round(effective_rank(torch.eye(5)), 6)
        5.0
    """
    values = torch.linalg.eigvalsh(covariance.double()).clamp_min(0)
    if values.sum() == 0:
        return 0.0
    shares = values / values.sum()
    return float((-torch.special.xlogy(shares, shares).sum()).exp())


def rank_within(vectors: Vectors) -> float:
    """Return the mean over modalities of the effective rank of a modality's own covariance."""
    ranks = [
        effective_rank(torch.cov(own.T, correction=0).reshape(own.shape[1], -1))
        for own in vectors.double().unbind(1)
    ]
    return sum(ranks) / len(ranks)


def whitened_gap(vectors: Vectors, targets: Float[Tensor, "n c"]) -> float:
    r"""Return the gap in units of all covariance, :math:`\operatorname{tr}(S_T^{-1} S_W) / C`.

    :math:`S_W` is the mean of :math:`(f_m - P)(f_m - P)^T`, :math:`S_T` the covariance of all
    latents together. No invertible linear map of the channels changes it (but for the ridge).
    Constant latents give 0.
    """
    vectors, targets = vectors.double(), targets.double()
    channels = vectors.shape[2]
    total = torch.cov(vectors.flatten(0, 1).T, correction=0).reshape(channels, channels)
    variance = total.diagonal().mean()
    if variance <= 0:
        return 0.0
    apart = (vectors - targets[:, None]).flatten(0, 1)
    within = apart.T @ apart / len(apart)
    ridge = WHITENING_RIDGE * variance * torch.eye(channels, dtype=total.dtype)
    return float(torch.linalg.solve(total + ridge, within).trace() / channels)


def decodability(
    vectors: Vectors, regions: Float[Tensor, "n r"], cases: Int64[Tensor, " n"]
) -> Float[Tensor, " r"]:
    r"""Compute each region's cross-validated linear :math:`R^2` from one modality's latent.

    A ridge regression on standardised channels is fitted to the voxels of all cases but one and
    tested on that one, in turn; with a single case, to all but a fifth of its voxels. The mean over
    modalities is taken. The number of each voxel's case tells them apart, ``regions`` is the share
    of each region in the voxels. A result is at most 1, below 0 where the fit is worse than the
    mean, and NaN for a region that no voxel or every voxel belongs to.
    """
    regions = regions.double()
    several = len(set(cases.tolist())) > 1
    folds = cases if several else torch.arange(len(cases)) * 5 // len(cases)
    spread = (regions - regions.mean(0)).square().sum(0)
    shares = []
    for own in vectors.double().unbind(1):
        missed = torch.zeros_like(spread)
        for fold in sorted(set(folds.tolist())):
            held = folds == fold
            missed += _errors(own[~held], regions[~held], own[held], regions[held])
        shares.append(1 - missed / spread)
    mean: Tensor = torch.stack(shares).mean(0)
    return torch.where(spread > 0, mean, torch.nan)


def _errors(x: Tensor, y: Tensor, x_held: Tensor, y_held: Tensor) -> Tensor:
    """Return the summed squared errors on held-out voxels, per region."""
    centre, middle = x.mean(0), y.mean(0)
    scale = x.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    x, x_held = (x - centre) / scale, (x_held - centre) / scale
    ridge = REGRESSION_RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    slopes = torch.linalg.solve(x.T @ x + ridge, x.T @ (y - middle))
    predicted: Tensor = x_held @ slopes + middle
    return (y_held - predicted).square().sum(0)


def low_guards(
    values: Mapping[str, float], reference: Mapping[str, float], cases: int = FEWEST_CASES
) -> list[str]:
    """Return names of the guards of one level that are lost against a reference.

    Values are ``rank_within`` and, where labels are known, ``decodability``; the reference is the
    run without alignment, or from before it began. For the number of cases see
    :data:`FEWEST_CASES`.
    """
    low = []
    if values["rank_within"] < RANK_SHARE * reference.get("rank_within", 0.0):
        low.append("rank_within")
    before = reference.get("decodability", 0.0)
    after = values.get("decodability", float("nan"))
    lost = before > LEAST_DECODABILITY and after < DECODABILITY_SHARE * before
    if lost and cases >= FEWEST_CASES:
        low.append("decodability")
    return low
