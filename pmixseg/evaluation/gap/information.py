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

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MultivariateNormal

Covariance = Float[Tensor, "k k"]


def total_correlation(covariance: Covariance, sizes: Sequence[int]) -> float:
    r"""Compute a Gaussian vector's total correlation between blocks of these sizes, in this order.

    .. math:: TC = KL\bigl(q(Z) \| \textstyle\prod_m q(z_m)\bigr)
                 = \tfrac12 \Bigl( \sum_m \log\det \Sigma_{mm} - \log\det \Sigma \Bigr)

    Example:
        >>> round(total_correlation(torch.tensor([[1.0, 0.6], [0.6, 1.0]]), [1, 1]), 6)
        0.223144
    """
    whole = covariance.double()
    places = [slice(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]
    blocks = [whole[own, own].logdet() for own in places]
    return (0.5 * (torch.stack(blocks).sum() - whole.logdet())).item()


def jensen_shannon(
    means: Float[Tensor, "m k"],
    covariances: Float[Tensor, "m k k"],
    weights: Sequence[float] | None = None,
    samples: int = 4096,
) -> float:
    r"""Estimate the Jensen-Shannon divergence of M Gaussians by Monte Carlo.

    .. math:: JSD_w = \sum_m w_m KL\bigl(q_m \| \textstyle\sum_j w_j q_j\bigr)
              \in \bigl[0,\; \textstyle -\sum_m w_m \log w_m\bigr]

    Every Gaussian is sampled equally often; the standard error falls with the root of ``samples``.
    """
    shares = [1 / len(means)] * len(means) if weights is None else list(weights)
    w = torch.tensor(shares, dtype=torch.float64)
    gaussians = MultivariateNormal(means.double(), covariances.double(), validate_args=False)
    shape = (len(means), samples, means.shape[1])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = gaussians.loc[:, None] + noise @ gaussians.scale_tril.mT
    densities = gaussians.log_prob(drawn[:, :, None])  # type: ignore[no-untyped-call]  # in torch
    own = densities.diagonal(dim1=0, dim2=2)  # [samples, M]: each at its own samples
    mixed = (densities + w.log()).logsumexp(2).T
    return float(((own - mixed).mean(0) * w).sum())
