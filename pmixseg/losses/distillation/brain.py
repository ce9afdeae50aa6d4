"""Sums over brain voxels for distillation losses on latents.

Background is half of a patch and more, and no network means anything there: a mean over it would
depend on how much of it the patch has. Shapes do not depend on the masks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pmixseg.losses.distances import pooled_moments
from pmixseg.losses.ranks import SharedSums
from pmixseg.types import Brain, Features, Presence, Scalar, SegOutput


def brain_of(output: SegOutput, level: int) -> Brain:
    """Return which voxels of a level hold brain, ``[B, D, H, W]``.

    Args:
        output: whose latents know it; where they do not, every voxel counts.
        level: which level of its network.
    """
    latents = output.latents
    if latents.brain is not None:
        return latents.brain[level]
    features = latents.features[level]
    shape = (len(features), *features.shape[3:])
    return torch.ones(shape, dtype=torch.bool, device=features.device)


def mean_vector(features: Features, brain: Brain) -> Float[Tensor, "b m c"]:
    """Mean of every channel over brain voxels; 0 for a sample without any."""
    total = torch.where(brain[:, None, None], features, 0.0).sum((3, 4, 5))
    return total / brain.sum((1, 2, 3)).clamp_min(1)[:, None, None]


@torch.no_grad()
def latent_variance(features: Features, usable: Presence, brain: Brain) -> Scalar:
    """Mean over channels of the variance of latents: the yardstick of their distances.

    Every brain voxel of every usable slot of all samples, and of all processes, is one point.

    Args:
        features: ``[B, M, C, D, H, W]``, finite in every slot.
        usable: slots that count, ``[B, M]``.
        brain: ``[B, D, H, W]``.

    Returns:
        One number, 0 where no voxel counts; no gradient flows through it.
    """
    return pooled_moments(features, usable, SharedSums(), brain)[1].mean()
