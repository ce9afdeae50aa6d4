"""What multi-encoder backbones share: encoders that skip absent samples, and slot fusion."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pmixseg.backbones.layers.lean import fast_layout, is_channels_last, mix_channels
from pmixseg.errors import InputError
from pmixseg.types import Image, Latents, Presence

Pieces = list[list[Tensor] | None]
"""Per modality what its encoder made of the samples that have it, finest level first."""

P = ParamSpec("P")
R = TypeVar("R")


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Keep a function, but not what it calls, out of compiled graphs; export goes through it."""
    # torch refuses to export what is kept out of graphs non-recursively.
    outside = torch.compiler.disable(function, recursive=False)  # type: ignore[no-untyped-call]  # torch ships no type

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        chosen = function if torch.compiler.is_exporting() else outside
        return chosen(*args, **kwargs)

    return call


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
@eager
def encode_slots(
    encoders: Sequence[nn.Module] | nn.ModuleList,
    image: Image,
    present: Presence,
    recompute: bool = False,
) -> Pieces:
    """Run encoder m on channel m of the samples that have modality m.

    Args:
        encoders: one per modality; each maps ``[b, 1, D, H, W]`` to a list of feature maps, finest
            first.
        image: ``[B, M, D, H, W]``.
        present: ``[B, M]``.
        recompute: in training, keep only what the encoders return and run each once more in the
            backward pass (activation checkpointing): less memory for more time.

    Raises:
        InputError: no sample has any modality.
    """
    flags: list[list[bool]] = present.tolist()
    again = recompute and torch.is_grad_enabled()
    pieces: Pieces = []
    for m, encoder in enumerate(encoders):
        rows = [b for b, row in enumerate(flags) if row[m]]
        channel = image[:, m : m + 1]
        if rows and len(rows) < len(flags):
            channel = channel[rows]
        if not rows:
            pieces.append(None)
        elif again:
            pieces.append(list(checkpoint(encoder, channel, use_reentrant=False)))
        else:
            pieces.append(list(encoder(channel)))
    if all(piece is None for piece in pieces):
        raise InputError("no sample shows any modality; mark at least one as present.")
    return pieces


@eager
def join_slots(pieces: Sequence[Tensor | None], present: Presence) -> Tensor:
    """Put the rows of every modality into their places.

    Args:
        pieces: per modality ``[b, C, D, H, W]`` of the b samples that have it, or None.
        present: ``[B, M]``.

    Returns:
        ``[B, M, C, D, H, W]``, 0 where a slot is not present. In memory the channels of all slots
        lie side by side where those of the pieces do, so that ``flatten(1, 2)`` is a view.
    """
    flags: list[list[bool]] = present.tolist()
    some = next(piece for piece in pieces if piece is not None)
    zero = torch.zeros_like(some[:1])
    columns = []
    for m, piece in enumerate(pieces):
        if piece is not None and len(piece) == len(flags):
            columns.append(piece)
        else:
            rows = iter(() if piece is None else torch.split(piece, 1))
            columns.append(torch.cat([next(rows) if row[m] else zero for row in flags]))
    joined = torch.cat(columns, 1)
    return joined.view(len(flags), len(pieces), -1, *joined.shape[2:])


def join_levels(pieces: Pieces, present: Presence, levels: int) -> list[Tensor]:
    """:func:`join_slots` of each of the first ``levels`` levels."""
    return [
        join_slots([None if maps is None else maps[level] for maps in pieces], present)
        for level in range(levels)
    ]


@dataclass
class EncodedLatents(Latents):
    """Latents that remember what the encoders made, whatever was hidden or filled since.

    Auxiliary decoders of single modalities read it in training: they may see what is acquired but
    not shown.

    Args:
        encoded: ``[B, M]``, which slots encoders have computed.
        pieces: what they computed.
    """

    encoded: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    pieces: Pieces = field(default_factory=list, repr=False)


