r"""Dependence between modalities: a joint Gaussian anchor, and total correlation.

The papers' anchor is a product: :math:`\prod_m P(z_m)`. Against it, the joint code of a patient is
charged :math:`KL(q(Z) \| \prod_m P) = \sum_m KL(q(z_m) \| P) + TC(Z)` (identity 1 of
docs/method/theory.md), so modalities that show the same anatomy pay for agreeing. Leaving TC out,
as the papers do, takes them for independent. Here the anchor itself is a joint Gaussian in which
they depend.

A penalty on TC alone would be the opposite of a remedy: it drives sequences of one patient to
disagree. It is the special case ``correlation = 0`` of :class:`JointKL`.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pmixseg.describe import POSITIVE, Ranges
from pmixseg.errors import InputError
from pmixseg.losses.anchors import Anchor
from pmixseg.losses.distances.contract import Detach, Distance, LevelLatents, PerSlot, detached
from pmixseg.losses.ranks import sum_over_ranks
from pmixseg.types import Brain, Features, Presence

SMALLEST_VARIANCE = 1e-6
"""Added to every variance: constant latents have finite logarithms."""

SMALLEST_EIGENVALUE = 1e-2
"""Floor of the eigenvalues of a correlation matrix that is estimated."""


class JointKL(Distance):
    r"""Compute the KL divergence of all modalities together from a joint Gaussian: ``joint``.

    For every sample and channel, the brain voxels give a vector of modalities
    :math:`z = (f_{mv})_{m \in A}` with mean :math:`\mu` and full covariance :math:`\Sigma`. The
    anchor is

    .. math:: P = N(\mu_P 1, \; \sigma_P^2 R), \qquad R_{mm} = 1, \; R_{mj} = \rho

    with :math:`\mu_P, \sigma_P^2` the Gaussian form of any anchor over the channel moments (the
    moment-matched mixture, N(0, I), ...): every modality has the same marginal, and two of them
    the correlation ρ. The loss is the closed form of

    .. math:: \frac{1}{|A|} KL\bigl(N(\mu, \Sigma) \| P\bigr)

    averaged over channels. With ρ = 0 it is :math:`\frac{1}{|A|} (\sum_m KL(q_m \| P) + TC)`, the
    product anchor with the dependence charged, and if the modalities are independent it is the
    factorised loss. With ρ > 0 only dependence that differs from ρ is charged; towards ρ = 1
    modalities must agree voxel by voxel, which is what ``nmse`` asks. Latents that are normalised
    per sample make the marginals agree, and leave the correlations to be aligned.

    Args:
        correlation: ρ in [0, 1), or ``"matched"``: R is the mean correlation matrix of all samples
            and channels (of all processes), detached, so that each sample is pulled to the
            cohort's own dependence, whatever it is, and unequal pairs stay unequal.
        ridge: added to Σ, relative to the pooled variance of the channel: keeps modalities that
            coincide from an infinite divergence.

    Raises:
        InputError: a correlation or ridge out of range.

    Source: docs/method/theory.md; closed form in Cover & Thomas, Elements of Information Theory.
    """

    name = "joint"

    ranges = Ranges(ridge=POSITIVE)

    def __init__(self, correlation: float | Literal["matched"] = 0.5, ridge: float = 1e-2) -> None:
        super().__init__()
        known = correlation == "matched" if isinstance(correlation, str) else 0 <= correlation < 1
        if not known:
            raise InputError(
                f"JointKL: correlation {correlation!r} must be at least 0 and below 1, or "
                "'matched'; correct it."
            )
        self.correlation, self.ridge = correlation, ridge

    def check(self, anchor: Anchor) -> None:
        """Accept every anchor: each has a Gaussian form."""

    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """Return the divergence of each sample, which stands in all of its slots."""
        shown, subset = latents.shown, latents.subset
        features = latents.features
        if detach == "anchor":  # nor do hidden latents move through the ridge
            features = torch.where(shown[:, :, None, None, None, None], features, features.detach())
        mean, covariance = slot_moments(features, subset, self.ridge, latents.brain)
        slots = mean.shape[1]
        variance = covariance.diagonal(dim1=-2, dim2=-1)  # [B, C, M]
        mean_p, log_variance_p = anchor.gaussian(
            mean[..., None, None, None],
            variance.mT[..., None, None, None].log(),
            subset,
            latents.level,
            detach_weights=True,
        )
        mean_p, variance_p = mean_p.flatten(1), log_variance_p.flatten(1).exp()  # [B, C]
        relation = self._correlations(covariance, subset)
        mean, mean_p = detached(mean, mean_p, detach)
        covariance, variance_p = detached(covariance, variance_p, detach)
        # Slots outside A become independent standard normals on both sides, and cancel.
        pairs = (shown[:, :, None] & shown[:, None, :])[:, None]
        unit = torch.eye(slots, dtype=mean.dtype, device=mean.device)
        q = torch.where(pairs, covariance, unit)
        p = torch.where(pairs, variance_p[..., None, None] * relation, unit)
        shift = torch.where(shown[:, None], mean.mT - mean_p[..., None], 0.0)
        divergence = gaussian_divergences(shift, q, p).mean(1)
        count = shown.sum(1).clamp_min(1)
        return (divergence / count)[:, None].expand(-1, slots)

    def _correlations(self, covariance: Tensor, subset: Presence) -> Tensor:
        """Return R, ``[M, M]``."""
        slots = covariance.shape[-1]
        unit = torch.eye(slots, dtype=covariance.dtype, device=covariance.device)
        if not isinstance(self.correlation, str):
            return unit + self.correlation * (1 - unit)
        fixed = covariance.detach()
        scale = fixed.diagonal(dim1=-2, dim2=-1).rsqrt()
        each = (fixed * scale[..., None] * scale[..., None, :]).mean(1)
        both = (subset[:, :, None] & subset[:, None, :]).to(each)
        totals = sum_over_ranks(torch.stack([(each * both).sum(0), both.sum(0)]))
        matched = totals[0] / totals[1].clamp_min(1)
        # Pairs are averaged over different samples where some are missing, so the matrix need
        # not be one of correlations; the nearest one with a floor is taken.
        values, vectors = torch.linalg.eigh(torch.where(unit > 0, unit, matched))
        floored: Tensor = (vectors * values.clamp_min(SMALLEST_EIGENVALUE)) @ vectors.mT
        length = floored.diagonal().rsqrt()
        return floored * length[:, None] * length[None, :]


def slot_moments(
    features: Features, subset: Presence, ridge: float, brain: Brain
) -> tuple[Float[Tensor, "b m c"], Float[Tensor, "b c m m"]]:
    """Compute means over brain voxels, and covariances between modalities, per sample and channel.

    For ``ridge`` see :class:`JointKL`. Means are ``[B, M, C]``, covariances ``[B, C, M, M]`` and
    positive definite; slots outside the subset have mean 0 and variance :data:`SMALLEST_VARIANCE`
    and more.
    """
    flat = features.flatten(3)
    inside = brain.flatten(1).to(flat)
    share = (inside / inside.sum(1, keepdim=True).clamp_min(1))[:, None, None]  # [B, 1, 1, N]
    mean = (flat * share).sum(3)
    centred = (flat - mean[..., None]).transpose(1, 2)  # [B, C, M, N]
    covariance = (centred * share) @ centred.mT
    # Pooled variance over modalities and voxels, differences of the means included.
    flags = subset.to(mean)[:, :, None]
    count = flags.sum(1).clamp_min(1)
    centre = (flags * mean).sum(1) / count
    within = covariance.diagonal(dim1=-2, dim2=-1).mT
    spread = (flags * (within + (mean - centre[:, None]).square())).sum(1) / count
    floor = ridge * spread + SMALLEST_VARIANCE
    unit = torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device)
    return mean, covariance + floor[..., None, None] * unit


def gaussian_divergences(
    shift: Float[Tensor, "... m"], covariance: Float[Tensor, "... m m"], anchor: Tensor
) -> Tensor:
    r"""Compute KL(N(μ, Σ) ‖ N(μ_P, Σ_P)) of many Gaussians, differentiably.

    .. math:: \tfrac12 \bigl(\operatorname{tr} \Sigma_P^{-1} \Sigma
              + \delta^T \Sigma_P^{-1} \delta - k
              + \log\det \Sigma_P - \log\det \Sigma\bigr), \qquad \delta = \mu - \mu_P

    ``shift`` is δ; Σ and Σ_P, the anchor's, are positive definite. Nats come without the last axes.
    """
    # Without the check for a positive definite matrix, which would wait for the device.
    q, p = torch.linalg.cholesky_ex(covariance).L, torch.linalg.cholesky_ex(anchor).L
    both = torch.cat([q, shift[..., None]], -1)
    solved = torch.linalg.solve_triangular(p, both, upper=False)
    logs = p.diagonal(dim1=-2, dim2=-1).log() - q.diagonal(dim1=-2, dim2=-1).log()
    # tr(P⁻¹Σ) = |L_P⁻¹ L_Σ|², and δᵀP⁻¹δ is the last column's square.
    value: Tensor = 0.5 * (solved.square().sum((-2, -1)) - shift.shape[-1]) + logs.sum(-1)
    return value
