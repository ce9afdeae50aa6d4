"""RFNet: region-aware fusion of modalities (Ding, Yu, Yang; ICCV 2021), in its cheap form.

The published form multiplies every modality by every region map: M·R volumes of C channels per
level. Region descriptors are one matrix product of latents and region maps, and
``Σ_k α_kr x_k p_r = p_r Σ_k α_kr x_k``, so R volumes do. The values are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmixseg.backbones.base import Backbone
from pmixseg.backbones.layers.blocks import (
    SLOPE,
    Decoder,
    Encoder,
    PostNorm,
    SeparateDecoder,
    initialise,
)
from pmixseg.backbones.layers.lean import CONCATENATED, LeanConv3d, sum_of_products, voxel_rows
from pmixseg.backbones.layers.norm import norm_act
from pmixseg.backbones.layers.regions import mix_regions
from pmixseg.backbones.slots import (
    EncodedLatents,
    SlotConv,
    check_input,
    decode_slots,
    encode_slots,
    join_levels,
    masked_weight,
    side_by_side,
)
from pmixseg.describe import COUNT, Ranges
from pmixseg.task import BRATS
from pmixseg.types import Image, Latents, Presence, SegOutput, full_precision

HIDDEN = 128
"""Hidden units of the network that weighs modalities in a region."""
HEAD = 16
"""Hidden channels of the region map's head."""


class SlotBlock(nn.Module):
    """:class:`PostNorm` block whose 1x1x1 convolution reads all slots of a level."""

    def __init__(self, slots: int, width: int, outside: int) -> None:
        super().__init__()
        self.conv = SlotConv(slots, width, outside)

    def forward(self, latents: Latents, level: int, name: str) -> Tensor:
        """Fuse one level into ``[B, outside, D, H, W]``."""
        return norm_act(self.conv(latents, level, name), SLOPE, reuse=True)


class SlotStack(nn.ModuleList):
    """1x1x1 over all slots, 3x3x3, 1x1x1."""

    def __init__(self, slots: int, width: int, middle: int, outside: int) -> None:
        first = SlotBlock(slots, width, middle)
        super().__init__([first, PostNorm(middle, middle), PostNorm(middle, outside, 1)])

    def forward(self, latents: Latents, level: int, name: str) -> Tensor:
        """Fuse one level into ``[B, outside, D, H, W]``."""
        y: Tensor = self[2](self[1](self[0](latents, level, name)))
        return y


