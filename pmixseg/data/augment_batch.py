"""The changes of :class:`~pmixseg.data.augment.Augmentation` for a whole batch in a few operations.

A GPU is bound by starting operations: one grid for all samples is cheaper there than two sums of
rows for each volume, which are faster on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from pmixseg.data.keys import generator
from pmixseg.data.resample import Turn
from pmixseg.types import Keys

SCALE, SHIFT, GAMMA, NOISE = range(4)
"""Columns of the table of intensities."""


def turn_batch(
    image: Float[Tensor, "b m d h w"],
    label: Int64[Tensor, "b d h w"],
    turns: Sequence[Turn],
    spacing: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:
    """Turn every sample as :func:`~pmixseg.data.resample.turn_patch` does.

    Sides are 2 voxels or more, the spacing is in mm. Samples that are only flipped are not
    interpolated.
    """
    device, size = image.device, image.shape[2:]
    flipped, moved = image, label
    rows = [[*(f and not t.resamples for f in t.flips), t.resamples] for t in turns]
    flags = torch.tensor(rows).to(device, non_blocking=True)
    for axis in range(3):
        if any(row[axis] for row in rows):
            where = flags[:, axis]
            flipped = torch.where(_beside(where, 5), flipped.flip(axis + 2), flipped)
            moved = torch.where(_beside(where, 4), moved.flip(axis + 1), moved)
    if not any(turn.resamples for turn in turns):
        return flipped, moved
    # From voxels to grid_sample's coordinates: -1 to 1 from centre to centre, last axis first.
    half = (torch.tensor(size, dtype=torch.float64) - 1) / 2
    matrices = torch.stack([turn.inverse(spacing) for turn in turns])
    matrices = (matrices * half / half[:, None]).flip(1, 2)
    theta = F.pad(matrices, (0, 1)).to(device, non_blocking=True)
    grid = F.affine_grid(theta, [len(turns), 1, *size], align_corners=True)
    turned = F.grid_sample(image, grid.to(image.dtype), align_corners=True)
    # In float64, so that no voxel's nearest neighbour is a matter of rounding.
    nearest = F.grid_sample(label[:, None].double(), grid, mode="nearest", align_corners=True)
    where = flags[:, 3]
    return (
        torch.where(_beside(where, 5), turned, flipped),
        torch.where(_beside(where, 4), nearest[:, 0].to(label.dtype), moved),
    )


def change_batch(
    image: Float[Tensor, "b m d h w"], table: Float[Tensor, "b m 4"], keys: Keys
) -> Tensor:
    """Change intensities of every modality where it is not 0; see the class.

    The table, on the CPU like the keys, holds scale, shift, γ and standard deviation of the noise.
    """
    here = table.to(image.dtype).to(image.device, non_blocking=True)[:, :, :, None, None, None]
    changed = image
    if bool((table[..., GAMMA] != 1).any()):
        low, high = image.amin((2, 3, 4), keepdim=True), image.amax((2, 3, 4), keepdim=True)
        span = (high - low).clamp(min=torch.finfo(image.dtype).tiny)
        gamma = here[:, :, GAMMA]
        powered = torch.addcmul(low, ((image - low) / span).pow(gamma), span)
        changed = torch.where(gamma != 1, powered, image)
    changed = torch.addcmul(here[:, :, SHIFT], changed, here[:, :, SCALE])
    noisy = (table[..., NOISE] > 0).any(1).tolist()
    if any(noisy):
        field = torch.zeros_like(image)
        for sample, key, draws in zip(field, keys.tolist(), noisy, strict=True):
            if draws:
                sample.normal_(generator=generator(key, "noise", image.device))
        changed = torch.addcmul(changed, field, here[:, :, NOISE])
    return torch.where(image != 0, changed, 0.0)


def _beside(flags: Tensor, axes: int) -> Tensor:
    return flags.view(-1, *[1] * (axes - 1))
