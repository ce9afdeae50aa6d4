"""Inputs that the checks of a backbone use."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from pmixseg.backbones.base import Backbone
from pmixseg.task import all_combinations, presence

NOISE = 100.0
"""Standard deviation of what replaces values that must have no influence."""


class Probe:
    """A copy of the backbone and inputs to try it with."""

    def __init__(self, net: Backbone, size: Sequence[int]) -> None:
        self.net = copy.deepcopy(net)
        self.size = tuple(size)
        tensors = [*net.parameters(), *net.buffers()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        flags = [presence(c, net.modalities) for c in all_combinations(net.modalities)]
        self.combinations = torch.tensor(flags, device=self.device)
        # Two samples with as little in common as there is: the first modality alone, the others.
        alone = torch.zeros(len(net.modalities), dtype=torch.bool, device=self.device)
        alone[0] = True
        self.present = torch.stack([alone, ~alone if len(alone) > 1 else alone])
        self.absent = ~self.present[:, :, None, None, None]
        self.image = self.draw(2)

    def draw(self, samples: int, size: Sequence[int] | None = None) -> Tensor:
        """Draw standard normal images."""
        shape = (samples, len(self.net.modalities), *(size or self.size))
        return torch.randn(shape, device=self.device)

    def eval(self) -> Backbone:
        """Return the backbone in eval mode."""
        return self.net.eval()

    @property
    def splits_slots(self) -> bool:
        """Whether every modality has a slot of its own."""
        return tuple(self.net.slots) == tuple(self.net.modalities)

    def logits(self, net: Backbone, image: Tensor, present: Tensor) -> Tensor:
        """Compute logits without gradients, with the same random numbers every time."""
        torch.manual_seed(0)
        with torch.no_grad():
            return net(image, present).logits


def default_size(net: Backbone) -> tuple[int, int, int]:
    """Return twice the largest stride on every side, at least 8 voxels."""
    side = max(2 * max(net.strides), 8)
    return (side, side, side)
