r"""Distances between points: ``mse``, ``nmse``, ``smooth_l1`` and ``cosine``.

All of them collapse by construction. They are smallest where the latents hold nothing but what all
sequences agree on most easily, and that needs no patient: the brain mask and the position in the
patch. Dividing by the variance does not prevent it, because a ratio of traces is met by putting
all variance into one such direction. They stay for comparison; see ``case_nce`` and ``whitened``.

Sources: docs/method/alignment.md; Liu et al., Mind the Gap (arXiv 2409.19366).
"""

from __future__ import annotations

from dataclasses import replace

from torch.nn import functional as F

from pmixseg.describe import POSITIVE, Ranges
from pmixseg.losses.anchors import Anchor
from pmixseg.losses.distances.contract import (
    Detach,
    Distance,
    LevelLatents,
    PerSlot,
    point_and_target,
)
from pmixseg.losses.distances.moments import mean_over_brain, shared_moments, standardise, unit


class MSE(Distance):
    r"""Compute half the mean squared difference: ``mse``.

    .. math:: D(f, P) = \tfrac12 \operatorname{mean}\,(f - P)^2

    It is KL(N(f, I) ‖ N(P, I)) per element. With four modalities the mean over them makes it the
    Σ MSE / 8 of the authors' public snippet. It collapses by construction: shrinking all latents
    meets it.
    """

    name = "mse"

    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """Return the distance per sample and modality, ``[B, M]``."""
        features, target = point_and_target(latents, anchor, detach)
        return 0.5 * mean_over_brain((features - target).square().mean(2), latents.brain)


class NMSE(Distance):
    r"""Compute half the mean squared difference, relative to the latents' variance: ``nmse``.

    .. math:: D(f_m, P) = \frac{\tfrac12 \operatorname{mean}\,(f_m - P)^2}
                               {\operatorname{mean}_c \operatorname{Var}_c(f) + \varepsilon}

    The variance is taken over the batch, the brain voxels and all acquired latents together (and
    over all processes), and is not detached. The latents are divided by it before the anchor is
    formed and detached, so no gradient points along the scale of the shown latents, and those
    that are hidden receive none through the denominator. With a uniform mixture over complete
    samples it is half the share of the variance that lies between modalities, and never more
    than ½.

    It collapses by construction: it is a ratio of traces, smallest where all variance lies in the
    one direction in which sequences agree most easily (measured: rank 1.1 after 336 steps).
    With a normal anchor it only pushes means to 0.

    Args:
        epsilon: added to the variance.

    Source: docs/method/alignment.md (plain ``mse`` cut the variance from 0.42 to 0.12 there).
    """

    name = "nmse"

    def __init__(self, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """Return the distance per sample and modality, ``[B, M]``."""
        variance = shared_moments(latents, self.epsilon).variance
        scaled = replace(latents, features=latents.features * variance.mean().rsqrt())
        features, target = point_and_target(scaled, anchor, detach)
        return 0.5 * mean_over_brain((features - target).square().mean(2), latents.brain)


class SmoothL1(Distance):
    r"""Compute Huber's loss between standardised latents and their anchor: ``smooth_l1``.

    .. math:: D = \operatorname{mean} h(\hat f - \hat P), \qquad
              h(x) = \begin{cases} x^2 / 2β & |x| < β \\ |x| - β/2 & \text{else} \end{cases}

    It collapses by construction, like ``nmse``: normalising each channel does not help.

    Args:
        beta: β, in standard deviations.
        epsilon: added to the variance in :func:`standardise`.
    """

    name = "smooth_l1"

    ranges = Ranges(beta=POSITIVE)

    def __init__(self, beta: float = 1.0, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.beta, self.epsilon = beta, epsilon

    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """Return the distance per sample and modality, ``[B, M]``."""
        features, target = point_and_target(standardise(latents, self.epsilon), anchor, detach)
        target = target.expand_as(features)
        loss = F.smooth_l1_loss(features, target, reduction="none", beta=self.beta)
        return mean_over_brain(loss.mean(2), latents.brain)


class Cosine(Distance):
    r"""Measure the angle between standardised latents and their anchor: ``cosine``.

    .. math:: D = \operatorname{mean}_v \tfrac12 \left\|
                  \frac{\hat f_v}{\sqrt{\|\hat f_v\|^2 + \varepsilon}} -
                  \frac{\hat P_v}{\sqrt{\|\hat P_v\|^2 + \varepsilon}} \right\|^2

    which is the mean of 1 - cos wherever vectors are longer than √ε, and 0 where f = P even if
    both vanish. It collapses by construction: one direction for all voxels meets it.

    Args:
        epsilon: as above, and added to the variance in :func:`standardise`.
    """

    name = "cosine"
    compares_directions = True

    def __init__(self, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """Return the distance per sample and modality, ``[B, M]``."""
        features, target = point_and_target(standardise(latents, self.epsilon), anchor, detach)
        difference = unit(features, self.epsilon) - unit(target, self.epsilon)
        return 0.5 * mean_over_brain(difference.square().sum(2), latents.brain)
