"""Shared parts of multi-encoder backbones: one encoder per modality, and fusion of their slots.

On a CPU an encoder sees only the samples that have its modality. Where a step must be static
(:func:`~pmixseg.execution.runs_static`) it sees the whole batch, absent modalities as
0, and what it makes of them is masked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pmixseg.backbones.layers.grouped import Groupable, encode_together
from pmixseg.backbones.layers.lean import fast_layout, is_channels_last, mix_channels
from pmixseg.errors import InputError
from pmixseg.execution import runs_lean, runs_static, static_on
from pmixseg.types import Image, Latents, Presence, kind_of

Pieces = list[list[Tensor] | None]
"""Per modality what its encoder made of the samples that have it, finest level first."""


def check_input(
    image: Image,
    present: Presence,
    modalities: Sequence[str],
    strides: Sequence[int],
    least: int = 1,
) -> None:
    """Refuse an image that a backbone cannot process.

    Each side must have ``least`` voxels at the lowest level; reflect padding needs 2.

    Raises:
        InputError: no tensors of that kind and shape, a side that the largest stride does not
            divide, or so small a patch that one voxel is left (instance norm would erase it).
    """
    kinds = isinstance(image, Tensor) and isinstance(present, Tensor)
    kinds = kinds and image.is_floating_point() and present.dtype == torch.bool
    slots = len(modalities)
    if not kinds or image.ndim != 5 or image.shape[1] != slots or image.shape[:2] != present.shape:
        raise InputError(
            f"the network takes a float image [B, {slots}, D, H, W] and bool flags [B, {slots}] of "
            f"what is shown, one channel per modality of {list(modalities)}, but got "
            f"{kind_of(image)} and {kind_of(present)}; convert them, as by image.float() and "
            "present.bool()."
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


def encode_slots(
    encoders: Sequence[nn.Module] | nn.ModuleList,
    image: Image,
    present: Presence,
    recompute: bool = False,
) -> Pieces:
    """Run encoder m on channel m of the samples that have modality m, or of all samples.

    An encoder maps ``[b, 1, D, H, W]`` to a list of feature maps, finest first. With ``recompute``,
    a training keeps only what they return, and runs each once more in the backward pass (activation
    checkpointing): less memory for more time.

    Raises:
        InputError: no sample has any modality; not where a step is static.
    """
    again = recompute and torch.is_grad_enabled()
    if runs_static(image):
        return _encode_all(encoders, image, present, again)
    flags: list[list[bool]] = present.tolist()
    pieces: Pieces = []
    for m, encoder in enumerate(encoders):
        rows = [b for b, row in enumerate(flags) if row[m]]
        channel = image[:, m : m + 1]
        if rows and len(rows) < len(flags):
            channel = channel[rows]
        pieces.append(_run(encoder, channel, again) if rows else None)
    if all(piece is None for piece in pieces):
        raise InputError("no sample shows any modality; mark at least one as present.")
    return pieces


def _encode_all(
    encoders: Sequence[nn.Module] | nn.ModuleList, image: Image, present: Presence, again: bool
) -> Pieces:
    """Run every encoder on all samples, hidden channels as 0, in one call where that is faster."""
    shown = torch.where(present[:, :, None, None, None], image, 0.0)
    channels, first = torch.split(shown, 1, 1), encoders[0]
    # One encoder for all modalities takes their channels as further samples.
    if all(encoder is first for encoder in encoders):
        return _apart(_run(first, torch.cat(channels), again), len(channels))
    # Grouped convolutions are slow under the compiler of a CPU. And what a user puts around a
    # weight (pruning, spectral norms) has buffers of one encoder.
    alike = all(isinstance(encoder, Groupable) for encoder in encoders)
    if static_on(image.device) and alike and not dict(first.named_buffers()):
        together = functools.partial(encode_together, list(encoders))
        return _apart(_run(together, shown, again), len(channels), 1)
    return [_run(encoder, c, again) for encoder, c in zip(encoders, channels, strict=True)]


def _run(
    encoder: Callable[[Tensor], Sequence[Tensor]], channel: Tensor, again: bool
) -> list[Tensor]:
    if again:
        return list(checkpoint(encoder, channel, use_reentrant=False))
    return list(encoder(channel))


def _apart(joined: Sequence[Tensor], slots: int, axis: int = 0) -> Pieces:
    """Return levels ``[M·B, ...]``, or ``[B, M·C, ...]``, as M lists of levels."""
    levels = [level.chunk(slots, axis) for level in joined]
    return [list(maps) for maps in zip(*levels, strict=True)]


def map_slots(function: Callable[..., list[Tensor]], *pieces: Pieces) -> Pieces:
    """Apply one function to what there is of every slot.

    The function takes as many lists of maps as there are ``pieces`` (what encoders made), and
    returns one; it must treat samples by themselves. A slot without pieces gives None.
    """
    whole = [[maps for maps in some if maps is not None] for some in pieces]
    if whole[0] and runs_static(whole[0][0][0]):
        # One call for all slots: [M·B, C, D, H, W].
        levels = [[torch.cat(maps) for maps in zip(*some, strict=True)] for some in whole]
        return _apart(function(*levels), len(pieces[0]))
    return [
        None if any(maps is None for maps in slot) else function(*slot)
        for slot in zip(*pieces, strict=True)
    ]


def join_slots(pieces: Sequence[Tensor | None], present: Presence) -> Tensor:
    """Put the rows of every modality into their places.

    Pieces are, per modality, ``[b, C, D, H, W]`` of the b samples that have it, or None. Of the
    result ``[B, M, C, D, H, W]``, rows without a piece are 0, which is so for every slot that is
    not present unless a step is static. In memory the channels of all slots lie side by side where
    those of the pieces do, so that ``flatten(1, 2)`` is a view.
    """
    some = next(piece for piece in pieces if piece is not None)
    if runs_static(some):
        joined = torch.cat([piece for piece in pieces if piece is not None], 1)
        return joined.view(len(joined), len(pieces), -1, *joined.shape[2:])
    flags: list[list[bool]] = present.tolist()
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
    """Apply :func:`join_slots` to each of the first ``levels`` levels."""
    return [
        join_slots([None if maps is None else maps[level] for maps in pieces], present)
        for level in range(levels)
    ]


@dataclass
class EncodedLatents(Latents):
    """Latents that remember what the encoders made, whatever was hidden or filled since.

    Auxiliary decoders of single modalities read it in training: they may see what is acquired but
    not shown.
    """

    encoded: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    pieces: Pieces = field(default_factory=list, repr=False)


def decode_slots(decoder: nn.Module, latents: EncodedLatents, levels: Sequence[int]) -> Tensor:
    """Run one decoder on every encoded slot, from these levels of its maps.

    From feature maps ``[b, C, d, h, w]`` it makes ``[b, C', D, H, W]``. They are joined as in
    :func:`join_slots`.
    """
    pieces: Pieces = [
        None if maps is None else [maps[level] for level in levels] for maps in latents.pieces
    ]
    decoded = map_slots(lambda maps: [decoder(maps)], pieces)
    return join_slots([None if maps is None else maps[0] for maps in decoded], latents.encoded)


def side_by_side(latents: Latents, level: int) -> Tensor:
    """Join a level's slots as channels, ``[B, M·C, D, H, W]``; absent ones are not masked."""
    channels = latents.features[level].flatten(1, 2)
    return channels if is_channels_last(channels) else fast_layout(channels)


def masked_weight(weight: Tensor, flags: Presence) -> Tensor:
    """Return weights of a 1x1x1 convolution that reads no absent slot: its columns are 0.

    Features of absent slots need not be copied and masked then; they must be finite. Weights
    ``[out, M·C]`` or ``[B, out, M·C]`` become ``[B, out, M·C]``.
    """
    slots = flags[:, None, :, None].to(weight.dtype)
    return (weight.view(*weight.shape[:-1], flags.shape[1], -1) * slots).flatten(-2)


class SlotConv(nn.Conv3d):
    """1x1x1 convolution of the concatenated slots of one level, absent slots as 0.

    As ``Σ_m W_m f_m + b`` it is a sum of one term per slot. Without gradients the terms are kept in
    ``latents.cache``, where every combination decoded from one encoding finds them: a decode then
    costs additions only. Where a CPU sees every slot usable, as after a fill, which no other
    combination shares, one product makes the sum. What comes ``before`` is applied to the slots
    first; it must map 0 to 0 and treat every channel by itself.
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
        """Fuse one level to ``[B, out_channels, D, H, W]``.

        Absent slots must be finite. Terms are kept under ``name``, the convolution's own.
        """
        weight, present = self.weight.flatten(1), latents.usable[level]
        kept = f"{name}.0" in latents.cache
        whole = not kept and runs_lean(present) and bool(present.all())
        if whole or torch.is_grad_enabled():
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
    flags: list[list[bool]] = [] if runs_static(terms[0]) else present.tolist()
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
