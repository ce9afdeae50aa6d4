"""Instance norm and LeakyReLU that keep one tensor for the backward pass.

On a CPU both work on slabs that fit the cache, elsewhere on torch's batch norm; a compiler gets the
formula, and fuses it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmixseg.backbones.layers.lean import (
    fast_layout,
    is_channels_last,
    slabs,
    voxel_rows,
    voxel_sum,
)
from pmixseg.execution import runs_lean
from pmixseg.types import full_precision

EPSILON = 1e-5
"""Added to a variance before its root."""
SMALL = 1 << 18
"""Values of a whole batch up to which one call for all samples is faster than slabs of one sample.

There the cost is that of starting operations, not that of memory.
"""


class NormAct(nn.Module):
    """Instance norm with scale and shift, then LeakyReLU; see :func:`norm_act`."""

    def __init__(self, channels: int, slope: float, reuse: bool = False) -> None:
        super().__init__()
        self.slope = slope
        self.reuse = reuse
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[B, C, D, H, W]``."""
        reuse = self.reuse and not torch.is_grad_enabled()
        return norm_act(x, self.slope, self.weight, self.bias, reuse)


def norm_act(
    x: Tensor,
    slope: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    reuse: bool = False,
) -> Tensor:
    """Apply instance norm (ε = 1e-5), optional scale and shift, then LeakyReLU.

    torch's own norms of channels-last tensors add a million values one by one on a CPU, which costs
    three digits; here they are summed pairwise.

    ``weight`` (scale) and ``bias`` (shift) are ``[C]``. ``reuse``: nobody needs ``x`` again, so the
    result may take its memory (fresh pages cost as much as the arithmetic); with a scale only where
    no gradient is wanted.
    """
    y: Tensor
    if torch.compiler.is_compiling():
        return _formula(x, slope, weight, bias)
    if not runs_lean(x):
        y = _PlainNormAct.apply(x, slope, weight, bias)  # type: ignore[no-untyped-call]  # untyped in torch
    elif x.numel() <= SMALL and is_channels_last(x):
        y = _SmallNormAct.apply(x, slope, weight, bias)  # type: ignore[no-untyped-call]  # untyped in torch
    else:
        y = _NormAct.apply(x, slope, weight, bias, reuse)  # type: ignore[no-untyped-call]  # untyped in torch
    return y


