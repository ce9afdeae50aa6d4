"""mmFormer: transformers within and between modalities (Zhang et al., MICCAI 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pmixseg.backbones.base import Backbone
from pmixseg.backbones.layers.blocks import (
    SLOPE,
    Decoder,
    Encoder,
    PreNorm,
    SeparateDecoder,
    initialise,
)
from pmixseg.backbones.layers.grouped import Groupable
from pmixseg.backbones.layers.lean import LeanConv3d
from pmixseg.backbones.layers.norm import norm_act
from pmixseg.backbones.slots import (
    EncodedLatents,
    SlotConv,
    check_input,
    decode_slots,
    encode_slots,
    join_levels,
)
from pmixseg.borrowed import Borrowed
from pmixseg.describe import COUNT, FRACTION, Ranges
from pmixseg.errors import InputError
from pmixseg.task import BRATS
from pmixseg.types import Image, Latents, Presence, SegOutput

LEVELS = 5
BEFORE_TRANSFORMER = (0, 1, 2, 3, 5)
"""Which outputs of :class:`ModalityEncoder` are purely convolutional."""


class TransformerLayer(nn.Module):
    """Let every token read all others, then change each by two linear layers.

    ``x ← x + pos; x ← x + drop(attn(LN(x))); x ← x + FF(LN(x))``.

    Multi-head self-attention with a bias-free query, key and value projection; FF is linear, GELU,
    linear. Dropout after softmax, projection, attention and both linear maps.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm_feed = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, hidden)
        self.feed_out = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Transform tokens ``[B, N, C]``; ``position`` is ``[1, N, C]``."""
        x = x + position
        x = x + self.drop(self.drop(self._attend(self.norm_attention(x))))
        hidden = self.drop(F.gelu(self.feed_in(self.norm_feed(x))))
        fed: Tensor = x + self.drop(self.feed_out(hidden))
        return fed

    def _attend(self, x: Tensor) -> Tensor:
        samples, tokens, width = x.shape
        split = self.qkv(x).view(samples, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=rate)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(x.shape))
        return out


class Convolutions(Groupable):
    """Convolutional part of a modality's encoder: levels 1 to 5, and tokens as a volume."""

    def __init__(self, encoder: nn.Module, embed: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.embed = embed

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return feature maps of ``[b, 1, D, H, W]``, finest first; last the tokens."""
        features: list[Tensor] = self.encoder(x)
        return [*features, self.embed(features[-1])]


class ModalityEncoder(nn.Module):
    """Convolutional encoder and intra-modal transformer of one modality.

    Positions are kept for ``grid`` tokens per axis; other grids interpolate them.
    """

    def __init__(
        self,
        widths: Sequence[int],
        embedding: int,
        heads: int,
        hidden: int,
        dropout: float,
        grid: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.encoder = Encoder(widths, PreNorm, first=LeanConv3d)
        self.encode_conv = LeanConv3d(widths[-1], embedding, 1)
        self.pos = nn.Parameter(torch.zeros(1, grid[0] * grid[1] * grid[2], embedding))
        self.transformer = TransformerLayer(embedding, heads, hidden, dropout)
        self.grid = grid
        # Borrowed, so that weights keep their names in checkpoints.
        self.convolutions = Borrowed(Convolutions(self.encoder, self.encode_conv))

    def position(self, grid: Sequence[int]) -> Tensor:
        """Return positions ``[1, N, C]`` of the N tokens of a grid."""
        if tuple(grid) == self.grid:
            return self.pos
        d, h, w = self.grid
        volume = rearrange(self.pos, "1 (d h w) c -> 1 c d h w", d=d, h=h, w=w)
        resized = F.interpolate(volume, list(grid), mode="trilinear", align_corners=True)
        return rearrange(resized, "1 c d h w -> 1 (d h w) c")

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Transform the tokens, the last of what :class:`Convolutions` returns.

        They are levels 1 to 4, the transformed tokens as a volume, level 5 before the transformer.
        """
        *finer, lowest, embedded = features
        position = self.position(embedded.shape[2:])
        tokens = self.transformer(embedded.flatten(2).transpose(1, 2), position)
        return [*finer, tokens.transpose(1, 2).reshape(embedded.shape), lowest]


class SlotPreNorm(nn.Module):
    """:class:`PreNorm` block whose 1x1x1 convolution reads all slots of a level."""

    def __init__(self, slots: int, width: int) -> None:
        super().__init__()
        # The norm treats every channel of every slot by itself and keeps an absent slot 0.
        self.conv = SlotConv(slots, width, width, before=partial(norm_act, slope=SLOPE))

    def forward(self, latents: Latents, level: int, name: str) -> Tensor:
        """Fuse one level into ``[B, C, D, H, W]``."""
        y: Tensor = self.conv(latents, level, name)
        return y


class Fusion(nn.Module):
    """1x1x1 over all slots, 3x3x3, 1x1x1; zero padding."""

    def __init__(self, first: nn.Module, width: int) -> None:
        super().__init__()
        self.fusion_layer = nn.ModuleList(
            [first, PreNorm(width, width, padding="zeros"), PreNorm(width, width, 1)]
        )

    def forward(self, *args: Tensor | Latents | int | str) -> Tensor:
        """Fuse what the first block takes."""
        x = self.fusion_layer[0](*args)
        y: Tensor = self.fusion_layer[2](self.fusion_layer[1](x))
        return y


class FusedDecoder(Decoder):
    """Fuses every level and decodes, with logits at every coarser level."""

    def __init__(self, slots: int, widths: Sequence[int], num_classes: int) -> None:
        super().__init__(widths, num_classes, PreNorm)
        for level, width in enumerate(widths, 1):
            lowest = level == len(widths)
            first = PreNorm(slots * width, width, 1) if lowest else SlotPreNorm(slots, width)
            self[f"RFM{level}"] = Fusion(first, width)
        for level, width in enumerate(widths[1:], 1):
            self[f"seg_d{level}"] = LeanConv3d(width, num_classes, 1)

    def forward(
        self, latents: Latents, lowest: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """Decode the latents.

        ``lowest`` is the lowest level after the inter-modal transformer, ``[B, M·C, d, h, w]``.
        Logits come first; then in training logits ``ds1 …`` at strides 2, 4, …; then the feature
        maps after every join, finest last.
        """
        extras: dict[str, Tensor] = {}
        maps: list[Tensor] = []
        x = self[f"RFM{self.depth}"](lowest)
        for level in range(self.depth - 1, 0, -1):
            if self.training:
                extras[f"ds{level}"] = self[f"seg_d{level}"](x)
            fused = self[f"RFM{level}"](latents, level - 1, f"rfm.{level}")
            x = self.join(level, fused, self.up(level, x))
            maps.append(x)
        return self["seg_layer"](x), extras, maps


class MMFormer(Backbone):
    """Segment with mmFormer, for any modalities, classes and patches.

    Source: Zhang et al., mmFormer (MICCAI 2022).

    Five levels at strides 1 to 16; the latent of the lowest level is the output of the intra-modal
    transformer. The inter-modal transformer runs in :meth:`decode`, over the tokens of all
    modalities, those of absent ones being 0 (plus their position). In training, ``extras`` hold
    ``ds1 … ds4`` (strides 2 to 16), ``separate`` and ``separate_slots`` as in
    :class:`~pmixseg.backbones.RFNet`; train with :class:`~pmixseg.losses.rfnet.RFNetCriterion`.

    Args:
        modalities: names of the input channels.
        num_classes: softmax classes, background included.
        width: channels at the finest level; 8 in the paper.
        patch_size: patch that learned positions are kept for; other patches interpolate them.
        embedding: channels of a token, 512 in the paper.
        heads: attention heads; divides ``embedding``.
        hidden: hidden channels of the feed-forward part.
        dropout: dropout of the transformers.
        separate: which modalities the separate decoder is trained on; as in ``RFNet``.
        official: arrange the tokens of the inter-modal transformer as the published code does: its
            result, (modality, voxel) by channel, is read as if it were voxel by (modality,
            channel), which scrambles voxels and modalities. For published weights only.
        recompute: train with less memory and more time: encoders run again in the backward pass.

    Raises:
        InputError: a patch size that 16 does not divide, or heads that do not divide ``embedding``.

    Faithful to the published code: blocks, padding, transformer, parameter count (36.65 M with
    four unused ``decode_conv``, 36.39 M here). Different: the token order unless ``official``.
    """

    ranges = Ranges(width=COUNT, heads=COUNT, hidden=COUNT, dropout=FRACTION)

    def __init__(
        self,
        modalities: Sequence[str] = BRATS.modalities,
        num_classes: int = BRATS.num_classes,
        width: int = 8,
        patch_size: int | Sequence[int] = 128,
        embedding: int = 512,
        heads: int = 8,
        hidden: int = 4096,
        dropout: float = 0.1,
        separate: Literal["encoded", "none"] = "encoded",
        official: bool = False,
        recompute: bool = False,
    ) -> None:
        widths = [width * 2**k for k in range(LEVELS)]
        strides = [2**k for k in range(LEVELS)]
        super().__init__(modalities, num_classes, [*widths[:-1], embedding], strides)
        sides = (patch_size,) * 3 if isinstance(patch_size, int) else tuple(patch_size)
        if len(sides) != 3 or any(side < 1 or side % strides[-1] for side in sides):
            raise InputError(
                f"MMFormer: patch_size is {patch_size}; give one or three multiples of "
                f"{strides[-1]}."
            )
        if embedding % heads:
            raise InputError(
                f"MMFormer: {heads} heads do not divide an embedding of {embedding}; change one."
            )
        # An encoder and transformer per modality, one transformer between them, one decoder.
        slots = len(self.modalities)
        d, h, w = (side // strides[-1] for side in sides)
        self.encoders = nn.ModuleList(
            ModalityEncoder(widths, embedding, heads, hidden, dropout, (d, h, w))
            for _ in self.modalities
        )
        self.multimodal_transformer = TransformerLayer(embedding, heads, hidden, dropout)
        self.multimodal_decode_conv = LeanConv3d(slots * embedding, slots * widths[-1], 1)
        self.decoder_fuse = FusedDecoder(slots, widths, num_classes)
        self.decoder_sep = (
            SeparateDecoder(widths, num_classes, PreNorm) if separate == "encoded" else None
        )
        self.needs_acquired = self.decoder_sep is not None
        self.official = official
        self.recompute = recompute
        initialise(self)

    def encode(self, image: Image, present: Presence) -> Latents:
        """Return the latents of the shown modalities, one per modality and level."""
        check_input(image, present, self.modalities, self.strides, least=2)
        encoders = self._encoders()
        convolutions = [encoder.convolutions.value for encoder in encoders]
        convolved = encode_slots(convolutions, image, present, self.recompute)
        pieces = [
            None if maps is None else encoder(maps)
            for encoder, maps in zip(encoders, convolved, strict=True)
        ]
        features = join_levels(pieces, present, LEVELS)
        flags = [present] * LEVELS
        return EncodedLatents(features, self.modalities, flags, encoded=present, pieces=pieces)

    def decode(self, latents: Latents) -> SegOutput:
        """Return the logits that the decoder makes of the latents."""
        lowest = self._between(latents.masked(LEVELS - 1))
        logits, extras, maps = self.decoder_fuse(latents, lowest)
        if self.training and self.decoder_sep is not None and isinstance(latents, EncodedLatents):
            extras["separate"] = decode_slots(self.decoder_sep, latents, BEFORE_TRANSFORMER)
            extras["separate_slots"] = latents.encoded
        return SegOutput(logits, latents, extras, maps)

    def _between(self, x: Tensor) -> Tensor:
        """Apply the inter-modal transformer to ``[B, M, C, d, h, w]``; it gives M·C' channels."""
        grid = dict(zip("dhw", x.shape[3:], strict=True))
        positions = [encoder.position(x.shape[3:]) for encoder in self._encoders()]
        tokens = rearrange(x, "b m c d h w -> b (m d h w) c")
        tokens = self.multimodal_transformer(tokens, torch.cat(positions, 1))
        order = "b (d h w m) c" if self.official else "b (m d h w) c"
        volume = rearrange(tokens, f"{order} -> b (m c) d h w", **grid)
        y: Tensor = self.multimodal_decode_conv(volume)
        return y

    def _encoders(self) -> list[ModalityEncoder]:
        return [e for e in self.encoders if isinstance(e, ModalityEncoder)]
