r"""Quantities of information theory that bound what alignment can do.

1. **Chain rule.** :math:`KL(q(Z) \| \prod_m P) = \sum_m KL(q(z_m) \| P) + TC(Z)`. The evidence
   bound written with individual alignments is tighter than the joint one by the total correlation
   TC. It is a *valid* bound only if q factorises over modalities, and then TC given the images
   is 0.
2. **Compensation.** :math:`\sum_m w_m KL(q_m \| P) = KL(\sum_m w_m q_m \| P) + JSD_w(q_1..q_M)`.
   Aligning only the mixture can reach 0 while the gap, the Jensen-Shannon divergence, stays;
   aligning each drives both to 0. And :math:`P = \sum w_m q_m` makes the left side smallest.

A mixture of *features* is not a sample of the mixture *density*: the second identity carries over
to the losses of this package through their squared-error form only.

All divergences are in nats. Functions compute in float64.

Source: docs/method/theory.md; Cover & Thomas, Elements of Information Theory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Covariance = Float[Tensor, "k k"]


def total_correlation(covariance: Covariance, sizes: Sequence[int]) -> float:
    r"""Total correlation of the blocks of a Gaussian vector.

    .. math:: TC = KL\bigl(q(Z) \| \textstyle\prod_m q(z_m)\bigr)
                 = \tfrac12 \Bigl( \sum_m \log\det \Sigma_{mm} - \log\det \Sigma \Bigr)

    Args:
        covariance: of the joined vector.
        sizes: dimensions of the blocks, in order.

    Example:
        >>> round(total_correlation(torch.tensor([[1.0, 0.6], [0.6, 1.0]]), [1, 1]), 6)
        0.223144
    """
    whole = covariance.double()
    blocks = [whole[s, s].logdet() for s in _slices(sizes)]
    return (0.5 * (torch.stack(blocks).sum() - whole.logdet())).item()


def jensen_shannon(
    means: Float[Tensor, "m k"],
    covariances: Float[Tensor, "m k k"],
    weights: Sequence[float] | None = None,
    samples: int = 4096,
    seed: int = 0,
) -> float:
    r"""Jensen-Shannon divergence of M Gaussians, by Monte Carlo.

    .. math:: JSD_w = \sum_m w_m KL\bigl(q_m \| \textstyle\sum_j w_j q_j\bigr)
              \in \bigl[0,\; \textstyle -\sum_m w_m \log w_m\bigr]

    Args:
        means: one per Gaussian.
        covariances: one per Gaussian.
        weights: w, summing to 1; equal if not given.
        samples: drawn from each Gaussian; the standard error falls with its root.
        seed: of the samples.
    """
    count = len(means)
    w = _weights(weights, count)
    densities = _log_densities(_draw(means, covariances, samples, seed), means, covariances)
    own = densities.diagonal(dim1=0, dim2=2)  # [samples, M]: each at its own samples
    mixed = (densities + w.log()).logsumexp(2).T
    return float(((own - mixed).mean(0) * w).sum())


def _weights(weights: Sequence[float] | None, count: int) -> Tensor:
    shares = [1 / count] * count if weights is None else list(weights)
    return torch.tensor(shares, dtype=torch.float64)


def _slices(sizes: Sequence[int]) -> list[slice]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _draw(means: Tensor, covariances: Tensor, samples: int, seed: int) -> Tensor:
    """Samples of every Gaussian, ``[M, samples, k]``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(means), samples, means.shape[1])
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    factors: Tensor = torch.linalg.cholesky(covariances.double())
    return means.double()[:, None] + noise @ factors.mT


def _log_densities(points: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """Log-density of every Gaussian at points ``[..., k]``, ``[..., M]``."""
    factors = torch.linalg.cholesky(covariances.double())
    values = []
    for mean, factor in zip(means.double(), factors, strict=True):
        shifted = (points - mean)[..., None]
        whitened = torch.linalg.solve_triangular(factor, shifted, upper=False)[..., 0]
        constant = factor.diagonal().log().sum() + 0.5 * len(mean) * math.log(2 * math.pi)
        values.append(-0.5 * whitened.square().sum(-1) - constant)
    return torch.stack(values, -1)
