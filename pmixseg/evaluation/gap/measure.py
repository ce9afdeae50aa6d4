r"""Measure the gap between modalities in latent space, in ten numbers.

Voxel vectors are collected over cases with :func:`voxel_vectors`, joined, and measured together
with :func:`measure_gap`. Everything is computed in float64 on the CPU.

Source: docs/method/theory.md. Centroid distance: Liang et al. (NeurIPS 2022). Linear
CKA: Kornblith et al. (ICML 2019).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pmixseg.evaluation.gap.guards import rank_within, whitened_gap
from pmixseg.evaluation.gap.information import jensen_shannon, total_correlation
from pmixseg.gaussians import gaussian_kl
from pmixseg.types import Features

Vectors = Float[Tensor, "n m c"]
Targets = Float[Tensor, "n c"]

PRINCIPAL_CHANNELS = 8
"""Channels that Gaussians are fitted to: at 64 channels the estimates are mostly bias."""

SHUFFLES = 4
"""Draws of shuffled voxels, without dependence; their mean total correlation is subtracted."""


@dataclass(frozen=True)
class Gap:
    r"""How far apart the modalities' latents are at one level.

    Args:
        numerator: :math:`\operatorname{mean}_m \operatorname{mean} (f_m - P)^2`.
        variance: mean over channels of the variance over voxels and modalities together.
        rank_within: :func:`~pmixseg.evaluation.gap.guards.rank_within`, between 1 and the number of
            channels; 0 for constant latents.
        ratio: numerator / variance: the gap. 0 for constant latents; collapse makes it small.
        whitened: :func:`~pmixseg.evaluation.gap.guards.whitened_gap`, which collapse does not.
        centroid_distance: mean over pairs of modalities of the distance of their mean vectors,
            in units of the root of the summed channel variances.
        cka: mean over pairs of the linear centred kernel alignment, 0 to 1.
        jensen_shannon: of Gaussians fitted to each modality in the first
            :data:`PRINCIPAL_CHANNELS` principal channels, nats, at most log M.
        total_correlation: dependence between modalities in the same channels, nats, minus that of
            voxels shuffled independently.
        moment_kl: mean KL of Gaussians with a modality's channel moments to their moment-matched
            mixture, nats per channel. A diagnostic only: after instance normalisation it is
            close to 0 whatever the gap.
    """

    numerator: float
    variance: float
    rank_within: float
    ratio: float
    whitened: float
    centroid_distance: float
    cka: float
    jensen_shannon: float
    total_correlation: float
    moment_kl: float

    def to_dict(self) -> dict[str, float]:
        """Name -> number, for logs and records."""
        return asdict(self)


def voxel_vectors(
    features: Features,
    anchor: Float[Tensor, "b c d h w"],
    mask: Bool[Tensor, "b d h w"] | None = None,
    points: int = 1024,
    seed: int = 0,
) -> tuple[Vectors, Targets]:
    """Draw latents and anchor at voxels, without replacement.

    ``features`` are those of one level with all slots encoded, ``anchor`` is P at that level. Of
    the voxels in ``mask`` (the brain; all if not given) at most ``points`` are drawn. The results
    ``[n, M, C]`` and ``[n, C]`` are float64 on the CPU.
    """
    vectors = features.detach().movedim((1, 2), (-2, -1)).flatten(0, 3)
    targets = anchor.detach().movedim(1, -1).flatten(0, 3)
    inside = torch.arange(len(vectors)) if mask is None else mask.flatten().nonzero()[:, 0].cpu()
    order = torch.randperm(len(inside), generator=torch.Generator().manual_seed(seed))
    chosen = inside[order[:points]].to(vectors.device)
    return vectors[chosen].double().cpu(), targets[chosen].double().cpu()


def measure_gap(vectors: Vectors, targets: Targets) -> Gap:
    """Return all numbers of :class:`Gap`.

    Targets are the anchor at the same n voxels.

    Raises:
        ValueError: fewer than two voxels.
    """
    if len(vectors) < 2:
        raise ValueError(f"the gap needs two voxels or more, {len(vectors)} were given.")
    vectors, targets = vectors.double().cpu(), targets.double().cpu()
    # The gap, and the spread of all latents together that it is measured by.
    numerator = (vectors - targets[:, None]).square().mean().item()
    pooled = vectors.flatten(0, 1)
    centred = pooled - pooled.mean(0)
    covariance = centred.T @ centred / len(pooled)
    spread = covariance.diagonal()
    variance = spread.mean().item()
    varies = variance > 0
    principal = _principal(vectors, covariance) if varies else vectors[..., :1] * 0
    return Gap(
        numerator=numerator,
        variance=variance,
        rank_within=rank_within(vectors),
        ratio=numerator / variance if varies else 0.0,
        whitened=whitened_gap(vectors, targets),
        centroid_distance=_centroids(vectors) / spread.sum().sqrt().item() if varies else 0.0,
        cka=_mean_over_pairs(vectors),
        jensen_shannon=_fitted_divergence(principal) if varies else 0.0,
        total_correlation=corrected_total_correlation(principal) if varies else 0.0,
        moment_kl=moment_kl(vectors),
    )


def linear_cka(x: Float[Tensor, "n c"], y: Float[Tensor, "n d"]) -> float:
    r"""Compute the linear centred kernel alignment of paired vectors.

    .. math:: \frac{\|X^T Y\|_F^2}{\|X^T X\|_F \|Y^T Y\|_F}

    with centred X and Y: 1 if they agree up to rotation and scale; 0 if one is constant.
    """
    x, y = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return ((x.T @ y).square().sum() / scale).item() if scale > 0 else 0.0


def corrected_total_correlation(vectors: Vectors) -> float:
    """Compute the Gaussian total correlation between modalities, minus that of shuffled voxels.

    The plain estimate is far above 0 for independent modalities (13.6 nats with 64 channels and
    1024 voxels); the mean over shuffles, which breaks every dependence, is subtracted.
    """
    count, modalities, channels = vectors.shape
    generator = torch.Generator().manual_seed(0)

    def plain(vectors: Tensor) -> float:
        covariance = _covariance(vectors.flatten(1))
        return total_correlation(covariance, [channels] * modalities)

    baseline = 0.0
    for _ in range(SHUFFLES):
        orders = [torch.randperm(count, generator=generator) for _ in range(modalities)]
        shuffled = torch.stack([vectors[o, m] for m, o in enumerate(orders)], 1)
        baseline += plain(shuffled) / SHUFFLES
    return plain(vectors) - baseline


def moment_kl(vectors: Vectors) -> float:
    """Return a divergence of moments per channel, which normalisation makes blind to the gap."""
    variance, mean = torch.var_mean(vectors.double(), 0, correction=0)
    variance = variance.clamp_min(1e-12)
    mean_p = mean.mean(0)
    variance_p = (variance + (mean - mean_p).square()).mean(0)
    return gaussian_kl(mean, variance.log(), mean_p, variance_p.log()).mean().item()


def _covariance(vectors: Tensor) -> Tensor:
    """Return the covariance of rows, made safely invertible."""
    covariance = torch.cov(vectors.T, correction=0).reshape(vectors.shape[1], vectors.shape[1])
    ridge = 1e-9 * covariance.diagonal().mean() + 1e-30
    return covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype)


def _principal(vectors: Vectors, covariance: Tensor) -> Vectors:
    """Project vectors on the principal channels of all modalities together that vary at all."""
    values, directions = torch.linalg.eigh(covariance)
    kept = directions[:, values > 1e-9 * values[-1]][:, -PRINCIPAL_CHANNELS:]
    principal: Tensor = vectors @ kept
    return principal


def _fitted_divergence(vectors: Vectors) -> float:
    means = vectors.mean(0)
    # A modality that is constant in these channels would have no density; a thousandth of the
    # pooled standard deviation is far below what matters.
    floor = 1e-6 * vectors.flatten(0, 1).var(0, correction=0).diag()
    covariances = torch.stack([_covariance(v) + floor for v in vectors.unbind(1)])
    return max(0.0, jensen_shannon(means, covariances))


def _centroids(vectors: Vectors) -> float:
    pairs = list(combinations(vectors.mean(0), 2))
    return sum(float((a - b).norm()) for a, b in pairs) / max(len(pairs), 1)


def _mean_over_pairs(vectors: Vectors) -> float:
    pairs = list(combinations(vectors.unbind(1), 2))
    return sum(linear_cka(x, y) for x, y in pairs) / len(pairs) if pairs else 1.0
