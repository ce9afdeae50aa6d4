"""The divergence of two Gaussians with independent elements."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_kl(
    mean: Tensor, log_variance: Tensor, mean_p: Tensor, log_variance_p: Tensor
) -> Tensor:
    r"""Compute KL(N(μ, σ²) ‖ N(μ_P, σ_P²)) for every element.

    .. math:: \tfrac12 \left( \log \frac{\sigma_P^2}{\sigma^2}
              + \frac{\sigma^2 + (\mu - \mu_P)^2}{\sigma_P^2} - 1 \right)

    All four broadcast.

    Example:
        >>> zero = torch.zeros(1)
        >>> gaussian_kl(torch.ones(1), zero, zero, zero)
        tensor([0.5000])
    """
    ratio = log_variance - log_variance_p
    # expm1(r) - r instead of exp(r) - 1 - r: exact where the Gaussians nearly agree.
    return 0.5 * (torch.expm1(ratio) - ratio + (mean - mean_p).square() * (-log_variance_p).exp())
