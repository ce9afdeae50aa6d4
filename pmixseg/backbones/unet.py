"""The default backbone: a U-Net with one encoder per modality."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from pmixseg.backbones.base import Backbone
from pmixseg.backbones.layers.grouped import Groupable
from pmixseg.backbones.layers.lean import LeanConv3d, leaves_onednn, mix_channels
from pmixseg.backbones.layers.norm import NormAct
from pmixseg.backbones.slots import SlotConv, check_input, encode_slots, join_levels
from pmixseg.describe import COUNT, FRACTION, Range, Ranges
from pmixseg.errors import InputError
from pmixseg.execution import runs_lean
from pmixseg.task import BRATS
from pmixseg.types import Image, Latents, Presence, SegOutput

SLOPE = 0.01
"""Negative slope of every LeakyReLU."""


def conv_block(inside: int, outside: int, stride: int, dropout: float) -> nn.Sequential:
    """Build a convolution 3x3x3, dropout of whole channels, instance norm, LeakyReLU."""
    return nn.Sequential(
        # The norm removes any bias again.
        LeanConv3d(inside, outside, 3, stride, "zeros", bias=False),
        nn.Dropout3d(dropout) if dropout else nn.Identity(),
        NormAct(outside, SLOPE, reuse=True),
    )


def draw_weights(part: nn.Module) -> None:
    """Draw the first weights of a convolution as Kaiming He et al. do, with biases of 0."""
    if isinstance(part, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(part.weight, a=SLOPE)
        if part.bias is not None:
            nn.init.zeros_(part.bias)


class Encoder(Groupable):
    """Encoder of one modality: two convolutions per level, stride 2 between levels.

    ``stem`` is the stride of the first convolution; dropout is of channels, after a convolution.
    """

    def __init__(self, widths: Sequence[int], dropout: float, stem: int = 1) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(
                conv_block(1 if k == 0 else widths[k - 1], width, 2 if k else stem, dropout),
                conv_block(width, width, 1, dropout),
            )
            for k, width in enumerate(widths)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return feature maps of ``[b, 1, D, H, W]``, finest first; see :class:`Groupable`."""
        features = []
        for level in self.levels:
            x = level(x)
            features.append(x)
        return features


