"""DeMoSeg: each modality has a feature group of its own and groups that stand for the others.

Decoupling Feature Representations of Ego and Other Modalities for Incomplete Multi-modal Brain
Tumor Segmentation (kk42yy/DeMoSeg at 73cd4bb).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmixseg.backbones.base import Backbone
from pmixseg.backbones.layers.grouped import Groupable, map_groups
from pmixseg.backbones.layers.lean import LeanConv3d, fast_layout, mix_channels
from pmixseg.backbones.layers.norm import NormAct, norm_act
from pmixseg.backbones.slots import check_input, encode_slots, join_levels
from pmixseg.backbones.unet import SLOPE, Upsampling, conv_block, draw_weights
from pmixseg.describe import COUNT, Range, Ranges
from pmixseg.errors import InputError
from pmixseg.execution import runs_lean
from pmixseg.task import BRATS
from pmixseg.types import Image, Latents, Presence, SegOutput

PUBLISHED_ORDER = ("t1", "t1ce", "t2", "flair")
"""Neighbours in pairs: T1 and T1ce stand for each other first, and T2 and FLAIR."""
WIDEST = 320


class ChannelOrder(nn.Module):
    r"""Convolution, and channels added to each other in the order of their weights (CSSA).

    .. math:: y = \mathrm{LReLU}(\mathrm{IN}(\mathrm{conv}(x))), \qquad
              o = \operatorname{argsort} \sigma(W_2 \mathrm{LReLU}(W_1 \bar y)), \qquad
              \mathrm{LReLU}(\mathrm{IN}(y + y_o))

    A sorting passes no gradient on, so W₁ and W₂ stay what they are drawn as, as in the
    published code. Channels of several encoders are sorted each among their own.

    Args:
        width: channels.
        descending: largest weight first.
        all_descending: the same of all encoders that may run together with this one, and of it.
    """

    def __init__(
        self, width: int, descending: bool = False, all_descending: Sequence[bool] = ()
    ) -> None:
        super().__init__()
        self.width = width
        self.descending, self.all_descending = descending, tuple(all_descending)
        self.conv = LeanConv3d(width, width, 3, 1, "zeros", bias=False)
        hidden = max(width // 4, 1)
        self.weigh = nn.Sequential(
            nn.Linear(width, hidden), nn.LeakyReLU(SLOPE), nn.Linear(hidden, width), nn.Sigmoid()
        ).requires_grad_(False)
        self.norm = NormAct(width, SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, C, D, H, W]`` to the same shape."""
        y = norm_act(self.conv(x), SLOPE)
        # In bfloat16 many weights would be equal, and their order a matter of chance.
        with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
            weights = y.to(next(self.weigh.parameters()).dtype).mean((2, 3, 4))
            for layer in self.weigh:
                if isinstance(layer, nn.Linear):
                    weights = map_groups(layer, weights)
                else:
                    weights = layer(weights)
            order = self._order(weights)
        if runs_lean(y):
            # A product with I + P for the permutation P: a fifth of the time, and exact in the full
            # precision of a CPU.
            one = torch.eye(y.shape[1], dtype=y.dtype)
            added = mix_channels(y, one + one[order])
        else:
            added = y + y.gather(1, order[:, :, None, None, None].expand_as(y))
        z: Tensor = self.norm(added)
        return z

    def _order(self, weights: Tensor) -> Tensor:
        """Order channels by their weights, ``[b, C]``, or ``[b, M·C]`` of M encoders together."""
        if weights.shape[1] == self.width:
            return weights.argsort(1, descending=self.descending)
        signs = [-1.0 if descending else 1.0 for descending in self.all_descending]
        sign = weights.new_tensor(signs)[:, None]
        own = (weights.view(len(weights), -1, self.width) * sign).argsort(2)
        first = torch.arange(0, weights.shape[1], self.width, device=weights.device)
        return (own + first[:, None]).flatten(1)