class RegionMap(nn.Module):
    """Where each class is likely to be: softmax logits from latents and the decoder so far.

    With ``joins_decoder`` the decoder's map is read too; not at the lowest level.
    """

    def __init__(self, slots: int, width: int, num_classes: int, joins_decoder: bool) -> None:
        super().__init__()
        self.embedding_layer = SlotStack(slots, width, width // 4, width)
        inside = 2 * width if joins_decoder else width
        self.prm_layer = nn.ModuleList(
            [PostNorm(inside, HEAD, 1), LeanConv3d(HEAD, num_classes, 1)]
        )

    def forward(self, latents: Latents, level: int, below: Tensor | None) -> Tensor:
        """Return logits ``[B, R, D, H, W]`` at the level's own resolution."""
        x = self.embedding_layer(latents, level, f"prm.{level}")
        read = (x,) if below is None else (below, x)
        logits: Tensor = self.prm_layer[1](self.prm_layer[0](*read, prepare=CONCATENATED))
        return logits


class ModalWeights(nn.Module):
    """Weights of the modalities in one region, ``σ(W2 LeakyReLU(W1 ·))``; see :func:`weigh`."""

    def __init__(self, slots: int, width: int) -> None:
        super().__init__()
        # Linear maps, kept in the shape and under the names of the published checkpoints.
        self.weight_layer = nn.ModuleDict(
            {"0": nn.Conv3d(slots * width + 1, HIDDEN, 1), "2": nn.Conv3d(HIDDEN, slots, 1)}
        )

    def forward(self, descriptor: Tensor) -> Tensor:
        """Map ``[B, M·C + 1]`` to ``[B, M]``."""
        return weigh(descriptor[:, None], [self])[:, 0]


def weigh(descriptors: Tensor, regions: Sequence[nn.Module]) -> Tensor:
    """Return weights ``[B, R, M]`` of the modalities in all regions from ``[B, R, M·C + 1]``."""

    def linear(name: str, x: Tensor) -> Tensor:
        layers = [cast(nn.Conv3d, cast(ModalWeights, r).weight_layer[name]) for r in regions]
        weight = torch.stack([layer.weight.flatten(1) for layer in layers])
        bias = torch.stack([cast(Tensor, layer.bias) for layer in layers])
        return torch.baddbmm(bias[:, None], x, weight.mT)

    hidden = F.leaky_relu(linear("0", descriptors.transpose(0, 1)), SLOPE)
    return linear("2", hidden).sigmoid().transpose(0, 1)


class RegionFusion(nn.Module):
    """The 1x1x1, 3x3x3, 1x1x1 stack over the concatenated region features."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.fusion_layer = nn.Sequential(
            PostNorm(inside, width, 1), PostNorm(width, width), PostNorm(width, width // 2, 1)
        )

    def forward(self, x: Tensor, mixing: Tensor, regions: Tensor) -> Tensor:
        """Fuse ``p_r Σ_k α_kr x_k``; see :func:`~pmixseg.backbones.layers.regions.mix_regions`.

        ``x`` is ``[B, M·C, D, H, W]``, ``mixing`` ``[B, R·C, M·C]``, ``regions``
        ``[B, R, D, H, W]``.
        """
        first = cast(PostNorm, self.fusion_layer[0]).conv
        mixed = mix_regions(x, mixing, regions, first.weight.flatten(1), first.bias)
        y = norm_act(mixed, SLOPE, reuse=True)
        z: Tensor = self.fusion_layer[2](self.fusion_layer[1](y))
        return z


def _region_means(x: Tensor, regions: Tensor) -> Tensor:
    """Return the mean over voxels of every channel times every region, ``[B, R, M·C]``."""
    # Every modality's mean in every region at once.
    parts, rows = voxel_rows(regions), voxel_rows(x)
    if rows.dtype != torch.float16:
        return sum_of_products(parts, rows) / rows.shape[1]
    with torch.autocast(x.device.type, enabled=False):  # a sum over voxels is beyond float16
        return sum_of_products(parts.float(), rows.float()) / rows.shape[1]


class RegionAwareFusion(nn.Module):
    r"""Fuse the modalities of a level region by region, with a short cut beside it.

    With masked latents x_k, region map p_r and v over voxels,

    .. math::
        g_{k,r} = \frac{\mathrm{mean}_v(x_k p_r)}{\bar p_r}, \quad
        \bar p_r = \mathrm{mean}_v(p_r) + 10^{-7}, \quad
        \alpha_{\cdot,r} = \sigma(W^2_r\,\mathrm{LReLU}(W^1_r[g_{1,r},\dots,g_{M,r},\bar p_r]))

    and the output is ``[stack(p_1 Σ_k α_k1 x_k, …, p_R Σ_k α_kR x_k), short_cut(x_1, …, x_M)]``.
    """

    def __init__(self, slots: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.width = width
        self.modal_fusion = nn.ModuleList(ModalWeights(slots, width) for _ in range(num_classes))
        self.region_fusion = RegionFusion(num_classes * width, width)
        self.short_cut = SlotStack(slots, width, width, width // 2)

    def forward(self, latents: Latents, level: int, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Fuse a level; return the two halves of the result, ``[B, C/2, D, H, W]`` each.

        Regions ``[B, R, D, H, W]`` sum to 1 over R; no gradient flows into them.
        """
        x = side_by_side(latents, level)
        flags = latents.usable[level]
        regions = regions.detach().to(x.dtype)
        mean = full_precision(regions).mean((2, 3, 4))[:, :, None] + 1e-7
        inside = masked_weight(_region_means(x, regions), flags) / mean
        weights = weigh(torch.cat([inside, mean], 2), list(self.modal_fusion))
        mixing = masked_weight(self._spread(weights), flags)
        fused = self.region_fusion(x, mixing, regions)
        return fused, self.short_cut(latents, level, f"rfm.{level}")

    def _spread(self, weights: Tensor) -> Tensor:
        """Return α ``[B, R, M]`` as the kernel of ``Σ_k α_kr x_k``, ``[B, R·C, M·C]``."""
        samples, regions, slots = weights.shape
        width = self.width
        each = torch.eye(width, device=weights.device, dtype=weights.dtype)
        wide = weights[:, :, None, :, None] * each[:, None, :]
        return wide.reshape(samples, regions * width, slots * width)


class RegionDecoder(Decoder):
    """The fused decoder: region map and region-aware fusion at every level."""

    def __init__(self, slots: int, widths: Sequence[int], num_classes: int) -> None:
        super().__init__(widths, num_classes, PostNorm)
        for level, width in enumerate(widths, 1):
            joins = level < len(widths)
            self[f"RFM{level}"] = RegionAwareFusion(slots, width, num_classes)
            self[f"prm_generator{level}"] = RegionMap(slots, width, num_classes, joins)

    def forward(self, latents: Latents) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Decode the latents.

        Logits come first; then the region maps' logits, finest first, each at its own resolution;
        then the feature maps after every join, finest last.
        """
        regions: list[Tensor] = []
        maps: list[Tensor] = []
        x: Tensor | None = None
        for level in range(self.depth, 0, -1):
            if x is not None:
                x = self.up(level, x)
            logits = self[f"prm_generator{level}"](latents, level - 1, x)
            regions.insert(0, logits)
            fused = self[f"RFM{level}"](latents, level - 1, logits.softmax(1))
            if x is None:
                x = torch.cat(fused, 1)
            else:
                x = self.join(level, *fused, x)
                maps.append(x)
        return self["seg_layer"](x), regions, maps


class RFNet(Backbone):
    """Segment with RFNet, for any modalities, classes and patches.

    Source: Ding et al., RFNet (ICCV 2021).

    Four levels at strides 1, 2, 4, 8. Trained by :class:`~pmixseg.losses.rfnet.RFNetCriterion`;
    in training, ``extras`` hold

    * ``ds1 … ds4``: logits of the region maps, finest first, at strides 1, 2, 4, 8. Named so that
      :class:`~pmixseg.losses.DiceCE` trains them too: without a loss of their own they stay random;
    * ``separate`` ``[B, M, num_classes, D, H, W]`` and ``separate_slots`` ``[B, M]``: logits of
      the shared decoder of single modalities, and where there are any.

    Args:
        modalities: names of the input channels.
        num_classes: softmax classes, background included; also the regions of the fusion.
        width: channels at the finest level, at least 4; 16 in the paper.
        separate: which modalities the separate decoder is trained on: every encoded one
            (``encoded``; the paper's rule, if everything acquired is encoded) or ``none``, without
            the decoder.
        recompute: train with less memory and more time: encoders run again in the backward pass.

    Faithful to the published code: blocks, padding (by reflection in region maps and fusions, too),
    parameter count (8.985 M). Different: the cheap form above, and logits for probabilities.
    """

    ranges = Ranges(width=COUNT)

    def __init__(
        self,
        modalities: Sequence[str] = BRATS.modalities,
        num_classes: int = BRATS.num_classes,
        width: int = 16,
        separate: Literal["encoded", "none"] = "encoded",
        recompute: bool = False,
    ) -> None:
        widths = [width * 2**k for k in range(4)]
        super().__init__(modalities, num_classes, widths, [1, 2, 4, 8])
        self.recompute = recompute
        slots = len(self.modalities)
        self.encoders = nn.ModuleList(Encoder(widths, PostNorm) for _ in self.modalities)
        self.decoder_fuse = RegionDecoder(slots, widths, num_classes)
        self.decoder_sep = (
            SeparateDecoder(widths, num_classes, PostNorm) if separate == "encoded" else None
        )
        # The published code trains the separate decoder on modalities that are not shown, too.
        self.needs_acquired = self.decoder_sep is not None
        initialise(self)

    def encode(self, image: Image, present: Presence) -> Latents:
        """Return the latents of the shown modalities, one per modality and level."""
        check_input(image, present, self.modalities, self.strides, least=2)
        pieces = encode_slots(self.encoders, image, present, self.recompute)
        features = join_levels(pieces, present, len(self.strides))
        flags = [present] * len(features)
        return EncodedLatents(features, self.modalities, flags, encoded=present, pieces=pieces)

    def decode(self, latents: Latents) -> SegOutput:
        """Return the logits that the decoder makes of the latents."""
        logits, regions, maps = self.decoder_fuse(latents)
        extras: dict[str, Tensor] = {}
        if self.training:
            extras = {f"ds{level}": region for level, region in enumerate(regions, 1)}
            if self.decoder_sep is not None and isinstance(latents, EncodedLatents):
                extras["separate"] = decode_slots(self.decoder_sep, latents, range(4))
                extras["separate_slots"] = latents.encoded
        return SegOutput(logits, latents, extras, maps)
