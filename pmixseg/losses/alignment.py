r"""The alignment loss: every modality's latent is pulled, one by one, to the anchor.

.. math:: L_\mathrm{align} = \sum_l \frac{1}{|A|} \sum_{m \in A} D(f_m^l, P^l)

for each sample, and the mean over samples. A are the modalities shown to the network; the anchor
:math:`P^l` is taken over S, the modalities that were acquired and encoded, which may include ones
hidden from the decoder. D looks at brain voxels alone; a sample without any at a level
contributes 0.

Source: Liu et al., Mind the Gap (arXiv 2409.19366); docs/method/anchors.md and
docs/method/alignment.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pmixseg.argument_checks import checked
from pmixseg.errors import InputError
from pmixseg.losses.anchors import Anchor
from pmixseg.losses.distances import (
    KL,
    Detach,
    Distance,
    LevelLatents,
    distance_named,
    mean_over_shown,
)
from pmixseg.losses.projections import SlotLinear
from pmixseg.losses.ranks import SharedSums
from pmixseg.slot_sums import hide
from pmixseg.types import Latents, Presence, Scalar


class AlignmentLoss(nn.Module):
    """Sum the distances between each modality's latents and the anchor over some levels.

    Args:
        distance: a name of :data:`DISTANCES`, or a distance.
        channels: latent channels of every level of the network, finest first.
        modalities: names of the M slots.
        levels: levels that are aligned; negative ones count from the coarsest (-1).
        projection: ``"linear"`` compares the latents after a 1x1x1 map of their own for each
            modality and level, which starts as the identity; the decoder still reads the latents
            themselves.
        detach: what receives no gradient; by default the anchor.

    Raises:
        InputError: an unknown distance, level, projection or detach, or a level named twice.

    Example:
        >>> from pmixseg.losses.anchors import MixtureAnchor
        >>> alignment = AlignmentLoss("mse", channels=[1], modalities=("flair", "t1"), levels=[0])
        >>> anchor = MixtureAnchor("uniform")
        >>> anchor.bind(("flair", "t1"), levels=1)
        >>> both = torch.tensor([[True, True]])
        >>> features = torch.tensor([1.0, 5.0]).view(1, 2, 1, 1, 1, 1)
        >>> latents = Latents([features], ("flair", "t1"), [both])
        >>> alignment(latents, anchor, both, both).item()
        2.0
    """

    __call__: Callable[..., Scalar]  # of forward, with its type

    @checked
    def __init__(
        self,
        distance: str | Distance,
        channels: Sequence[int],
        modalities: Sequence[str],
        levels: Sequence[int],
        projection: Literal["linear"] | None = None,
        detach: Literal["anchor", "none", "features"] = "anchor",
    ) -> None:
        super().__init__()
        self.distance = distance_named(distance) if isinstance(distance, str) else distance
        self.modalities = tuple(modalities)
        self.levels = resolve_levels(levels, len(channels))
        self.detach: Detach = detach
        self.distance.bind(channels, self.modalities, self.levels)
        self.projections = nn.ModuleDict()
        for level in self.levels if projection else ():
            width = channels[level]
            self.projections[str(level)] = SlotLinear(len(modalities), width, width, identity=True)

    @property
    def couples_samples(self) -> bool:
        """Whether samples of a batch influence each other beyond what is summed over processes."""
        return self.distance.couples_samples

    def forward(
        self, latents: Latents, anchor: Anchor, present: Presence, acquired: Presence
    ) -> Scalar:
        """Sum over levels of the mean distance.

        Args:
            latents: raw latents, before any fill; ``latents.usable`` tells which slots were
                encoded, ``latents.brain`` which voxels count (all, if it is ``None``). Other slots
                may hold anything.
            anchor: bound to the same modalities and to the network's levels.
            present: A, what the network is shown, ``[B, M]``.
            acquired: what exists on disk, ``[B, M]``.

        Raises:
            InputError: the distance has no meaning for the anchor.
        """
        return torch.stack(list(self.per_level(latents, anchor, present, acquired).values())).sum()

    def per_level(
        self, latents: Latents, anchor: Anchor, present: Presence, acquired: Presence
    ) -> dict[int, Scalar]:
        """Return the summands of :meth:`forward`, by level."""
        self.distance.check(anchor)
        device = latents.features[0].device
        values: dict[int, Tensor] = {}
        with torch.autocast(device.type, enabled=False):
            for level in self.levels:
                seen = self._view(latents, level, present, acquired)
                distances = self.distance(seen, anchor, self.detach)
                values[level] = seen.sums.settle(mean_over_shown(distances, seen.shown))
        return values

    def sample(self, latents: Latents, generator: torch.Generator | None = None) -> Latents:
        r"""Return latents whose aligned levels are drawn from their Gaussians (``kl`` only).

        :math:`z_m = \mu_m + \sigma_m \epsilon`, :math:`\epsilon \sim N(0, I)`. To be decoded
        instead of ``latents`` in training; the alignment loss itself needs the originals.

        Args:
            latents: raw latents.
            generator: on the latents' device; torch's own if not given.

        Raises:
            InputError: another distance than ``kl``.
        """
        if not isinstance(self.distance, KL):
            raise InputError("only the distance 'kl' estimates variances to sample from; use it.")
        features = list(latents.features)
        for level in self.levels:
            usable = latents.usable[level]
            with torch.autocast(features[level].device.type, enabled=False):
                mean, log_variance = self.distance.moments(
                    self._view(latents, level, usable, usable)
                )
                noise = torch.empty_like(mean).normal_(generator=generator)
                features[level] = (mean + noise * (0.5 * log_variance).exp()).to(
                    latents.features[level].dtype
                )
        return latents.with_features(features)

    def _view(
        self, latents: Latents, level: int, present: Presence, acquired: Presence
    ) -> LevelLatents:
        """Return clean latents of one level, float32 or float64, with A and S."""
        features = latents.features[level]
        b, _, _, *spatial = features.shape
        if latents.brain is None:
            brain = features.new_ones((b, *spatial), dtype=torch.bool)
        else:
            brain = latents.brain[level]
        # A sample without brain has nothing to align.
        acquired = acquired.to(features.device) & brain.flatten(1).any(1, keepdim=True)
        subset = latents.usable[level] & acquired
        shown = subset & present.to(features.device)
        dtype = torch.promote_types(features.dtype, torch.float32)
        features = hide(features.to(dtype), subset)
        if self.projections:
            features = self.projections[str(level)](features)
        log_variance = latents.log_variance
        return LevelLatents(
            features,
            shown,
            subset,
            brain,
            level,
            None if log_variance is None else hide(log_variance[level].to(dtype), subset),
            SharedSums(),  # a compiler cannot follow a dataclass's default factory
        )


def resolve_levels(levels: Sequence[int], count: int) -> tuple[int, ...]:
    """Return levels of a network as numbers from 0, finest first.

    Args:
        levels: any of them; negative ones count from the coarsest.
        count: how many the network has.

    Raises:
        InputError: none, unknown or repeated levels.

    Example:
        >>> resolve_levels([-1, -2], 4)
        (2, 3)
    """
    resolved = sorted(level + count if level < 0 else level for level in levels)
    if (
        not resolved
        or len(set(resolved)) < len(resolved)
        or not 0 <= resolved[0] <= resolved[-1] < count
    ):
        raise InputError(
            f"levels {list(levels)} are not different levels of a network with {count}; use "
            f"numbers from 0 (finest) to {count - 1}, or from -1 (coarsest) to {-count}."
        )
    return tuple(resolved)
