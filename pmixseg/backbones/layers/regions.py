"""Fuse modalities region by region without keeping a volume for each region."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmixseg.backbones.layers.lean import (
    as_autocast,
    convolve,
    fast_layout,
    mix_channels,
    slabs,
    voxel_rows,
    voxel_sum,
)
from pmixseg.execution import runs_lean


def mix_regions(
    x: Tensor, mixing: Tensor, regions: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    r"""Mix channels for each region, keep each mixture inside its region, and join them.

    .. math:: y = b + \sum_r W_r\,(p_r \odot A_r x)

    On a CPU the R mixtures exist for one slab of voxels at a time, and the backward pass makes them
    again: they would be by far the largest tensors of RFNet.

    Args:
        x: ``[B, N, D, H, W]``.
        mixing: A of each sample, ``[B, R·C, N]``.
        regions: p, ``[B, R, D, H, W]``; no gradient flows into it.
        weight: W, ``[O, R·C]``.
        bias: b, ``[O]``.

    Returns:
        ``[B, O, D, H, W]``.
    """
    regions = regions.detach()
    if runs_lean(x):
        tensors = as_autocast(x, mixing, regions, weight, bias)
        y: Tensor = _MixRegions.apply(*tensors)  # type: ignore[no-untyped-call]  # untyped in torch
        return y
    mixed = mix_channels(x, mixing)
    inside = mixed.view(*regions.shape[:2], -1, *regions.shape[2:]) * regions[:, :, None]
    return mix_channels(inside.flatten(1, 2), weight, bias)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return convolve(x, weight[..., None, None, None], bias, [1] * 3, 0)


def _spread(regions: Tensor, channels: int) -> Tensor:
    """Return a 1x1x1 kernel that repeats each of R region maps for its share of the channels."""
    each = torch.eye(regions.shape[1], dtype=regions.dtype)
    return each.repeat_interleave(channels // regions.shape[1], 0)


class _MixRegions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mixing: Tensor, regions: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        x, regions = fast_layout(x), fast_layout(regions)
        ctx.save_for_backward(x, mixing, regions, weight)
        spread = _spread(regions, weight.shape[1])
        shape = (len(x), len(weight), *x.shape[2:])
        y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last_3d)
        for b, (some, where, into) in slabs(x, regions, y):
            inside = _pointwise(some, mixing[b]).mul_(_pointwise(where, spread))
            into.copy_(_pointwise(inside, weight, bias))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, mixing, regions, weight = ctx.saved_tensors
        g = fast_layout(gradients[0])
        exact = torch.promote_types(x.dtype, torch.float32)
        spread = _spread(regions, weight.shape[1])
        to_x = torch.empty_like(x)
        to_mixing = torch.zeros_like(mixing, dtype=exact)
        to_weight = torch.zeros_like(weight, dtype=exact)
        for b, (some, where, dy, into) in slabs(x, regions, g, to_x):
            share = _pointwise(where, spread)
            inside = _pointwise(some, mixing[b]).mul_(share)
            to_weight += _outer(dy, inside)
            to_inside = _pointwise(dy, weight.t()).mul_(share)
            to_mixing[b] += _outer(to_inside, some)
            into.copy_(_pointwise(to_inside, mixing[b].t()))
        to_bias = voxel_sum(g).sum(0).to(weight.dtype) if ctx.needs_input_grad[4] else None
        return to_x, to_mixing.to(mixing.dtype), None, to_weight.to(weight.dtype), to_bias


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Return ``Σ_v a_iv b_jv`` of one sample."""
    return voxel_rows(a)[0].t() @ voxel_rows(b)[0]
