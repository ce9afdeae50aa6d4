"""A fixed number of brain voxels of every sample, and random numbers that need no generator.

Shapes are the same in every step and nothing is asked from the device. Places follow from a seed
alone, so a step is reproducible on every device and in every process: patches move over the
brain, the places in them need not.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pmixseg.types import Brain, Features

_MASK = 0xFFFFFFFF


def hashed(count: int, seed: int, device: torch.device) -> Int64[Tensor, " n"]:
    """Return distinct numbers in [0, 2³²), one per index, in no visible order.

    ``seed`` shifts the sequence.

    Source: the finaliser "lowbias32", a bijection of 32-bit integers (Wellons, 2018).
    """
    x = torch.arange(count, device=device) + (seed * 0x9E3779B1 & _MASK)
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def normal_numbers(shape: tuple[int, ...], seed: int, like: Tensor) -> Tensor:
    """Draw standard normal numbers that follow from the seed alone."""
    count = math.prod(shape)
    drawn = hashed(2 * count, seed, like.device).to(torch.float64)
    radius, angle = ((drawn + 0.5) / 2**32).chunk(2)
    numbers = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
    return numbers.view(shape).to(like.dtype)


def brain_points(
    brain: Brain, count: int, seed: int
) -> tuple[Int64[Tensor, "b p"], Bool[Tensor, "b p"]]:
    """Draw places of brain voxels of every sample, without replacement.

    Indices into the flattened voxels come with which of them are brain: a sample with fewer brain
    voxels than ``count`` has places that do not count. A level with fewer voxels gives fewer
    places.
    """
    inside = brain.flatten(1)
    order = hashed(inside.shape[1], seed, brain.device) + 1
    # The largest numbers, those outside the brain being 0.
    drawn, places = torch.where(inside, order, 0).topk(min(count, inside.shape[1]), dim=1)
    return places, drawn > 0


def take(features: Features, places: Int64[Tensor, "b p"]) -> Float[Tensor, "b m c p"]:
    """Take the voxel vectors of every slot at the same places."""
    flat = features.flatten(3)
    index = places[:, None, None].expand(-1, flat.shape[1], flat.shape[2], -1)
    return flat.gather(3, index)
