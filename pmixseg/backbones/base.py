"""The backbone contract: encode every modality, decode any combination."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import nn

from pmixseg.describe import COUNT, Described, Ranges
from pmixseg.errors import InputError
from pmixseg.types import Image, Latents, Presence, SegOutput


class Backbone(nn.Module, Described, ABC):
    """Split a segmentation network where alignment and filling happen: encode, then decode.

    Subclasses implement :meth:`encode` and :meth:`decode`. Voxels of modalities outside
    ``present`` never influence ``logits``; :func:`pmixseg.testing.check_backbone` proves it.

    Attributes:
        modalities: names of the input channels.
        num_classes: softmax classes, background included.
        channels: latent channels per level, finest first.
        strides: voxels of the input per voxel of the level, finest first; a patch must be
            divisible by the last.
        shares_encoding: the latent of one modality depends neither on the others nor on
            ``present``, so evaluation encodes once for all combinations.
        fillable: a missing slot may be filled from the others before decoding; False where the
            backbone has a rule of its own for combining what is present.
        needs_acquired: training wants everything acquired encoded, and restricted to what is shown:
            auxiliary outputs or the loss read the rest.
        slots: names of the latents' slots: the modalities, or ``("fused",)`` for early fusion.
    """

    __call__: Callable[..., SegOutput]  # of forward, with its type
    modalities: tuple[str, ...]
    num_classes: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    shares_encoding: bool = True
    fillable: bool = True
    needs_acquired: bool = False
    ranges = Ranges(num_classes=COUNT)

    def __init__(
        self,
        modalities: Sequence[str],
        num_classes: int,
        channels: Sequence[int],
        strides: Sequence[int],
    ) -> None:
        if min(channels) < 1:
            raise InputError(
                f"{type(self).__name__}: a level would have {min(channels)} channels; make the "
                "network wider."
            )
        if not modalities or len(set(modalities)) < len(modalities):
            raise InputError(
                f"{type(self).__name__}: modalities is {list(modalities)}; give one or more, each "
                "once."
            )
        super().__init__()
        self.modalities = tuple(modalities)
        self.num_classes = num_classes
        self.channels = tuple(channels)
        self.strides = tuple(strides)

    @property
    def slots(self) -> tuple[str, ...]:
        """Name the slots of the latents: one per modality, unless they are fused before."""
        return self.modalities

    @abstractmethod
    def encode(self, image: Image, present: Presence) -> Latents:
        """Encode each modality that is present into feature maps; run no encoder of another."""

    @abstractmethod
    def decode(self, latents: Latents) -> SegOutput:
        """Segment from the feature maps of the slots that are marked usable."""

    def forward(self, image: Image, present: Presence) -> SegOutput:
        """Return ``decode(encode(image, present))``."""
        return self.decode(self.encode(image, present))
