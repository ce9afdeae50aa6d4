"""Latents of whole cases at corresponding voxels, for measuring the gap between modalities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pmixseg.evaluation.gap.measure import Gap, Targets, Vectors, measure_gap, voxel_vectors
from pmixseg.evaluation.prediction.windows import Predictor
from pmixseg.losses.anchors import Anchor, MixtureAnchor
from pmixseg.task import Combination


@dataclass(frozen=True)
class LatentSample:
    """Voxel vectors of one level.

    Args:
        vectors: latents of all modalities, ``[n, M, C]``.
        targets: the anchor over all of them, ``[n, C]``.
        weights: what each modality weighs in that anchor, summing to 1, ``[M]``.
    """

    vectors: Vectors
    targets: Targets
    weights: Float[Tensor, " m"]

    def gap(self) -> Gap:
        """All numbers of the gap."""
        return measure_gap(self.vectors, self.targets)

    def ratio(self, slots: Sequence[int]) -> float:
        """The gap among some of the modalities, around the anchor over these.

        Args:
            slots: two or more positions.
        """
        chosen, weights = self.vectors[:, list(slots)], self.weights[list(slots)]
        total = weights.sum()
        weights = weights / total if total > 0 else torch.full_like(weights, 1 / len(slots))
        target = torch.einsum("m,nmc->nc", weights, chosen)
        numerator = (chosen - target[:, None]).square().mean()
        variance = chosen.flatten(0, 1).var(0, correction=0).mean()
        return float(numerator / variance) if variance > 0 else 0.0


def sample_latents(
    predictor: Predictor,
    images: Iterable[Float[Tensor, "m d h w"]],
    window: Sequence[int],
    anchor: Anchor | None,
    levels: Sequence[int],
    points: int = 1024,
) -> dict[int, LatentSample]:
    """Latents of complete cases, in one window of each around the middle of the brain.

    Args:
        predictor: a module or backbone in eval mode, one latent per modality.
        images: cases with every modality, background 0.
        window: size in voxels, divisible by the largest stride.
        anchor: the model's; a uniform mixture where there is none, or it has no features.
        levels: which levels.
        points: voxels in all of each level, spread evenly over the cases.

    Returns:
        Level -> vectors inside the brain; empty if there is no image.
    """
    names = tuple(predictor.modalities)
    cuts = [centre_window(image, window) for image in images]
    found: dict[int, list[tuple[Tensor, Tensor]]] = {level: [] for level in levels}
    weights: dict[int, Tensor] = {}
    for number, cut in enumerate(cuts):
        everything = torch.ones(1, len(names), dtype=torch.bool, device=cut.device)
        with torch.no_grad():
            latents = predictor.encode(cut[None], everything)
        for level in levels:
            features = latents.features[level].float()
            present = latents.usable[level]
            mixed, weights[level] = _mix(anchor, features, present, level)
            d, h, w = features.shape[3:]
            brain = F.adaptive_avg_pool3d((cut != 0).any(0)[None].float(), (d, h, w))
            share = -(-points // len(cuts))
            pair = voxel_vectors(features, mixed, brain > 0.5, share, seed=number)
            found[level].append(pair)
    return {
        level: LatentSample(
            torch.cat([v for v, _ in pairs]), torch.cat([t for _, t in pairs]), weights[level]
        )
        for level, pairs in found.items()
        if pairs
    }


def named_subsets(names: Sequence[str]) -> list[Combination]:
    """Combinations that a gap is measured in: of two and more modalities, but for all of them.

    Of more than four modalities only the pairs: there are 57 combinations of six.

    Example:
        >>> named_subsets(("a", "b", "c"))
        [('a', 'b'), ('a', 'c'), ('b', 'c')]
    """
    largest = len(names) - 1 if len(names) <= 4 else 2
    return [c for size in range(2, largest + 1) for c in combinations(names, size)]


def centre_window(image: Float[Tensor, "m d h w"], size: Sequence[int]) -> Tensor:
    """The window around the middle of the non-zero voxels, padded with 0 where the image ends."""
    places = (image != 0).any(0).nonzero().double()
    shape = torch.tensor(image.shape[1:], dtype=torch.double)
    middle = places.mean(0).cpu() if len(places) else shape / 2
    slices = []
    for centre, extent, wanted in zip(middle.tolist(), image.shape[1:], size, strict=True):
        start = min(max(round(centre + 0.5 - wanted / 2), 0), max(extent - wanted, 0))
        slices.append(slice(start, start + wanted))
    cut = image[(slice(None), *slices)]
    short = [wanted - has for wanted, has in zip(size, cut.shape[1:], strict=True)]
    return F.pad(cut, [0, short[2], 0, short[1], 0, short[0]])


def _mix(
    anchor: Anchor | None, features: Tensor, present: Tensor, level: int
) -> tuple[Tensor, Tensor]:
    """Anchor and weights; linear in the latents, so a probe with one-hot latents shows w."""
    if anchor is None or not anchor.can_fill:
        anchor = MixtureAnchor("uniform")
        anchor.bind([str(k) for k in range(features.shape[1])], level + 1)
        anchor.to(features.device)
    count = features.shape[1]
    probe = torch.eye(count, device=features.device).view(1, count, count, 1, 1, 1)
    with torch.no_grad():
        weights = anchor(probe, present, level).flatten()
        return anchor(features, present, level), weights.double().cpu()
