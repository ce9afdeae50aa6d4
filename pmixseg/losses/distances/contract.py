r"""The interface of a distance: its inputs and its result.

Every distance returns one number per sample and modality; the mean over a sample's modalities and
over samples is taken by :class:`~pmixseg.losses.alignment.AlignmentLoss`. All compute in float32 or
float64, whichever the features have, have finite gradients where latents coincide, are constant,
or have one voxel, and look at brain voxels alone. None asks for a tensor's value, and all have the
same shapes in every step, so that a training step compiles as one graph.

Sources: docs/method/alignment.md; Liu et al., Mind the Gap (arXiv 2409.19366).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pmixseg.describe import NOT_NEGATIVE, Described, Ranges
from pmixseg.errors import InputError
from pmixseg.losses.anchors import Anchor, NormalAnchor, ProductAnchor
from pmixseg.losses.ranks import SharedSums
from pmixseg.types import Brain, Features, Presence, Scalar

Detach = Literal["anchor", "none", "features"]
"""What receives no gradient: the anchor (a fixed target), nothing, or the latents (the anchor
moves towards them)."""

PerSlot = Float[Tensor, "b m"]

DISTANCES: dict[str, type[Distance]] = {}
"""Every distance with a name, filled by the classes themselves."""


@dataclass(frozen=True)
class LevelLatents:
    """Hold the latents of one level, as a distance sees them.

    Args:
        features: ``[B, M, C, D, H, W]``, float32 or float64; exactly 0 outside ``subset``.
        shown: slots whose distance counts (A), ``[B, M]``, within ``subset``.
        subset: slots that make the anchor (S): acquired and encoded. A sample without brain at
            this level has none, here and in ``shown``.
        brain: voxels that count, ``[B, D, H, W]``.
        level: which level of the network.
        log_variance: of variational encoders, shaped and cleaned like ``features``.
        sums: statistics are taken over all processes by these, and settle the loss in the end.
    """

    features: Features
    shown: Presence
    subset: Presence
    brain: Brain
    level: int
    log_variance: Features | None = None
    sums: SharedSums = field(default_factory=SharedSums)


class Distance(nn.Module, Described, ABC):
    """Measure how far the latent of a modality is from the anchor.

    Attributes:
        name: short name for ``--align.distance``; a class without one is named by its path.
        couples_samples: a sample's value depends on the other samples of the batch in a way that
            is *not* summed over processes, so DDP differs from one process.
        smallest_batch: samples of all processes together below which it has no meaning.
        compares_directions: an anchor must have one, which N(0, I) has not.
    """

    __call__: Callable[..., PerSlot]  # of forward, with its type
    name: ClassVar[str] = ""
    couples_samples: bool = False
    smallest_batch: int = 1
    compares_directions: bool = False
    ranges = Ranges(epsilon=NOT_NEGATIVE)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            DISTANCES[cls.name] = cls

    def bind(
        self, channels: Sequence[int], modalities: Sequence[str], levels: Sequence[int]
    ) -> None:
        """Create parameters, where the distance has some.

        Args:
            channels: channels of *every* level of the network, finest first.
            modalities: names of the M slots.
            levels: the levels that are aligned.
        """

    def check(self, anchor: Anchor) -> None:
        """Refuse anchors that the distance has no meaning for.

        Raises:
            InputError: a product of Gaussians without a distance between Gaussians, or a normal
                anchor for a distance that compares directions.
        """
        if isinstance(anchor, ProductAnchor):
            raise InputError(
                f"ProductAnchor weighs latents by their precision, which {type(self).__name__} "
                "does not estimate; use the distance kl (--align.distance), or another anchor."
            )
        if self.compares_directions and isinstance(anchor, NormalAnchor):
            raise InputError(
                f"the distance '{self.name}' compares directions, and NormalAnchor has none; use "
                "another distance (mse) or another anchor."
            )

    @abstractmethod
    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """Return the distance per sample and modality, ``[B, M]``, finite outside ``shown`` too."""


def distance_named(name: str, owner: str = "alignment") -> Distance:
    """Make a distance of :data:`DISTANCES` with its default arguments."""
    if name not in DISTANCES:
        raise InputError(
            f"{owner}.distance: there is no distance '{name}'; use one of {', '.join(DISTANCES)}."
        )
    return DISTANCES[name]()


def point_and_target(
    latents: LevelLatents, anchor: Anchor, detach: Detach
) -> tuple[Tensor, Tensor]:
    """Return latents ``[B, M, C, D, H, W]`` and anchor ``[B, 1, C, D, H, W]``, one detached.

    The anchor's weights never receive a gradient from an alignment loss (docs/method/anchors.md).
    """
    features = latents.features
    target = anchor(features, latents.subset, latents.level, detach_weights=True)[:, None]
    return detached(features, target, detach)


def detached(own: Tensor, target: Tensor, detach: Detach) -> tuple[Tensor, Tensor]:
    """Return something of the latents and its target, one of them without a gradient."""
    if detach == "anchor":
        return own, target.detach()
    return (own.detach() if detach == "features" else own), target


def mean_over_shown(distances: PerSlot, shown: Presence) -> Scalar:
    """Return the mean over the shown slots of each sample, then over samples.

    A sample that shows none counts as 0. What stands outside ``shown`` is never read.
    """
    total = torch.where(shown, distances, 0.0).sum(1)
    return (total / shown.sum(1).clamp_min(1)).mean()
