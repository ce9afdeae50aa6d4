"""Learnable 1x1x1 maps, one per modality."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pmixseg.types import Features


class SlotLinear(nn.Module):
    """A 1x1x1 convolution of its own for every slot, in one matrix product.

    All slots share one parameter tensor, so it is in the graph of every step even when a modality
    is missing from the whole batch; that modality's part then has gradient 0. Without a bias a slot
    of zeros stays zero. ``identity`` starts as the identity instead of at random (needs
    ``inputs == outputs``).
    """

    __call__: Callable[..., Tensor]  # of forward, with its type

    def __init__(
        self, slots: int, inputs: int, outputs: int, bias: bool = False, identity: bool = False
    ) -> None:
        super().__init__()
        weight = torch.empty(slots, outputs, inputs)
        if identity:
            weight.copy_(torch.eye(outputs, inputs).expand_as(weight))
        else:
            # The bound that nn.Conv3d uses: variance 1 / (3 inputs).
            nn.init.uniform_(weight, -(inputs**-0.5), inputs**-0.5)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(slots, outputs, 1)) if bias else None

    def forward(self, features: Features) -> Tensor:
        """Map every voxel; features are finite in every slot."""
        mapped = self.weight.to(features.dtype) @ features.flatten(3)
        if self.bias is not None:
            mapped = mapped + self.bias.to(features.dtype)
        return mapped.view(*mapped.shape[:3], *features.shape[3:])