class Stem(nn.Sequential, Groupable):
    """First features of one modality, as a list of one level."""

    def __init__(self, width: int, descending: bool, all_descending: Sequence[bool]) -> None:
        super().__init__(
            conv_block(1, width, 1, 0.0), ChannelOrder(width, descending, all_descending)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map ``[b, 1, D, H, W]`` to ``[b, C, D, H, W]``."""
        return [self[1](self[0](x))]


class DeMoSeg(Backbone):
    """Segment with DeMoSeg, for any modalities, classes and patches.

    The C channels of a modality's first features are groups: group 0 for itself, group j for the
    modality whose place differs from its own by j, bit by bit (``place ^ j``). The place of each
    modality is filled by the first group whose modality is shown, beginning with its own: one map
    of C/G channels per place, joined, goes through a U-Net. So a missing modality costs nothing and
    needs no fill. In training ``extras`` hold ``ds1 …``, logits of coarser decoder levels, all but
    the coarsest.

    Args:
        modalities: names of the input channels.
        num_classes: softmax classes, background included.
        width: channels of the finest level, a multiple of the number of groups G (the next power
            of 2 from the number of modalities, 4 of BraTS); 32 in the published code.
        levels: number of resolutions; 6 there. Patches are padded to multiples of 2^(levels-1).
        order: places of the modalities; by default the published ones first, then any others.

    Raises:
        InputError: a width that the groups do not divide, or an order of other modalities.

    As the published code: the stem, groups and their order of compensation, channel ordering,
    widths (doubled up to 320), decoder, deep supervision. Different: any number of modalities;
    convolutions before a norm have no bias, which the norm would remove; patches of any size.
    """

    fillable = False

    ranges = Ranges(width=COUNT, levels=Range(2))

    def __init__(
        self,
        modalities: Sequence[str] = BRATS.modalities,
        num_classes: int = BRATS.num_classes,
        width: int = 32,
        levels: int = 6,
        order: Sequence[str] | None = None,
    ) -> None:
        super().__init__(modalities, num_classes, [width], [1])
        places = self._places(order)
        # As many groups as modalities, or the next power of 2: ``place ^ j`` stays below it.
        self.groups = 1 << (len(places) - 1).bit_length()
        if width % self.groups:
            raise InputError(
                f"DeMoSeg: width is {width}; use a multiple of {self.groups}, the number of groups "
                f"for {len(places)} modalities."
            )
        self.places = [self.modalities.index(m) for m in places]
        # T1 sorts its channels upwards, the others downwards, as the published code does.
        descending = [m != "t1" for m in self.modalities]
        self.stems = nn.ModuleList(Stem(width, own, descending) for own in descending)
        # One group per place goes on; with 3 modalities of 4 groups that is fewer channels.
        fused = len(places) * (width // self.groups)
        self.join = nn.Identity() if fused == width else LeanConv3d(fused, width, 1)
        # A U-Net over the joined places.
        widths = [min(width * 2**k, WIDEST) for k in range(levels)]
        self.downs = nn.ModuleList(
            nn.Sequential(conv_block(inside, outside, 2, 0.0), ChannelOrder(outside))
            for inside, outside in pairwise(widths)
        )
        self.ups = nn.ModuleList(Upsampling(below, w, bias=False) for w, below in pairwise(widths))
        self.decoders = nn.ModuleList(
            nn.Sequential(conv_block(2 * w, w, 1, 0.0), ChannelOrder(w)) for w in widths[:-1]
        )
        self.heads = nn.ModuleList(
            LeanConv3d(w, num_classes, 1, bias=False) for w in widths[: max(levels - 2, 1)]
        )
        self.apply(draw_weights)

    def _places(self, order: Sequence[str] | None) -> list[str]:
        """Return the modalities in the order of their places."""
        if order is None:
            published = [m for m in PUBLISHED_ORDER if m in self.modalities]
            return [*published, *(m for m in self.modalities if m not in published)]
        if sorted(order) != sorted(self.modalities):
            raise InputError(
                f"DeMoSeg: order is {list(order)}; name each of {list(self.modalities)} once."
            )
        return list(order)

    def encode(self, image: Image, present: Presence) -> Latents:
        """Encode every modality, each by itself."""
        check_input(image, present, self.modalities, self.strides)
        pieces = encode_slots(self.stems, image, present)
        return Latents(join_levels(pieces, present, 1), self.modalities, [present])

    def compensated(self, latents: Latents) -> Tensor:
        """Fill every place from the nearest modality that is shown, ``[B, P·C/G, D, H, W]``."""
        features = latents.features[0]
        samples, slots, width = features.shape[:3]
        shape = (samples, slots, self.groups, width // self.groups, *features.shape[3:])
        grouped = features.reshape(shape)
        usable = latents.usable[0]
        none = usable.new_zeros(samples, self.groups - slots)
        shown = torch.cat([usable[:, self.places], none], 1)  # by place, then places without one
        steps = torch.arange(self.groups, device=shown.device)
        others = torch.arange(slots, device=shown.device)[:, None] ^ steps  # [P, G]
        first = shown[:, others].to(torch.uint8).argmax(2)  # [B, P], the nearest group shown
        source = others.expand(samples, -1, -1).gather(2, first[:, :, None])[:, :, 0]
        slot = torch.tensor(self.places, device=shown.device)[source.clamp_max(slots - 1)]
        rows = torch.arange(samples, device=shown.device)[:, None]
        taken: Tensor = grouped[rows, slot, first].flatten(1, 2)
        return taken

    def decode(self, latents: Latents) -> SegOutput:
        """Segment from the usable slots."""
        x = fast_layout(self.join(self.compensated(latents)))
        size = x.shape[2:]
        # Sides that halve evenly down to two voxels at the coarsest level.
        unit = 2 ** len(self.downs)
        padded = [max(-(-side // unit), 2) * unit for side in size]
        x = F.pad(
            x,
            [n for side, to in zip(size[::-1], padded[::-1], strict=True) for n in (0, to - side)],
        )
        skips = [x]
        for down in self.downs:
            skips.append(down(skips[-1]))
        x = skips.pop()
        extras: dict[str, Tensor] = {}
        maps: list[Tensor] = []
        for level in reversed(range(len(self.downs))):
            x = self.decoders[level](torch.cat([self.ups[level](x), skips[level]], 1))
            # Maps are cut back to the image, where its sides allow it.
            whole = all(side % 2**level == 0 for side in size)
            if whole:
                kept = x[:, :, : size[0] >> level, : size[1] >> level, : size[2] >> level]
                maps.append(kept)
            if level and self.training and whole and level < len(self.heads):
                extras[f"ds{level}"] = self.heads[level](kept)
        return SegOutput(self.heads[0](maps[-1]), latents, extras, maps)
