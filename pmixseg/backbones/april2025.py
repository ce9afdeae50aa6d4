"""The early-fusion network of the authors' public snippet of April 2025: for comparison only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pmixseg.backbones.monai import cut
from pmixseg.describe import build


def embedding(channels: int) -> nn.Sequential:
    """Build a convolution 3x3x3, batch normalisation, ReLU: the V-Net block of the snippet."""
    return nn.Sequential(
        nn.Conv3d(channels, channels, 3, padding=1), nn.BatchNorm3d(channels), nn.ReLU()
    )


class April2025Network(nn.Module):
    """Segment with the early-fusion network of the snippet of April 2025.

    For :class:`~pmixseg.backbones.EarlyFusion`. Level 0 is the output of the second block, whose
    channels the snippet takes for modalities although both convolutions mix them; the levels
    after it are those of the network behind.

    Args:
        in_channels: number of modalities.
        out_channels: softmax classes.
        network: class of the network behind, by its dotted path.
        arguments: its arguments besides ``spatial_dims``, ``in_channels`` and ``out_channels``.

    Source: docs/method/snippets.md.

    Attributes:
        class_arguments: arguments that name a class by plain text.
    """

    class_arguments = ("network",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        network: str = "monai.networks.nets.SegResNet",
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.embed = embedding(in_channels)
        self.latent = embedding(in_channels)
        sizes = {"spatial_dims": 3, "in_channels": in_channels, "out_channels": out_channels}
        description = {"class_path": network, "init_args": dict(arguments or {})}
        self.network: nn.Module = build(description, **sizes)
        self._halves = cut(self.network, in_channels)
        self.channels = (in_channels, *self._halves.channels)
        self.strides = (1, *self._halves.strides)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the latent with one channel per modality, then the network's own levels."""
        latent = self.latent(self.embed(x))
        return [latent, *self._halves.encode(latent)]

    def decode(self, features: list[Tensor]) -> Tensor | list[Tensor]:
        """Return the logits that the network makes of its levels."""
        logits, extras, _ = self._halves.decode(features[1:], self.training)
        return [logits, *extras.values()] if extras else logits

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return ``decode(encode(x))``."""
        return self.decode(self.encode(x))
