"""Shapes and containers that every floor shares.

Letters: b samples, m modalities, c channels or classes, d h w voxels, k combinations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NotRequired, TypedDict

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Image = Float[Tensor, "b m d h w"]
Label = Int64[Tensor, "b d h w"]
Presence = Bool[Tensor, "b m"]
Features = Float[Tensor, "b m c d h w"]
Logits = Float[Tensor, "b c d h w"]
Keys = Int64[Tensor, "b"]
Scalar = Float[Tensor, ""]


class Batch(TypedDict):
    """Training samples. ``present`` is drawn by the module, never by the data module."""

    image: Image
    """z-scored inside the brain, background 0, absent modalities all 0."""
    label: Label
    case_id: list[str]
    acquired: Presence
    key: Keys
    """Hash of (seed, epoch, index); patch, augmentation and ``present`` follow from it alone."""
    present: NotRequired[Presence]


@dataclass
class Latents:
    """Feature maps of every modality at every level, finest first.

    Args:
        features: per level ``[B, M, C, D, H, W]``. Slots that are not present may hold anything:
            read them through :meth:`masked`.
        modalities: names of the M slots.
        present: per level, which slots may be read.
        log_variance: per level, for variational encoders; same shapes as ``features``.
        cache: intermediate results of a decoder that depend on ``features`` alone; shared by all
            restrictions of one encoding, so that they are computed once for all combinations.
    """

    features: list[Tensor]
    modalities: tuple[str, ...]
    present: list[Tensor]
    log_variance: list[Tensor] | None = None
    cache: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """Number of levels."""
        return len(self.features)

    def restrict(self, present: Presence) -> Latents:
        """Hide every slot outside ``present`` (``[B, M]`` or ``[M]``): the only way to hide one.

        No feature is copied; only the flags narrow.

        Raises:
            ValueError: ``present`` does not have one flag per slot, as with early fusion, where
                modalities are mixed at the input and cannot be hidden afterwards.
        """
        if present.shape[-1] != len(self.modalities):
            raise ValueError(
                f"latents hold the slots {list(self.modalities)}, but {present.shape[-1]} flags "
                "were given; encode again with the smaller combination instead."
            )
        return replace(self, present=[p & present.to(p.device) for p in self.present])

    def slots_only(self) -> Latents:
        """The same slots without what a backbone keeps beside them for auxiliary decoders."""
        if type(self) is Latents:
            return self
        return Latents(**{f.name: getattr(self, f.name) for f in fields(Latents) if f.init})

    def masked(self, level: int) -> Tensor:
        """Features of one level with absent slots exactly 0, ``[B, M, C, D, H, W]``."""
        return torch.where(self.flags(level), self.features[level], 0.0)

    def flags(self, level: int) -> Tensor:
        """``present`` of one level, shaped to broadcast over features: ``[B, M, 1, 1, 1, 1]``."""
        return self.present[level][:, :, None, None, None, None]

    def spatial(self) -> Sequence[torch.Size]:
        """Spatial shape per level."""
        return [f.shape[3:] for f in self.features]


@dataclass
class SegOutput:
    """What a backbone returns.

    Args:
        logits: softmax logits over label classes, ``[B, C, D, H, W]``.
        latents: what was decoded, before any fill.
        extras: auxiliary outputs (deep supervision, per-modality decoders, region maps), found
            by name by the backbone's own criterion; empty in eval mode.
    """

    logits: Logits
    latents: Latents
    extras: dict[str, Tensor] = field(default_factory=dict)
