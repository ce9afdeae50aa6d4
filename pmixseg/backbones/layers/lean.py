"""Layers with the results of torch's own, in less time and memory on a CPU.

On a CPU, 3-D convolutions with few channels are faster on the channels-last layout (oneDNN need
not reorder), and so is trilinear upsampling; 1x1x1 convolutions and instance norm are slow there,
unless written as here and in :mod:`pmixseg.backbones.layers.norm`. Torch's own layers take 2.4
times the time of a training step of the U-Net in float32 (single samples, which they leave to a
slow path) and 1.0 to 1.1 times in bfloat16; of RFNet 1.2 times in both. In training, a layer keeps
only what it cannot cheaply make again: a norm with LeakyReLU keeps its result instead
of its input and its result, a convolution what stood before padding, concatenation or upsampling.
Measurements: ``experiments/benchmarks/README.md``, section Backbones.

The layout of a GPU is left as it is; there and under ``torch.compile`` torch's own layers run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmixseg.backbones.layers.bf16_gradients import convolve_wholly, misses_kernel
from pmixseg.backbones.layers.grouped import convolve_groups
from pmixseg.execution import on_cpu, runs_lean

ONEDNN_TYPES = (torch.float32, torch.bfloat16)
SLAB = 1 << 21
"""Bytes of a tensor that are worked on at a time."""
LONG, PIECES = 1 << 12, 128
"""Voxels from which a GPU shares a sum over them, and the most pieces it is cut into."""

Padding = Literal["zeros", "reflect"]


def fast_layout(x: Tensor) -> Tensor:
    """Return ``[B, C, D, H, W]`` in the layout that its device convolves fastest."""
    return x.contiguous(memory_format=torch.channels_last_3d) if on_cpu(x) else x


def is_channels_last(x: Tensor) -> bool:
    """Say whether the channels of a voxel of ``[B, C, D, H, W]`` lie side by side."""
    return x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()


def voxel_rows(x: Tensor) -> Tensor:
    """View ``[B, C, D, H, W]`` as ``[B, V, C]``."""
    return (
        x.flatten(2).transpose(1, 2)
        if x.is_contiguous()
        else x.permute(0, 2, 3, 4, 1).flatten(1, 3)
    )


def slabs(*volumes: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Cut samples into slabs that fit the cache, so that several steps read memory once."""
    size = volumes[0][0].numel() * volumes[0].element_size()
    pieces = min(-(-size // SLAB), volumes[0].shape[2])
    for b in range(len(volumes[0])):
        for slab in zip(*(v[b : b + 1].chunk(pieces, 2) for v in volumes), strict=True):
            yield b, slab


def voxel_sum(x: Tensor) -> Tensor:
    """Sum over voxels in float32 at least, ``[B, C]``."""
    return x.sum((2, 3, 4), dtype=torch.promote_types(x.dtype, torch.float32))


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: int
) -> Tensor:
    """Convolve channels-last like ``F.conv3d``, always by oneDNN where that exists.

    ``F.conv3d`` leaves small inputs and 1x1x1 kernels in float32 to a path three times slower.
    """
    x = _canonical(fast_layout(x))
    if torch.backends.mkldnn.is_available() and x.dtype in ONEDNN_TYPES:  # type: ignore[no-untyped-call]  # untyped in torch
        y: Tensor = torch.mkldnn_convolution(x, weight, bias, [padding] * 3, stride, [1] * 3, 1)
    else:
        y = F.conv3d(x, weight, bias, list(stride), padding)
    return fast_layout(y)


def leaves_onednn(x: Tensor) -> bool:
    """Say whether torch takes a path up to twenty times slower than oneDNN.

    It does so for a transposed convolution and for the gradients of any other, of a single sample
    with few planes: what an encoder sees of a small batch, and a decoder of a case. A tensor in
    oneDNN's own layout never takes it. (``ConvParams::use_mkldnn`` in torch's
    ``Convolution.cpp``.)
    """
    single = len(x) == 1 and x.dtype == torch.float32 and x.shape[1:4].numel() <= 20480
    return single and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]  # untyped in torch


def _canonical(x: Tensor) -> Tensor:
    """Return a channels-last tensor with the strides that oneDNN expects of one, views included."""
    _, c, d, h, w = x.shape
    return x.as_strided(x.shape, (c * d * h * w, 1, c * h * w, c * w, c))


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``aᵀ b`` over voxels, ``[B, V, P]`` and ``[B, V, Q]`` to ``[B, P, Q]``.

    A matrix product cuts its result into tiles, here a single one, and leaves the long sum of a
    tile to one of a GPU's processors; so the voxels are cut into pieces.
    """
    pieces = 1 if on_cpu(a) or a.shape[1] < LONG else math.gcd(a.shape[1], PIECES)
    if pieces == 1:
        return torch.bmm(a.mT, b)
    a, b = (x.view(len(x), pieces, -1, x.shape[2]) for x in (a, b))
    return torch.matmul(a.mT, b).sum(1)


def as_autocast(*tensors: Tensor | None) -> list[Any]:
    """Return what autocast would hand to a convolution."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None else t.to(dtype) for t in tensors]


