"""Shapes and containers that all parts of the package share.

Letters: b samples, m modalities, c channels or classes, d h w voxels, k combinations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NotRequired, Self, TypedDict

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

Image = Float[Tensor, "b m d h w"]
Label = Int64[Tensor, "b d h w"]
Presence = Bool[Tensor, "b m"]
Features = Float[Tensor, "b m c d h w"]
AnchorMap = Float[Tensor, "b c d h w"]
Weights = Float[Tensor, "b m"]
Logits = Float[Tensor, "b c d h w"]
Keys = Int64[Tensor, "b"]
Scalar = Float[Tensor, ""]
Brain = Bool[Tensor, "b d h w"]


def full_precision(value: Tensor) -> Tensor:
    """Return ``value`` in float32, or in float64 if it has it."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def kind_of(value: object) -> str:
    """Name type and shape of a tensor, as ``float32 [2, 4]``; of anything else the type."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


class Batch(TypedDict):
    """Training samples. ``present`` is drawn by the module, never by the data module.

    The data module gives every modality of the task, in the task's order. Criteria and terms are
    given the columns of the module's own modalities instead (fewer for a dedicated student), so
    that ``present`` and the slots of the latents agree; the former stay in ``of_task``.
    """

    image: Image
    """z-scored inside the brain, background 0, absent modalities all 0."""
    label: Label
    case_id: list[str]
    acquired: Presence
    key: Keys
    """Hash of (seed, epoch, index); patch, augmentation and ``present`` follow from it alone."""
    present: NotRequired[Presence]
    """What the network is shown, within ``acquired``."""
    filled: NotRequired[Presence]
    """What a teacher's pass on filled slots is shown, within ``acquired``."""
    drawn: NotRequired[Presence]
    """A second draw of what the network is shown, in the order of the task, for losses that
    compare two draws."""
    case: NotRequired[Keys]
    """A number per case, where a loss tells cases apart."""
    of_task: NotRequired[Batch]
    """The batch with all modalities of the task, for what sees more than the module does."""


@dataclass
class Latents:
    """Hold the feature maps of every modality at every level, finest first.

    Args:
        features: per level ``[B, M, C, D, H, W]``. Slots that are not usable may hold anything:
            read them through :meth:`masked`.
        modalities: names of the M slots.
        usable: per level, which slots the decoder may read, ``[B, M]``: those that were encoded,
            then only those left by :meth:`restrict`, and those that were filled.
        log_variance: per level, for variational encoders; same shapes as ``features``.
        brain: per level, which voxels hold brain, ``[B, D, H, W]``; ``None`` where nobody has
            called :meth:`with_brain`. The module does in every training step; a backbone need not.
        cache: intermediate results of a decoder that depend on ``features`` alone; shared by all
            restrictions of one encoding, so that they are computed once for all combinations.
    """

    features: list[Tensor]
    modalities: tuple[str, ...]
    usable: list[Tensor]
    log_variance: list[Tensor] | None = None
    brain: list[Brain] | None = None
    cache: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """Number of levels."""
        return len(self.features)

    def with_features(self, features: list[Tensor], usable: list[Tensor] | None = None) -> Self:
        """Return the same latents with other features, and without what a decoder has cached.

        Args:
            features: of every level, in the shapes of the old ones.
            usable: of every level; as before where not given.
        """
        usable = self.usable if usable is None else usable
        return replace(self, features=features, usable=usable, cache={})

    def with_brain(self, image: Image) -> Self:
        """Return the same latents with the brain mask of every level.

        A voxel of the image holds brain if any sequence is not 0 there; a voxel of a level does if
        at least half of the image's voxels in it do. Features are shared, not copied.

        Args:
            image: every acquired sequence, background 0, ``[B, M, D, H, W]``; shown to the network
                or not.
        """
        inside = (image != 0).any(1, keepdim=True).float()
        shares = [F.adaptive_avg_pool3d(inside, (d, h, w)) for d, h, w in self.spatial()]
        return replace(self, brain=[share[:, 0] >= 0.5 for share in shares])

    def restrict(self, present: Presence) -> Self:
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
        return replace(self, usable=[u & present.to(u.device) for u in self.usable])

    def repeated(self, times: int) -> Latents:
        """Return the same slots several times along the batch, one block for each combination.

        Args:
            times: number of blocks; one block is these latents themselves, with what is cached.
        """
        if times == 1:
            return self
        features, usable, variance = (
            None if some is None else [t.repeat(times, *[1] * (t.dim() - 1)) for t in some]
            for some in (self.features, self.usable, self.log_variance)
        )
        assert features is not None
        assert usable is not None
        return Latents(features, self.modalities, usable, variance)

    def slots_only(self) -> Latents:
        """Drop what a backbone keeps for auxiliary decoders; the slots stay."""
        if type(self) is Latents:
            return self
        # Named one by one: a compiler cannot trace dataclasses.fields.
        return Latents(
            self.features, self.modalities, self.usable, self.log_variance, self.brain, self.cache
        )

    def masked(self, level: int) -> Tensor:
        """Return features of one level with unusable slots exactly 0, ``[B, M, C, D, H, W]``."""
        return torch.where(self.flags(level), self.features[level], 0.0)

    def flags(self, level: int) -> Tensor:
        """Return ``usable`` of one level, to broadcast over features: ``[B, M, 1, 1, 1, 1]``."""
        return self.usable[level][:, :, None, None, None, None]

    def spatial(self) -> Sequence[torch.Size]:
        """Return the spatial shape per level."""
        return [f.shape[3:] for f in self.features]


@dataclass
class SegOutput:
    """Hold what a backbone returns: logits, latents, and further outputs by name.

    Args:
        logits: softmax logits over label classes, ``[B, C, D, H, W]``.
        latents: what was decoded, before any fill.
        extras: auxiliary outputs (deep supervision, per-modality decoders, region maps), found
            by name by the backbone's own criterion; empty in eval mode.
        decoder: feature maps of the decoder, ``[B, C, d, h, w]`` each, finest last, from which the
            logits follow; the same in training and eval mode. Empty where a backbone does not
            give them: terms that read them then say so.
    """

    logits: Logits
    latents: Latents
    extras: dict[str, Tensor] = field(default_factory=dict)
    decoder: list[Tensor] = field(default_factory=list)