@eager
def decode_slots(decoder: nn.Module, latents: EncodedLatents, levels: Sequence[int]) -> Tensor:
    """Run one decoder on every encoded slot.

    Args:
        decoder: maps a list of feature maps ``[b, C, d, h, w]`` to ``[b, C', D, H, W]``.
        latents: what was encoded.
        levels: which of an encoder's maps the decoder takes.

    Returns:
        ``[B, M, C', D, H, W]``, 0 where a slot is not encoded.
    """
    decoded = [
        None if maps is None else decoder([maps[level] for level in levels])
        for maps in latents.pieces
    ]
    joined: Tensor = join_slots(decoded, latents.encoded)
    return joined


def side_by_side(latents: Latents, level: int) -> Tensor:
    """Slots of one level as channels, ``[B, M·C, D, H, W]``; absent ones are not masked."""
    channels = latents.features[level].flatten(1, 2)
    return channels if is_channels_last(channels) else fast_layout(channels)


def masked_weight(weight: Tensor, flags: Presence) -> Tensor:
    """Weights of a 1x1x1 convolution that reads no absent slot: its columns are 0.

    Features of absent slots need not be copied and masked then; they must be finite.

    Args:
        weight: ``[out, M·C]`` or ``[B, out, M·C]``.
        flags: ``[B, M]``.

    Returns:
        ``[B, out, M·C]``.
    """
    columns = flags.repeat_interleave(weight.shape[-1] // flags.shape[1], 1)
    return weight * columns[:, None].to(weight.dtype)


class SlotConv(nn.Conv3d):
    """1x1x1 convolution of the concatenated slots of one level, absent slots as 0.

    As ``Σ_m W_m f_m + b`` it is a sum of one term per slot. Without gradients the terms are kept in
    ``latents.cache``, where every combination decoded from one encoding finds them: a decode then
    costs additions only.

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
            latents: where the slots are; those of absent ones must be finite.
            level: which level.
            name: the convolution's own name, under which its terms are kept.

        Returns:
            ``[B, out_channels, D, H, W]``.
        """
        weight, present = self.weight.flatten(1), latents.usable[level]
        if torch.is_grad_enabled():
            inside = self.before(side_by_side(latents, level))
            return mix_channels(inside, masked_weight(weight, present), self.bias)
        total: Tensor = _sum_of_present(self._terms(latents, level, name), present)
        # A bias of float32 would make a bf16 sum float32.
        return total if self.bias is None else total.add_(_beside(self.bias, total))

    def _terms(self, latents: Latents, level: int, name: str) -> list[Tensor]:
        keys = [f"{name}.{m}" for m in range(self.slots)]
        if keys[0] not in latents.cache:
            weights = self.weight.flatten(1).chunk(self.slots, 1)
            for m, (key, weight) in enumerate(zip(keys, weights, strict=True)):
                inside = fast_layout(latents.features[level][:, m])
                latents.cache[key] = mix_channels(self.before(inside), weight)
        return [latents.cache[key] for key in keys]


def _sum_of_present(terms: Sequence[Tensor], present: Presence) -> Tensor:
    # One graph for every combination, without a look at the flags; an export is of one combination.
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    flags: list[list[bool]] = [] if compiling else present.tolist()
    if flags and all(row == flags[0] for row in flags):
        shown = [term for term, flag in zip(terms, flags[0], strict=True) if flag]
    else:
        shown = [
            torch.where(present[:, m, None, None, None, None], term, 0.0)
            for m, term in enumerate(terms)
        ]
    if len(shown) < 2:
        return shown[0].clone() if shown else torch.zeros_like(terms[0])
    total = shown[0] + shown[1]
    for term in shown[2:]:
        total += term
    return total


def _beside(bias: Tensor, x: Tensor) -> Tensor:
    return bias.to(x.dtype)[:, None, None, None]


def _nothing(x: Tensor) -> Tensor:
    return x