def mix_channels(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a 1x1x1 convolution, possibly with weights of each sample's own.

    Weights ``[B, C', C]`` or ``[C', C]`` turn ``[B, C, D, H, W]`` into ``[B, C', D, H, W]``.
    """
    if runs_lean(x):
        y: Tensor = _Mix.apply(*as_autocast(x, weight, bias))  # type: ignore[no-untyped-call]  # untyped in torch
        return y
    if weight.ndim == 2:
        return F.conv3d(x, weight[..., None, None, None], bias)
    of_samples: Tensor = _MixSamples.apply(*as_autocast(x, weight, bias))  # type: ignore[no-untyped-call]  # untyped in torch
    return of_samples


class _MixSamples(torch.autograd.Function):
    """A 1x1x1 convolution on a GPU with weights of each sample's own, in its input's layout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _mix_samples(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (g,), (x, weight), needs = gradients, ctx.saved_tensors, ctx.needs_input_grad
        to_x = _mix_samples(g, weight.mT, None) if needs[0] else None
        to_weight = sum_of_products(voxel_rows(g), voxel_rows(x)) if needs[1] else None
        to_bias = voxel_sum(g).sum(0).to(g.dtype) if needs[2] else None
        return to_x, to_weight, to_bias


def _mix_samples(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if is_channels_last(x):
        # [B, V, C] times [B, C, C'], which is channels-last again.
        rows = _product(voxel_rows(x), weight.mT, bias)
        return rows.view(len(x), *x.shape[2:], -1).permute(0, 4, 1, 2, 3)
    mixed = _product(weight, x.flatten(2), None if bias is None else bias[:, None])
    return mixed.view(len(x), -1, *x.shape[2:])


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(a, b) if bias is None else torch.baddbmm(bias, a, b)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = fast_layout(x)
        ctx.save_for_backward(x, weight)
        return _mixed(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g = fast_layout(gradients[0])
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = _mixed(g, weight.transpose(-1, -2), None)
        if ctx.needs_input_grad[1]:
            few, many = sorted((voxel_rows(g), voxel_rows(x)), key=lambda rows: rows.shape[2])
            # Matrix products of long thin operands are fastest with the thinner one first.
            to_weight = torch.bmm(few.transpose(1, 2), many)
            to_weight = to_weight.transpose(1, 2) if few.shape[2] != g.shape[1] else to_weight
            to_weight = to_weight.sum(0) if weight.ndim == 2 else to_weight
        if ctx.needs_input_grad[2]:
            to_bias = voxel_sum(g).sum(0).to(weight.dtype)
        return to_x, to_weight, to_bias


def _mixed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kernels = weight[..., None, None, None]
    if weight.ndim == 2:
        return convolve(x, kernels, bias, [1] * 3, 0)
    parts = [
        convolve(some, kernel, bias, [1] * 3, 0)
        for some, kernel in zip(torch.split(x, 1), kernels, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Prepare:
    """Cheap operation without parameters before a convolution, run again in its backward pass.

    Args:
        plain: the operation, differentiable.
        write: writes it into a given tensor.
        back: gradient to the inputs from the gradient to the result, and the inputs.
        scale: resolution of the result by that of the inputs.
    """

    plain: Callable[..., Tensor]
    write: Callable[..., object]
    back: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]]
    scale: int = 1


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True)


def _concatenate_into(into: Tensor, *xs: Tensor) -> None:
    for part, x in zip(torch.split(into, [x.shape[1] for x in xs], 1), xs, strict=True):
        part.copy_(x)


def _upsample_back(g: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    size = list(inputs[0].shape)
    back: Tensor = torch.ops.aten.upsample_trilinear3d_backward(
        g.contiguous(memory_format=torch.channels_last_3d), list(g.shape[2:]), size, True
    )
    return [back]


AS_IT_IS = Prepare(lambda x: x, lambda into, x: into.copy_(x), lambda g, xs: [g])
"""Nothing."""
CONCATENATED = Prepare(
    lambda *xs: torch.cat(xs, 1),
    _concatenate_into,
    lambda g, xs: torch.split(g, [x.shape[1] for x in xs], 1),
)
"""Channels of all inputs."""
UPSAMPLED = Prepare(_upsample, lambda into, x: into.copy_(_upsample(x)), _upsample_back, scale=2)
"""Twice the resolution, trilinear with aligned corners."""


def _inside(padded: Tensor) -> Tensor:
    return padded[..., 1:-1, 1:-1, 1:-1]


def _prepared_and_reflected(prepare: Prepare, inputs: Sequence[Tensor]) -> Tensor:
    """Return the result of ``prepare`` with one reflected voxel around it, written once."""
    channels = sum(x.shape[1] for x in inputs)
    sides = [prepare.scale * side + 2 for side in inputs[0].shape[2:]]
    padded = torch.empty(
        inputs[0].shape[0],
        channels,
        *sides,
        dtype=inputs[0].dtype,
        memory_format=torch.channels_last_3d,
    )
    prepare.write(_inside(padded), *inputs)
    for axis in (4, 3, 2):
        last = padded.shape[axis] - 1
        padded.narrow(axis, 0, 1).copy_(padded.narrow(axis, 2, 1))
        padded.narrow(axis, last, 1).copy_(padded.narrow(axis, last - 2, 1))
    return padded


def _fold(g: Tensor) -> Tensor:
    """Return the gradient of the reflection; changes ``g``."""
    for axis in (2, 3, 4):
        last = g.shape[axis] - 1
        g.narrow(axis, 2, 1).add_(g.narrow(axis, 0, 1))
        g.narrow(axis, last - 2, 1).add_(g.narrow(axis, last, 1))
    return _inside(g)


class LeanConv3d(nn.Conv3d):
    """Convolution 1x1x1 or 3x3x3 that keeps the resolution, or divides it by the stride."""

    def __init__(
        self,
        inside: int,
        outside: int,
        size: int = 3,
        stride: int = 1,
        padding: Padding = "reflect",
        bias: bool = True,
    ) -> None:
        super().__init__(inside, outside, size, stride, size // 2, bias=bias, padding_mode=padding)

    def forward(self, *inputs: Tensor, prepare: Prepare = AS_IT_IS) -> Tensor:
        """Convolve ``prepare(*inputs)``, ``[B, C, D, H, W]``."""
        if len(self.weight) > self.out_channels:  # of several encoders
            return convolve_groups(self, prepare.plain(*inputs))
        if self.kernel_size[0] == 1:
            return self._mix(prepare, inputs)
        if not runs_lean(inputs[0]):
            return convolve_wholly(self, prepare.plain(*inputs))
        y: Tensor = _ConvOf.apply(  # type: ignore[no-untyped-call]  # untyped in torch
            prepare,
            self.padding_mode == "reflect",
            self.stride,
            *as_autocast(self.weight, self.bias, *inputs),
        )
        return y

    def _mix(self, prepare: Prepare, inputs: Sequence[Tensor]) -> Tensor:
        if prepare is not CONCATENATED or not runs_lean(inputs[0]):
            return mix_channels(prepare.plain(*inputs), self.weight.flatten(1), self.bias)
        # A sum over the inputs needs no concatenated copy of them.
        weights = torch.split(self.weight.flatten(1), [x.shape[1] for x in inputs], 1)
        y = mix_channels(inputs[0], weights[0], self.bias)
        for x, weight in zip(inputs[1:], weights[1:], strict=True):
            y += mix_channels(x, weight)
        return y


class _ConvOf(torch.autograd.Function):
    """A 3x3x3 convolution that keeps its inputs as they were before preparation and padding."""

    @staticmethod
    def forward(
        ctx: Any,
        prepare: Prepare,
        reflects: bool,
        stride: tuple[int, ...],
        weight: Tensor,
        bias: Tensor | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.prepare, ctx.reflects, ctx.stride = prepare, reflects, stride
        ctx.save_for_backward(weight, *inputs)
        x = _ConvOf.source(ctx, inputs)
        return convolve(x, weight, bias, stride, 0 if reflects else 1)

    @staticmethod
    def source(ctx: Any, inputs: Sequence[Tensor]) -> Tensor:
        """Return what is convolved."""
        if ctx.reflects:
            return _prepared_and_reflected(ctx.prepare, inputs)
        plain: Tensor = ctx.prepare.plain(*inputs)
        return plain

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad
        x = _ConvOf.source(ctx, inputs)
        to_x, to_weight, to_bias = _convolution_backward(
            fast_layout(gradients[0]),
            x,
            weight,
            ctx.stride,
            0 if ctx.reflects else 1,
            [any(needs[5:]), needs[3], needs[4]],
        )
        back: Sequence[Tensor | None] = [None] * len(inputs)
        if to_x is not None:
            back = ctx.prepare.back(_fold(to_x) if ctx.reflects else to_x, inputs)
        return None, None, None, to_weight, to_bias, *back


def _convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: int, needs: list[bool]
) -> list[Tensor | None]:
    """Return the gradients of input, weight and bias of a 3x3x3 convolution."""
    if misses_kernel(x.dtype, x.shape[2], weight.shape[2], padding):
        wide = _convolution_backward(g.float(), x.float(), weight.float(), stride, padding, needs)
        return [None if part is None else part.to(x.dtype) for part in wide]
    if leaves_onednn(x):
        g, x = g.to_mkldnn(), x.to_mkldnn()
    to_x, *others = torch.ops.aten.convolution_backward(
        g, x, weight, [len(weight)], stride, [padding] * 3, [1] * 3, False, [0] * 3, 1, needs
    )
    return [fast_layout(to_x.to_dense()) if x.is_mkldnn and needs[0] else to_x, *others]
