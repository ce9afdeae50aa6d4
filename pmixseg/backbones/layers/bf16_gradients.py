"""Repair the bf16 weight gradients that oneDNN leaves unwritten for shallow volumes.

In bf16, oneDNN 3.12 (torch 2.13, kernel ``avx512_core_bf16``) leaves parts of the weight gradient
of a padded convolution as the memory was, often infinite, where the first axis has fewer voxels
than the kernel, and more than one; with a kernel of 7 it was seen to write where it must not. Four
levels of stride 2 on patches of 16 voxels are enough. In float32 the same gradients are right.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def misses_kernel(dtype: torch.dtype, depth: int, kernel: int, padding: int) -> bool:
    """Say whether oneDNN would not write a convolution's weight gradient.

    ``depth``, ``kernel`` and ``padding`` (zeros on each side) are those of its first axis.
    """
    return dtype == torch.bfloat16 and padding > 0 and 1 < depth < kernel


def convolve_wholly(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """Return torch's own ``conv(x)``, with a gradient that is written wholly.

    The few, small convolutions that are concerned are computed in float32; the result has the type
    that it would have had.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    missed = misses_kernel(dtype, x.shape[2], conv.kernel_size[0], zeros_around(conv))
    if x.device.type != "cpu" or not missed:
        return nn.Conv3d.forward(conv, x)
    bias = None if conv.bias is None else conv.bias.float()
    with torch.autocast("cpu", enabled=False):
        wide: Tensor = conv._conv_forward(x.to(dtype).float(), conv.weight.float(), bias)
    return wide.to(dtype)


def repair_gradients(network: nn.Module) -> list[RemovableHandle]:
    """Let the convolutions of ``network``, whoever wrote it, go by :func:`convolve_wholly`.

    Parameters and their names stay as they are, and so does inference. Layers with a ``forward`` of
    their own are left alone; this package's see to it themselves. The handles that are returned
    take the repair back.
    """
    return [
        module.register_forward_hook(_repaired)
        for module in network.modules()
        if isinstance(module, nn.Conv3d) and type(module).forward is nn.Conv3d.forward
        if zeros_around(module)
    ]


def _repaired(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    conv = cast(nn.Conv3d, conv)
    depth, kernel = inputs[0].shape[2], conv.kernel_size[0]
    if output.requires_grad and misses_kernel(output.dtype, depth, kernel, zeros_around(conv)):
        return convolve_wholly(conv, inputs[0])
    return None


def zeros_around(conv: nn.Conv3d) -> int:
    """Return zeros that a convolution puts on each side of its first axis."""
    if conv.padding_mode != "zeros" or conv.padding == "valid":
        return 0
    return conv.kernel_size[0] // 2 if conv.padding == "same" else int(conv.padding[0])