class Upsampling(nn.ConvTranspose3d):
    """Transposed convolution whose stride is its size: every voxel becomes a block of voxels.

    Args:
        inside: channels of the input.
        outside: channels of the output.
        size: voxels along a block's side.
        bias: whether to add a bias.
    """

    def __init__(self, inside: int, outside: int, size: int = 2, bias: bool = True) -> None:
        super().__init__(inside, outside, size, size, bias=bias)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return ``[B, C', kD, kH, kW]`` of ``[B, C, D, H, W]``."""
        if not (runs_lean(x) and leaves_onednn(x)):
            return super().forward(x, output_size)
        # A 1x1x1 convolution makes the channels of all voxels of a block, which are then put in
        # their places, in the layout that a CPU convolves fastest.
        size = self.stride[0]
        rows = self.weight.permute(2, 3, 4, 1, 0).flatten(0, 3)
        bias = None if self.bias is None else self.bias.repeat(size**3)
        blocks = mix_channels(x, rows, bias)
        return rearrange(
            blocks, "b (i j k c) d h w -> b (d i) (h j) (w k) c", i=size, j=size, k=size
        ).permute(0, 4, 1, 2, 3)


class Fusion(nn.Module):
    """``LeakyReLU(norm(Σ_m W_m f_m))``: the norm evens out how many modalities are summed."""

    def __init__(self, slots: int, width: int) -> None:
        super().__init__()
        self.conv = SlotConv(slots, width, width, bias=False)
        self.norm = NormAct(width, SLOPE, reuse=True)

    def forward(self, latents: Latents, level: int) -> Tensor:
        """Return the fused features ``[B, C, D, H, W]`` of one level."""
        fused: Tensor = self.norm(self.conv(latents, level, f"fusion.{level}"))
        return fused


class MultiEncoderUNet(Backbone):
    """Segment with one U-Net encoder per modality, fusion at every level, and one decoder.

    Level l has ``width·2^l`` channels at stride ``stem·2^l``. A level's slots are fused by
    ``LeakyReLU(IN(Σ_m W_m f_m))``; absent slots are 0. Convolution blocks, strided down- and
    transposed up-sampling follow nnU-Net (Isensee et al., Nature Methods 2021); one encoder per
    modality with features set to 0 follows RFNet (Ding et al., ICCV 2021).

    Args:
        modalities: names of the input channels.
        num_classes: softmax classes, background included.
        width: channels at the finest level.
        levels: number of resolutions L, 2 to 9; patches must be divisible by
            ``stem·2^(L-1)``.
        deep_supervision: in training, ``extras["ds1"], …, extras["ds{L-2}"]`` hold logits
            ``[B, num_classes, …]`` of the decoder's level k.
        dropout: probability of dropping a whole channel after a convolution.
        stem: stride of the first convolution, 1 or 2. With 2 the network never works at full
            resolution, and a transposed convolution draws its logits there: about a fifth of the
            cost at equal width, for quick studies on a CPU.
        recompute: train with less memory and more time: encoders run again in the backward pass.

    Raises:
        InputError: another number of levels, or another stem.

    Example:
        >>> import torch
        >>> net = MultiEncoderUNet(width=4, levels=3)
        >>> out = net(torch.zeros(1, 4, 16, 16, 16), torch.ones(1, 4, dtype=torch.bool))
        >>> out.logits.shape, [tuple(f.shape) for f in out.latents.features][-1]
        (torch.Size([1, 4, 16, 16, 16]), (1, 4, 16, 4, 4, 4))
    """

    # More levels than 9 divide no brain, and ask for more memory than there is.
    ranges = Ranges(width=COUNT, levels=Range(2, 9), dropout=FRACTION)

    def __init__(
        self,
        modalities: Sequence[str] = BRATS.modalities,
        num_classes: int = BRATS.num_classes,
        width: int = 16,
        levels: int = 4,
        deep_supervision: bool = False,
        dropout: float = 0.0,
        stem: int = 1,
        recompute: bool = False,
    ) -> None:
        if stem not in (1, 2):
            raise InputError(f"MultiEncoderUNet: stem is {stem}; give 1 or 2.")
        widths = [width * 2**k for k in range(levels)]
        super().__init__(modalities, num_classes, widths, [stem * 2**k for k in range(levels)])
        self.recompute = recompute
        # An encoder per modality; at every level their features are fused into one.
        self.encoders = nn.ModuleList(Encoder(widths, dropout, stem) for _ in self.modalities)
        self.fusions = nn.ModuleList(Fusion(len(self.modalities), w) for w in widths)
        self.ups = nn.ModuleList(Upsampling(2 * w, w) for w in widths[:-1])
        self.decoders = nn.ModuleList(
            nn.Sequential(conv_block(2 * w, w, 1, dropout), conv_block(w, w, 1, dropout))
            for w in widths[:-1]
        )
        # One head on the finest map, or one per level.
        supervised = levels - 1 if deep_supervision else 1
        self.heads = nn.ModuleList(LeanConv3d(w, num_classes, 1) for w in widths[:supervised])
        if stem > 1:
            self.heads[0] = Upsampling(width, num_classes, stem)
        self.apply(draw_weights)

    def encode(self, image: Image, present: Presence) -> Latents:
        """Return a latent per modality and level; encoder m sees only samples with modality m."""
        check_input(image, present, self.modalities, self.strides)
        pieces = encode_slots(self.encoders, image, present, self.recompute)
        features = join_levels(pieces, present, len(self.strides))
        return Latents(features, self.modalities, [present] * len(features))

    def decode(self, latents: Latents) -> SegOutput:
        """Return the logits that the decoder makes of the latents."""
        fused = [fusion(latents, level) for level, fusion in enumerate(self.fusions)]
        extras: dict[str, Tensor] = {}
        maps: list[Tensor] = []
        x = fused[-1]
        for level in reversed(range(len(fused) - 1)):
            x = self.decoders[level](torch.cat([fused[level], self.ups[level](x)], 1))
            maps.append(x)
            if level and self.training and level < len(self.heads):
                extras[f"ds{level}"] = self.heads[level](x)
        return SegOutput(self.heads[0](x), latents, extras, maps)
