"""Equal encoders of several modalities as one encoder of grouped convolutions, for a GPU.

Encoder m reads channel m alone, so all of them together are convolutions with one group per
modality, whose kernels lie side by side. A GPU then starts one operation where a loop starts M, and
larger ones: of four encoders, 1.8 to 4.1 times faster (``experiments/benchmarks/README.md``). On a
CPU it is slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pmixseg.execution import static_on

NARROW = 32
"""Channels of all encoders up to which a GPU is faster with zeros than with groups."""


class Groupable(nn.Module):
    """Encoder whose layers treat channels by themselves, or are a grouped convolution if need be.

    Such layers are :class:`~pmixseg.backbones.layers.lean.LeanConv3d`,
    :class:`~pmixseg.backbones.layers.norm.NormAct`, activations, and linear layers by
    :func:`map_groups`.
    """


def encode_together(encoders: Sequence[nn.Module], image: Tensor) -> list[Tensor]:
    """Run encoder m (equal :class:`Groupable`, each with own weights) on channel m, all at once.

    Returns:
        Per level ``[B, M·C, d, h, w]``: the channels of encoder 0, then those of encoder 1, ….
    """
    named = [dict(encoder.named_parameters()) for encoder in encoders]
    joined = {name: torch.cat([own[name] for own in named]) for name in named[0]}
    return list(functional_call(encoders[0], joined, (image,)))


def convolve_groups(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """Convolve with kernels of several layers, each of which reads channels of its own.

    ``conv`` is one of the layers, with the kernels of all, ``[M·out, in, k, k, k]``; ``x`` is
    ``[B, M·in, D, H, W]``.
    """
    padding = [int(side) for side in conv.padding]
    if conv.padding_mode != "zeros":
        x = F.pad(x, [side for side in padding for _ in range(2)], mode=conv.padding_mode)
        padding = [0, 0, 0]
    groups, weight = x.shape[1] // conv.in_channels, conv.weight
    if _faster_with_zeros(conv, x):
        weight, groups = _with_zeros(weight, groups), 1
    return F.conv3d(x, weight, conv.bias, conv.stride, padding, conv.dilation, groups)


def _faster_with_zeros(conv: nn.Conv3d, x: Tensor) -> bool:
    """Say whether one convolution over the channels of all groups beats the grouped one.

    torch takes a group of one channel as a depthwise convolution, whose gradient to the kernels
    runs on a single block of a GPU. And a GPU has no good kernels for groups with a stride, or for
    narrow ones: with the zeros, forward and backward passes of 64 to 128 channels with a stride of
    2 take a sixth of the time (``experiments/benchmarks/README.md``).
    """
    if conv.in_channels == 1:
        return True
    return static_on(x.device) and (conv.stride[0] > 1 or x.shape[1] <= NARROW)


def _with_zeros(weight: Tensor, groups: int) -> Tensor:
    """Put kernels ``[M·out, in, k, k, k]`` of M groups into one, ``[M·out, M·in, k, k, k]``."""
    own = weight.view(groups, -1, *weight.shape[1:]).movedim(0, -1)
    return torch.diag_embed(own, 0, 0, 2).flatten(0, 1).flatten(1, 2)


def map_groups(linear: nn.Linear, x: Tensor) -> Tensor:
    """Map features by a linear layer, or by those of several encoders, each its own features.

    ``linear`` is one of the layers, with the weights of all, ``[M·out, in]``: ``[B, M·in]`` becomes
    ``[B, M·out]``.
    """
    groups = x.shape[1] // linear.in_features
    if groups == 1:
        mapped: Tensor = linear(x)
        return mapped
    weight = linear.weight.view(groups, -1, linear.in_features)
    y = torch.einsum("bgi,goi->bgo", x.view(len(x), groups, -1), weight)
    return y.flatten(1) + linear.bias
