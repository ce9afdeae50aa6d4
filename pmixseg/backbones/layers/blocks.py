"""Convolution blocks, encoder and decoder that RFNet and mmFormer share.

Both use instance norm without parameters, LeakyReLU 0.2, reflect padding (mmFormer's fusions alone
pad with zeros) and trilinear upsampling with aligned corners; RFNet normalises after a convolution,
mmFormer before it. Names of the parts are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from pmixseg.backbones.layers.grouped import Groupable
from pmixseg.backbones.layers.lean import (
    AS_IT_IS,
    CONCATENATED,
    UPSAMPLED,
    LeanConv3d,
    Padding,
    Prepare,
)
from pmixseg.backbones.layers.norm import norm_act

SLOPE = 0.2
"""Negative slope of every LeakyReLU."""


class PostNorm(nn.Module):
    """Convolution, instance norm, LeakyReLU (RFNet).

    ``size`` is 1 or 3; ``padding`` is that of a kernel larger than 1.
    """

    def __init__(
        self,
        inside: int,
        outside: int,
        size: int = 3,
        stride: int = 1,
        padding: Padding = "reflect",
    ) -> None:
        super().__init__()
        self.conv = LeanConv3d(inside, outside, size, stride, padding)

    def forward(self, *inputs: Tensor, prepare: Prepare = AS_IT_IS) -> Tensor:
        """Transform what ``prepare`` makes of the inputs, ``[B, C, D, H, W]``."""
        return norm_act(self.conv(*inputs, prepare=prepare), SLOPE, reuse=True)


class PreNorm(PostNorm):
    """Instance norm, LeakyReLU, convolution (mmFormer); arguments as :class:`PostNorm`."""

    def forward(self, *inputs: Tensor, prepare: Prepare = AS_IT_IS) -> Tensor:
        """Transform what ``prepare`` makes of the inputs, ``[B, C, D, H, W]``."""
        y: Tensor = self.conv(norm_act(prepare.plain(*inputs), SLOPE))
        return y


Block = Callable[..., nn.Module]
"""Makes a :class:`PostNorm` or a :class:`PreNorm`."""


class Encoder(nn.ModuleDict, Groupable):
    """Encoder of one modality: per level ``x = c1(x); x = x + c3(c2(x))``, c1 with stride 2.

    Widths are channels per level, finest first; mmFormer's ``first`` has nothing to normalise.
    """

    def __init__(self, widths: Sequence[int], block: Block, first: Block | None = None) -> None:
        super().__init__()
        self.depth = len(widths)
        inside = 1
        for level, width in enumerate(widths, 1):
            begin = first if first and level == 1 else block
            self[f"e{level}_c1"] = begin(inside, width, stride=1 if level == 1 else 2)
            self[f"e{level}_c2"] = block(width, width)
            self[f"e{level}_c3"] = block(width, width)
            inside = width

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return feature maps of ``[b, 1, D, H, W]``, finest first."""
        features = []
        for level in range(1, self.depth + 1):
            x = self[f"e{level}_c1"](x)
            x = x + self[f"e{level}_c3"](self[f"e{level}_c2"](x))
            features.append(x)
        return features


class Decoder(nn.ModuleDict):
    """Parts of a decoder that doubles the resolution and joins a skip connection per level."""

    def __init__(self, widths: Sequence[int], num_classes: int, block: Block) -> None:
        super().__init__()
        self.depth = len(widths)
        for level in range(self.depth - 1, 0, -1):
            below, width = widths[level], widths[level - 1]
            self[f"d{level}_c1"] = block(below, width)
            self[f"d{level}_c2"] = block(2 * width, width)
            self[f"d{level}_out"] = block(width, width, 1)
        self["seg_layer"] = LeanConv3d(widths[0], num_classes, 1)

    def up(self, level: int, x: Tensor) -> Tensor:
        """Upsample from level ``level + 1`` (levels count from 1 here) to ``level``."""
        y: Tensor = self[f"d{level}_c1"](x, prepare=UPSAMPLED)
        return y

    def join(self, level: int, *maps: Tensor) -> Tensor:
        """Fuse upsampled map and skip connection, concatenated in the given order."""
        joined = self[f"d{level}_c2"](*maps, prepare=CONCATENATED)
        y: Tensor = self[f"d{level}_out"](joined)
        return y


class SeparateDecoder(Decoder):
    """U-Net decoder on the features of one modality, shared by all; training only."""

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return logits ``[b, num_classes, D, H, W]`` from feature maps, finest first."""
        x = features[-1]
        for level in range(self.depth - 1, 0, -1):
            x = self.join(level, self.up(level, x), features[level - 1])
        logits: Tensor = self["seg_layer"](x)
        return logits


def initialise(module: nn.Module, slope: float = 0.0) -> None:
    """Draw the weights of every 3-D convolution as the papers' code does (Kaiming normal)."""
    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            nn.init.kaiming_normal_(part.weight, a=slope)
