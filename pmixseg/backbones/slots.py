"""What multi-encoder backbones share: encoders that skip absent samples, and slot fusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmixseg.errors import InputError
from pmixseg.types import Image, Latents, Presence


def check_input(
    image: Image,
    present: Presence,
    modalities: Sequence[str],
    strides: Sequence[int],
    least: int = 1,
) -> None:
    """Refuse an image that a backbone cannot process.

    Args:
        image: ``[B, M, D, H, W]``.
        present: ``[B, M]``.
        modalities: names of the backbone's input channels.
        strides: the backbone's strides, finest first.
        least: voxels that each side must have at the lowest level; reflect padding needs 2.

    Raises:
        InputError: wrong number of channels or flags, or a side that the largest stride does not
            divide, or so small a patch that one voxel is left (instance norm would erase it).
    """
    if image.ndim != 5 or image.shape[1] != len(modalities) or image.shape[:2] != present.shape:
        raise InputError(
            f"the network takes images [B, {len(modalities)}, D, H, W] with the channels "
            f"{list(modalities)} and one flag for each, but got an image "
            f"{list(image.shape)} and flags {list(present.shape)}; give one channel per modality."
        )
    stride = max(strides)
    sides = image.shape[2:]
    lowest = [side / stride for side in sides]
    if any(side % 1 or side < least for side in lowest) or max(lowest) < 2:
        size = f"{2 * stride} or more" + ("" if least > 1 else " on one side at least")
        raise InputError(
            f"a patch of {'x'.join(map(str, sides))} voxels does not fit this network; use "
            f"multiples of {stride}, {size}."
        )


# Which rows an encoder sees is data. Dynamo would compile one graph for each of the 15^B patterns
# of presence; kept out of it, every encoder is compiled once.
@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call]  # torch ships no type
def encode_slots(
    encoders: Sequence[nn.Module] | nn.ModuleList, image: Image, present: Presence
) -> list[Tensor]:
    """Run encoder m on channel m of the samples that have modality m.

    Args:
        encoders: one per modality; each maps ``[b, 1, D, H, W]`` to a list of feature maps, finest
            first.
        image: ``[B, M, D, H, W]``.
        present: ``[B, M]``.

    Returns:
        Per level ``[B, M, C, d, h, w]``; slots that are not present are 0.

    Raises:
        InputError: no sample has any modality.
    """
    flags: list[list[bool]] = present.tolist()
    samples = len(flags)
    outputs: list[list[Tensor] | None] = []
    for m, encoder in enumerate(encoders):
        rows = [b for b in range(samples) if flags[b][m]]
        channel = image[:, m : m + 1]
        if not rows:
            outputs.append(None)
        elif len(rows) == samples:
            outputs.append(list(encoder(channel)))
        else:
            index = torch.tensor(rows, device=image.device)
            some = encoder(channel.index_select(0, index))
            outputs.append(
                [f.new_zeros(samples, *f.shape[1:]).index_copy(0, index, f) for f in some]
            )
    template = next((levels for levels in outputs if levels is not None), None)
    if template is None:
        raise InputError("no sample shows any modality; mark at least one as present.")
    return [
        torch.stack([zero if o is None else o[level] for o in outputs], 1)
        for level, zero in enumerate([torch.zeros_like(t) for t in template])
    ]


@dataclass
class EncodedLatents(Latents):
    """Latents that remember what the encoders made, whatever was hidden or filled since.

    Auxiliary decoders of single modalities read it in training: they may see what is acquired but
    not shown.

    Args:
        encoded: ``[B, M]``, which slots encoders have computed.
        raw: per level the encoders' features ``[B, M, C, D, H, W]``.
    """

    encoded: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    raw: list[Tensor] = field(default_factory=list)


@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call]  # torch ships no type
def decode_slots(decoder: nn.Module, features: Sequence[Tensor], encoded: Presence) -> Tensor:
    """Run one decoder on every encoded slot of every sample, as one batch.

    Args:
        decoder: maps a list of feature maps ``[b, C, d, h, w]`` to ``[b, C', D, H, W]``.
        features: per level ``[B, M, C, d, h, w]``.
        encoded: ``[B, M]``, the slots to decode.

    Returns:
        ``[B, M, C', D, H, W]``, 0 where a slot is not encoded.
    """
    flags = encoded.flatten()
    index = flags.nonzero()[:, 0]
    decoded: Tensor = decoder([f.flatten(0, 1).index_select(0, index) for f in features])
    slots = decoded.new_zeros(len(flags), *decoded.shape[1:]).index_copy(0, index, decoded)
    return slots.view(*encoded.shape, *decoded.shape[1:])


class SlotConv(nn.Conv3d):
    """1x1x1 convolution of the concatenated slots of one level, absent slots as 0.

    As ``Σ_m W_m f_m + b`` it is a sum of one term per slot. Without gradients the terms are kept in
    ``latents.cache``, where every combination decoded from one encoding finds them: a decode then
    costs M additions instead of M·C multiplications per output value.

    Args:
        slots: number of slots M.
        channels: channels C of one slot.
        out_channels: channels of the result.
        bias: whether to add b.
        before: applied to the slots first; must map 0 to 0 and treat every channel by itself.
    """

    def __init__(
        self,
        slots: int,
        channels: int,
        out_channels: int,
        bias: bool = True,
        before: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(slots * channels, out_channels, 1, bias=bias)
        self.slots = slots
        self.before = before or _nothing

    def forward(self, latents: Latents, level: int, name: str) -> Tensor:  # type: ignore[override]  # reads slots, not one tensor
        """Fuse one level.

        Args:
            latents: where the slots are.
            level: which level.
            name: the convolution's own name, under which its terms are kept.

        Returns:
            ``[B, out_channels, D, H, W]``.
        """
        if torch.is_grad_enabled():
            return super().forward(self.before(latents.masked(level).flatten(1, 2)))
        terms = latents.cache.get(name)
        if terms is None:
            wide = latents.features[level]
            # [out, M·C, 1, 1, 1] -> [M·out, C, 1, 1, 1]: one group per slot.
            weight = self.weight.view(-1, self.slots, wide.shape[2], 1, 1, 1).transpose(0, 1)
            inside = self.before(wide.flatten(1, 2))
            terms = F.conv3d(inside, weight.flatten(0, 1), groups=self.slots)
            terms = terms.view(wide.shape[0], self.slots, -1, *wide.shape[3:])
            latents.cache[name] = terms
        fused = torch.where(latents.flags(level), terms, 0.0).sum(1)
        return fused if self.bias is None else fused + self.bias[:, None, None, None]


def _nothing(x: Tensor) -> Tensor:
    return x
