"""ShaSpec-style network: features that modalities share, and features of their own.

Wang, Chen, Ma, Avery, Hull, Carneiro: Multi-modal Learning with Missing Modality via
Shared-Specific Feature Modelling (CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pmixseg.backbones.base import Backbone
from pmixseg.backbones.layers.lean import CONCATENATED, LeanConv3d
from pmixseg.backbones.layers.norm import NormAct
from pmixseg.backbones.slots import (
    EncodedLatents,
    check_input,
    decode_slots,
    encode_slots,
    join_levels,
    map_slots,
)
from pmixseg.backbones.unet import SLOPE, Encoder, Upsampling, conv_block
from pmixseg.describe import COUNT, Ranges
from pmixseg.slot_sums import choose_slots, weighted_sum
from pmixseg.task import BRATS
from pmixseg.types import Image, Latents, Presence, SegOutput


class ModalityClassifier(nn.Module):
    """Which modality a specific feature map is of, from its mean over voxels."""

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, slots)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits ``[b, M, 1, 1, 1]`` from the one map ``[b, C, d, h, w]``."""
        logits: Tensor = self.linear(maps[0].mean((2, 3, 4)))
        return logits[:, :, None, None, None]


class ShaSpec(Backbone):
    r"""Segment with shared and specific encoders; shared features replace a missing modality.

    With the shared encoder s (one for all modalities) and the specific encoder p_m, at each level

    .. math:: f_m = s(x_m) + R[s(x_m), p_m(x_m)], \qquad
              f_m = \frac{1}{|A|} \sum_{j \in A} s(x_j) \;\text{ for } m \notin A,

    R a 1x1x1 convolution; all f_m are fused by a 1x1x1 convolution and decoded with skips. A latent
    holds f_m and s(x_m) side by side, so it has 2C channels. In training, ``extras`` hold

    * ``shared`` ``[B, M, C, d, h, w]``: s(x_m) of the lowest level, 0 where not encoded;
    * ``modality`` ``[B, M, M]``: logits of a classifier of p_m(x_m);
    * ``encoded`` ``[B, M]``: which of them there are.

    Trained by :class:`~pmixseg.losses.shaspec.ShaSpecCriterion`.

    Args:
        modalities: names of the input channels.
        num_classes: softmax classes, background included.
        width: channels C of the finest level.
        levels: number of resolutions.
        recompute: train with less memory and more time: encoders run again in the backward pass.

    As in the paper: shared and specific encoders, residual fusion, the mean of shared features for
    what is missing, both auxiliary tasks. Different: blocks, widths and decoder are those of
    :class:`~pmixseg.backbones.MultiEncoderUNet`, since the layout of the published network (about
    188 M parameters) was not at hand.
    """

    fillable = False

    ranges = Ranges(width=COUNT, levels=COUNT)

    def __init__(
        self,
        modalities: Sequence[str] = BRATS.modalities,
        num_classes: int = BRATS.num_classes,
        width: int = 16,
        levels: int = 4,
        recompute: bool = False,
    ) -> None:
        widths = [width * 2**k for k in range(levels)]
        strides = [2**k for k in range(levels)]
        super().__init__(modalities, num_classes, [2 * w for w in widths], strides)
        slots = len(self.modalities)
        self.recompute = recompute
        self.shared = Encoder(widths, 0.0)
        self.specific = nn.ModuleList(Encoder(widths, 0.0) for _ in self.modalities)
        self.residual = nn.ModuleList(LeanConv3d(2 * w, w, 1) for w in widths)
        self.fusions = nn.ModuleList(
            nn.Sequential(LeanConv3d(slots * w, w, 1, bias=False), NormAct(w, SLOPE, reuse=True))
            for w in widths
        )
        self.ups = nn.ModuleList(Upsampling(2 * w, w) for w in widths[:-1])
        self.decoders = nn.ModuleList(
            nn.Sequential(conv_block(2 * w, w, 1, 0.0), conv_block(w, w, 1, 0.0))
            for w in widths[:-1]
        )
        self.head = LeanConv3d(width, num_classes, 1)
        self.classifier = ModalityClassifier(widths[-1], slots)

    def encode(self, image: Image, present: Presence) -> Latents:
        """Return the latents of the shown modalities, one per modality and level."""
        check_input(image, present, self.modalities, self.strides)
        shared = encode_slots([self.shared] * len(self.modalities), image, present, self.recompute)
        specific = encode_slots(self.specific, image, present, self.recompute)
        both = map_slots(self._combine, shared, specific)
        lowest = [None if p is None else p[-1:] for p in specific]
        features = join_levels(both, present, len(self.strides))
        flags = [present] * len(features)
        return EncodedLatents(features, self.modalities, flags, encoded=present, pieces=lowest)

    def _combine(self, shared: Sequence[Tensor], specific: Sequence[Tensor]) -> list[Tensor]:
        return [
            torch.cat([s + mix(s, p, prepare=CONCATENATED), s], 1)
            for s, p, mix in zip(shared, specific, self.residual, strict=True)
        ]

    def decode(self, latents: Latents) -> SegOutput:
        """Return the logits that the decoder makes of the latents."""
        fused = [fusion(_slots(latents, level)) for level, fusion in enumerate(self.fusions)]
        maps: list[Tensor] = []
        x = fused[-1]
        for level in reversed(range(len(fused) - 1)):
            x = self.decoders[level](torch.cat([fused[level], self.ups[level](x)], 1))
            maps.append(x)
        extras: dict[str, Tensor] = {}
        if self.training and isinstance(latents, EncodedLatents):
            encoded = latents.encoded[:, :, None, None, None, None]
            shared = latents.features[-1].chunk(2, 2)[1]
            extras["shared"] = torch.where(encoded, shared, 0.0)
            extras["modality"] = decode_slots(self.classifier, latents, [0]).flatten(2)
            extras["encoded"] = latents.encoded
        return SegOutput(self.head(x), latents, extras, maps)


def _slots(latents: Latents, level: int) -> Tensor:
    """Return ``[B, M·C, d, h, w]``, the mean of the shared features where a slot is absent."""
    own, shared = latents.features[level].chunk(2, 2)
    flags = latents.usable[level]
    count = flags.sum(1).clamp(min=1)[:, None, None, None, None]
    mean = weighted_sum(shared, flags.to(shared.dtype), flags) / count
    return choose_slots(flags, own, mean[:, None]).flatten(1, 2)