def _formula(x: Tensor, slope: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    exact = full_precision(x)
    variance, mean = torch.var_mean(exact, (2, 3, 4), correction=0, keepdim=True)
    y = (exact - mean) * (variance + EPSILON).rsqrt()
    if weight is not None:
        y = y * weight[:, None, None, None]
    if bias is not None:
        y = y + bias[:, None, None, None]
    return F.leaky_relu(y, slope).to(x.dtype)


class _PlainNormAct(torch.autograd.Function):
    """Normalise and activate by batch norm over ``[1, B·C, V]``, in the fewest operations."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, slope: float, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        rows = x.reshape(1, -1, *x.shape[2:])
        scale, shift = (
            parameter if parameter is None or len(x) == 1 else parameter.repeat(len(x))
            for parameter in (weight, bias)
        )
        normed, mean, rstd = torch.ops.aten.native_batch_norm(
            rows, scale, shift, None, None, True, 0.0, EPSILON
        )
        y = torch.ops.aten.leaky_relu_(normed.view(x.shape), slope)
        ctx.slope = slope
        ctx.save_for_backward(x, y, mean, rstd, scale)
        return y  # type: ignore[no-any-return]  # torch.ops are untyped

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, y, mean, rstd, scale = ctx.saved_tensors
        shape = (1, -1, *x.shape[2:])
        inner = torch.ops.aten.leaky_relu_backward(gradients[0], y, ctx.slope, True)
        needs = [ctx.needs_input_grad[k] for k in (0, 2, 3)]
        to_x, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            inner.reshape(shape),
            x.reshape(shape),
            scale,
            None,
            None,
            mean,
            rstd,
            True,
            EPSILON,
            needs,
        )
        # Some kernels return gradients that nobody asked for.
        affine = [
            part.view(len(x), -1).sum(0) if need else None
            for part, need in zip((to_weight, to_bias), needs[1:], strict=True)
        ]
        return to_x.view(x.shape), None, *affine


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return ``x · scale + shift`` of one sample, factors ``[C]``, by batch norm's fast kernel."""
    variance = torch.full_like(scale, 1 - EPSILON)
    return F.batch_norm(x, torch.zeros_like(scale), variance, scale, shift, eps=EPSILON)


class _NormAct(torch.autograd.Function):
    """Normalise and activate; with no scale and shift y alone is kept, as x̂ follows from it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, slope: float, weight: Tensor | None, bias: Tensor | None, reuse: bool
    ) -> Tensor:
        voxels, exact = x[0, 0].numel(), torch.promote_types(x.dtype, torch.float32)
        sums = torch.zeros(2, *x.shape[:2], dtype=exact)
        for b, (slab,) in slabs(x):
            precise = slab.to(exact)
            sums[0, b] += voxel_sum(precise)[0]
            sums[1, b] += voxel_sum(precise.square())[0]
        mean, square = sums / voxels
        # Means of convolutions are about as large as their deviations: nothing cancels here.
        rstd = ((square - mean.square()).clamp(min=0) + EPSILON).rsqrt()
        scale = rstd if weight is None else rstd * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        y = x if reuse else torch.empty_like(x)
        if reuse:
            ctx.mark_dirty(x)
        for b, (slab, into) in slabs(x, y):
            torch.ops.aten.leaky_relu.out(_affine(slab, scale[b], shift[b]), slope, out=into)
        ctx.slope = slope
        ctx.save_for_backward(y, rstd, *(() if weight is None else (x, mean, weight)))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        y, rstd, *rest = ctx.saved_tensors
        g = fast_layout(gradients[0])
        x, mean, weight = rest or (y, None, None)

        def inner_and_hat(b: int, dy: Tensor, out: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
            inner = torch.ops.aten.leaky_relu_backward(dy, out, ctx.slope, True)
            if mean is None:
                return inner, F.leaky_relu(kept, 1 / ctx.slope)
            return inner, _affine(kept, rstd[b], -mean[b] * rstd[b])

        sums = torch.zeros(2, *rstd.shape, dtype=rstd.dtype)
        for b, slab in slabs(g, y, x):
            inner, hat = inner_and_hat(b, *slab)
            sums[0, b] += voxel_sum(inner)[0]
            sums[1, b] += voxel_sum(inner * hat)[0]
        scale = rstd if weight is None else rstd * weight
        # scale · (g - mean(g) - x̂ mean(g x̂))
        shift, slant = -scale * sums / y[0, 0].numel()
        to_x = torch.empty_like(y)
        for b, (dy, out, kept, into) in slabs(g, y, x, to_x):
            inner, hat = inner_and_hat(b, dy, out, kept)
            straight = _affine(inner, scale[b], shift[b])
            torch.add(straight, _affine(hat, slant[b], torch.zeros_like(slant[b])), out=into)
        if weight is None:
            return to_x, None, None, None, None
        return to_x, None, sums[1].sum(0), sums[0].sum(0), None


class _SmallNormAct(torch.autograd.Function):
    """Normalise and activate all samples at once; x̂ and y are small, and kept in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, slope: float, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        rows = full_precision(voxel_rows(x))
        hat = rows - rows.mean(1, keepdim=True)
        rstd = (hat.square().mean(1, keepdim=True) + EPSILON).rsqrt()
        hat *= rstd
        scaled = hat if weight is None else hat * weight
        y = F.leaky_relu(scaled if bias is None else scaled + bias, slope)
        ctx.slope = slope
        ctx.save_for_backward(y, hat, rstd, weight)
        return _volume(y, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        y, hat, rstd, weight = ctx.saved_tensors
        g = voxel_rows(fast_layout(gradients[0])).to(y.dtype)
        inner = torch.ops.aten.leaky_relu_backward(g, y, ctx.slope, True)
        mean, slant = inner.mean(1, keepdim=True), (inner * hat).mean(1, keepdim=True)
        # scale · (g - mean(g) - x̂ mean(g x̂))
        to_x = torch.addcmul(inner - mean, hat, slant, value=-1)
        to_x *= rstd if weight is None else rstd * weight
        into = _volume(to_x, gradients[0])
        if weight is None:
            return into, None, None, None
        voxels = y.shape[1]
        return into, None, slant.sum((0, 1)) * voxels, mean.sum((0, 1)) * voxels


def _volume(rows: Tensor, like: Tensor) -> Tensor:
    """Return ``[B, V, C]`` in the shape and type of ``like``, channels-last."""
    b, c, d, h, w = like.shape
    return rows.to(like.dtype).view(b, d, h, w, c).permute(0, 4, 1, 2, 3)
