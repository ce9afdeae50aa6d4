r"""Means, variances and covariances over brain voxels, and latents divided by them.

The *value* of a statistic is taken over all slots of S, the acquired latents; its *gradient* is
that of the shown ones (A) alone. So a latent that the network was not shown is never moved
through a denominator, and as the gradient is that of a statistic of A with the same homogeneity,
none points along the scale of the latents that are shown: a loss on standardised latents cannot be
met by shrinking or blowing them up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pmixseg.losses.distances.contract import LevelLatents
from pmixseg.losses.ranks import SharedSums
from pmixseg.types import Brain, Features, Presence


def mean_over_brain(values: Float[Tensor, "b m d h w"], brain: Brain) -> Float[Tensor, "b m"]:
    """Return the mean over the brain voxels of every sample; 0 where it has none."""
    total = torch.where(brain[:, None], values, 0.0).sum((2, 3, 4))
    return total / brain.sum((1, 2, 3)).clamp_min(1)[:, None]


def pooled_moments(
    features: Features, subset: Presence, brain: Brain, sums: SharedSums
) -> tuple[Tensor, Tensor]:
    """Compute mean and population variance ``[C]``, over samples, modalities and voxels.

    Gradients flow through both. They are 0 where nothing counts. Features are finite in every slot;
    ``sums`` go over all processes.
    """
    flat = features.flatten(3)
    inside = brain.flatten(1).to(flat)
    voxels = inside.sum(1)
    share = (inside / voxels.clamp_min(1)[:, None])[:, None, :, None]  # [B, 1, V, 1]
    # Per slot first, then between slots: no difference of large sums.
    mean = (flat @ share)[..., 0]
    within = ((flat - mean.detach()[..., None]).square() @ share)[..., 0]
    counts = (subset * voxels[:, None])[:, :, None]
    totals = sums.add(torch.cat([counts.sum().view(1), (counts * mean).sum((0, 1))]))
    number = totals[0].detach().clamp_min(1)
    centre = totals[1:] / number
    # A sum of squares is least at the mean, so no gradient is lost by holding it still; that
    # between the slots' means carries theirs.
    apart = (mean - centre.detach()).square()
    spread = sums.add((counts * (within + apart)).sum((0, 1)))
    return centre, spread / number


@dataclass(frozen=True)
class SharedMoments:
    """Moments of the channels over the brain of the whole batch, ``[C]`` each.

    Args:
        centre: mean over S; no gradient.
        shown_centre: mean over A.
        variance: over S, plus ε; in gradient that of A.
    """

    centre: Tensor
    shown_centre: Tensor
    variance: Tensor


def shared_moments(latents: LevelLatents, epsilon: float) -> SharedMoments:
    """Take moments of S in value, of A in gradient; see the head of this file."""
    features, brain = latents.features, latents.brain
    with torch.no_grad():
        centre, variance = pooled_moments(features, latents.subset, brain, latents.sums)
    own_centre, own_variance = pooled_moments(features, latents.shown, brain, latents.sums)
    variance = variance + epsilon
    # Relative changes are those of A's variance; where it is 0, there is nothing to change.
    still = own_variance.detach() + epsilon
    slope = torch.where(still > 0, variance / still.clamp_min(torch.finfo(still.dtype).tiny), 0.0)
    variance = variance + slope * (own_variance - own_variance.detach())
    return SharedMoments(centre, own_centre, variance)


def standardise(latents: LevelLatents, epsilon: float) -> LevelLatents:
    """Return latents with mean 0 and variance 1 per channel, over the brain of the batch.

    The statistics are shared by all modalities: a scale of its own for each would hide the very
    gap that is to be closed.
    """
    moments = shared_moments(latents, epsilon)
    shape = (1, 1, -1, 1, 1, 1)
    scale = moments.variance.rsqrt()
    # Around A's mean, then moved to that of S: neither scale nor shift of A has a gradient.
    offset = ((moments.shown_centre - moments.centre) * scale).detach()
    apart = latents.features - moments.shown_centre.view(shape)
    features = apart * scale.view(shape) + offset.view(shape)
    return replace(latents, features=features, log_variance=None)


def pooled_covariance(
    features: Features, slots: Presence, brain: Brain, sums: SharedSums, within: bool = False
) -> Float[Tensor, "c c"]:
    """Compute the population covariance of channels over samples, modalities and brain voxels.

    It is positive semidefinite, and 0 where nothing counts. ``within`` takes it around the mean of
    each modality, instead of the mean of all. Features are finite in every slot; ``sums`` go over
    all processes.
    """
    flat = features.flatten(3)
    weight = (slots[:, :, None] & brain.flatten(1)[:, None]).to(flat)[:, :, None]  # [B, M, 1, V]
    # Around the mean of this process's latents first: no difference of large sums.
    totals = (flat * weight).sum((0, 3))
    counts = weight.sum((0, 2, 3))
    together = sums.add(torch.cat([counts[:, None], totals], 1)).detach()
    if not within:
        together = together.sum(0, keepdim=True)
    centre = together[:, 1:] / together[:, :1].clamp_min(1)
    # As above, the mean may be held still.
    apart = ((flat - centre[None, :, :, None]) * weight).transpose(0, 2).flatten(1)  # [C, M·B·V]
    return sums.add(apart @ apart.mT) / together[:, 0].sum().clamp_min(1)


def unit(vectors: Tensor, epsilon: float) -> Tensor:
    """Divide vectors along dimension 2 by ``sqrt(|v|² + epsilon)``, their length but near 0."""
    return vectors * (vectors.square().sum(2, keepdim=True) + epsilon).rsqrt()
