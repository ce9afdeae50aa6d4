r"""Distances that treat latents as Gaussians: ``kl`` and ``vid``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmixseg.errors import InputError
from pmixseg.gaussians import gaussian_kl
from pmixseg.losses.anchors import Anchor, NormalAnchor
from pmixseg.losses.distances.contract import Detach, Distance, LevelLatents, PerSlot, detached
from pmixseg.losses.distances.moments import mean_over_brain, standardise
from pmixseg.losses.projections import SlotLinear

LOG_VARIANCE_LIMIT = 6.0
"""Log-variances stay within ± this: variances between 1/403 and 403."""

VARIANCE_FLOOR = 1e-2
"""Smallest learnable variance of variational information terms: without it they are unbounded."""


def floored_variance(raw: Tensor) -> Tensor:
    """Compute ``softplus(raw) + 0.01``."""
    return F.softplus(raw) + VARIANCE_FLOOR


def raw_of_unit_variance() -> float:
    """Return the argument for which :func:`floored_variance` is 1."""
    return float(torch.tensor(1.0 - VARIANCE_FLOOR, dtype=torch.float64).expm1().log())


class KL(Distance):
    r"""Compute the KL divergence of Gaussian latents from a Gaussian anchor: ``kl``.

    1x1x1 heads, one per modality and level, give :math:`\mu_m` and :math:`\log \sigma_m^2`
    (within ±6, by a scaled tanh) for every voxel and channel. The anchor is
    :meth:`~pmixseg.losses.anchors.Anchor.gaussian`: the moment-matched mixture, the product, or
    N(0, I). The mean is taken over channels and voxels.

    The heads start as μ = f, σ² = 1. They are trained by this loss, which a constant μ or a large
    σ would satisfy without the latents moving; sampling the decoded latents
    (:meth:`~pmixseg.losses.alignment.AlignmentLoss.sample`) is what makes σ cost something.

    Args:
        heads: build heads. If not, the encoder itself must be variational: μ is its latent and
            log σ² its ``log_variance``.
    """

    name = "kl"

    def __init__(self, heads: bool = True) -> None:
        super().__init__()
        self.with_heads = heads
        self.means = nn.ModuleDict()
        self.log_variances = nn.ModuleDict()

    def bind(
        self, channels: Sequence[int], modalities: Sequence[str], levels: Sequence[int]
    ) -> None:
        """Create the heads."""
        for level in levels if self.with_heads else ():
            width, slots = channels[level], len(modalities)
            self.means[str(level)] = SlotLinear(slots, width, width, bias=True, identity=True)
            head = SlotLinear(slots, width, width, bias=True)
            nn.init.zeros_(head.weight)
            self.log_variances[str(level)] = head

    def check(self, anchor: Anchor) -> None:
        """Accept every anchor: each has a Gaussian form."""

    def moments(self, latents: LevelLatents) -> tuple[Tensor, Tensor]:
        """Return the mean and log-variance of every slot, ``[B, M, C, D, H, W]`` each.

        Raises:
            InputError: no heads, and the encoder is not variational.
        """
        if self.with_heads:
            mean = self.means[str(latents.level)](latents.features)
            raw = self.log_variances[str(latents.level)](latents.features)
            return mean, LOG_VARIANCE_LIMIT * (raw / LOG_VARIANCE_LIMIT).tanh()
        if latents.log_variance is None:
            raise InputError(
                "the distance 'kl' was made without heads, but the backbone's encoders give no "
                "log-variance; use heads (KL(heads=True))."
            )
        return latents.features, latents.log_variance.clamp(-LOG_VARIANCE_LIMIT, LOG_VARIANCE_LIMIT)

    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """Return the distance per sample and modality, ``[B, M]``."""
        mean, log_variance = self.moments(latents)
        mean_p, log_variance_p = anchor.gaussian(
            mean, log_variance, latents.subset, latents.level, detach_weights=True
        )
        mean, mean_p = detached(mean, mean_p, detach)
        log_variance, log_variance_p = detached(log_variance, log_variance_p, detach)
        divergence = gaussian_kl(mean, log_variance, mean_p[:, None], log_variance_p[:, None])
        return mean_over_brain(divergence.mean(2), latents.brain)


class VID(Distance):
    r"""Score latents under one learnable Gaussian that all modalities share: ``vid``.

    .. math:: D(f) = \tfrac12 \operatorname{mean} \left(
              \frac{(\hat f - \mu)^2}{\sigma^2} + \log \sigma^2 \right), \qquad
              \sigma^2 = \operatorname{softplus}(\cdot) + 10^{-2}

    with μ and σ² per channel and level. This is the repaired form of the authors' normal-anchor
    snippet of April 2025, so the anchor must be
    :class:`~pmixseg.losses.anchors.NormalAnchor`, whose place the learnable Gaussian takes.

    Note: f̂ has mean 0 and variance 1 per channel over the batch. So where every acquired latent
    counts equally, the sum is ½ Σ_c ((1 + μ²)/σ² + log σ²) *whatever the latents are*, and gives
    them no gradient. It acts only on samples that are shown less than was acquired. Without
    standardisation it acts always, and can be met by shrinking the latents down to σ² = 10⁻².

    Args:
        standardised: use f̂ (the default) or f itself.
        epsilon: added to the variance when standardising.

    Source: Ahn et al., VID (CVPR 2019); docs/method/alignment.md.
    """

    name = "vid"

    def __init__(self, standardised: bool = True, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.standardised, self.epsilon = standardised, epsilon
        self.means = nn.ParameterDict()
        self.raw_variances = nn.ParameterDict()

    def bind(
        self, channels: Sequence[int], modalities: Sequence[str], levels: Sequence[int]
    ) -> None:
        """Create μ = 0 and σ² = 1."""
        for level in levels:
            self.means[str(level)] = nn.Parameter(torch.zeros(channels[level]))
            raw = torch.full((channels[level],), raw_of_unit_variance())
            self.raw_variances[str(level)] = nn.Parameter(raw)

    def check(self, anchor: Anchor) -> None:
        """Refuse every anchor but a normal one, which alone would not be ignored."""
        if not isinstance(anchor, NormalAnchor):
            raise InputError(
                "the distance 'vid' learns its own Gaussian and would ignore "
                f"{type(anchor).__name__}; use NormalAnchor with it, or another distance."
            )

    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """Return the distance per sample and modality; μ and σ² learn whatever is detached."""
        if self.standardised:
            latents = standardise(latents, self.epsilon)
        features = latents.features.detach() if detach == "features" else latents.features
        shape = (-1, 1, 1, 1)
        mean = self.means[str(latents.level)].to(features.dtype)
        variance = floored_variance(self.raw_variances[str(latents.level)].to(features.dtype))
        squared = (features - mean.view(shape)).square() / variance.view(shape)
        return 0.5 * (mean_over_brain(squared.mean(2), latents.brain) + variance.log().mean())
