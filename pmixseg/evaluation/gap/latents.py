"""Latents of whole cases at corresponding voxels, for measuring the gap between modalities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from pmixseg.evaluation.gap.guards import decodability
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
        cases: number of the case of each voxel, ``[n]``.
        regions: share of each region in each voxel, ``[n, R]``; ``None`` without labels.
    """

    vectors: Vectors
    targets: Targets
    weights: Float[Tensor, " m"]
    cases: Int64[Tensor, " n"] | None = None
    regions: Float[Tensor, "n r"] | None = None

    def gap(self) -> Gap:
        """Return all numbers of the gap."""
        return measure_gap(self.vectors, self.targets)

    def decodability(self) -> Float[Tensor, " r"] | None:
        """Return each region's decodability from one modality's latent; ``None`` without labels."""
        if self.regions is None or self.cases is None:
            return None
        return decodability(self.vectors, self.regions, self.cases)

    def ratio(self, slots: Sequence[int]) -> float:
        """Return the gap among two or more of the modalities, around the anchor over these."""
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
    regions: Sequence[Float[Tensor, "r d h w"]] | None = None,
) -> dict[int, LatentSample]:
    """Encode complete cases, in one window of each around the middle of the brain.

    The predictor is a module or backbone in eval mode, with one latent per modality; images have
    every modality and background 0. Where the model has no anchor, or one without features, a
    uniform mixture takes its place. ``points`` voxels of each level, inside the brain, are spread
    evenly over the cases. ``regions`` are 1 inside and 0 outside, on the image's grid. Without an
    image the result is empty.
    """
    names = tuple(predictor.modalities)
    images = list(images)
    cuts = [centre_window(image, window) for image in images]
    samples: dict[int, list[LatentSample]] = {level: [] for level in levels}
    share = -(-points // max(len(cuts), 1))
    for number, cut in enumerate(cuts):
        everything = torch.ones(1, len(names), dtype=torch.bool, device=cut.device)
        # Every sequence is shown: the gap is between latents of the same voxels.
        with torch.no_grad():
            latents = predictor.encode(cut[None], everything).with_brain(cut[None])
        assert latents.brain is not None
        marked = None
        if regions is not None:
            marked = centre_window(regions[number], window, around=images[number]).float()
        for level in levels:
            features, brain = latents.features[level].float(), latents.brain[level]
            # Vectors at drawn brain voxels, and what the anchor is there.
            mixed, weights = _mix(anchor, features, latents.usable[level], level)
            vectors, targets = voxel_vectors(features, mixed, brain, share, seed=number)
            shares = None
            # The share of each region in such a voxel.
            if marked is not None:
                d, h, w = features.shape[3:]
                pooled = F.adaptive_avg_pool3d(marked, (d, h, w))[None]
                _, shares = voxel_vectors(features, pooled, brain, share, seed=number)
            cases = torch.full((len(vectors),), number)
            samples[level].append(LatentSample(vectors, targets, weights, cases, shares))
    return {level: _joined(several) for level, several in samples.items() if several}


def _joined(samples: Sequence[LatentSample]) -> LatentSample:
    regions = [s.regions for s in samples if s.regions is not None]
    return LatentSample(
        torch.cat([s.vectors for s in samples]),
        torch.cat([s.targets for s in samples]),
        samples[-1].weights,
        torch.cat([s.cases for s in samples if s.cases is not None]),
        torch.cat(regions) if regions else None,
    )


def named_subsets(names: Sequence[str]) -> list[Combination]:
    """List the combinations that a gap is measured in: of two modalities or more, but not of all.

    Of more than four modalities only the pairs: there are 57 combinations of six.

    Example:
        >>> named_subsets(("a", "b", "c"))
        [('a', 'b'), ('a', 'c'), ('b', 'c')]
    """
    largest = len(names) - 1 if len(names) <= 4 else 2
    return [c for size in range(2, largest + 1) for c in combinations(names, size)]


def centre_window(
    image: Float[Tensor, "m d h w"],
    size: Sequence[int],
    around: Float[Tensor, "m d h w"] | None = None,
) -> Tensor:
    """Cut a window around the middle of the non-zero voxels, padded with 0 beyond the image.

    ``around`` is the image whose voxels are meant, on the same grid; by default ``image`` itself.
    """
    places = ((image if around is None else around) != 0).any(0).nonzero().double()
    shape = torch.tensor(image.shape[1:], dtype=torch.double)
    middle = places.mean(0).cpu() if len(places) else shape / 2
    slices = []
    for centre, extent, length in zip(middle.tolist(), image.shape[1:], size, strict=True):
        start = min(max(round(centre + 0.5 - length / 2), 0), max(extent - length, 0))
        slices.append(slice(start, start + length))
    cut = image[(slice(None), *slices)]
    short = [length - has for length, has in zip(size, cut.shape[1:], strict=True)]
    return F.pad(cut, [0, short[2], 0, short[1], 0, short[0]])


def _mix(
    anchor: Anchor | None, features: Tensor, present: Tensor, level: int
) -> tuple[Tensor, Tensor]:
    """Return anchor and weights; anchors are linear, so that one-hot latents show the weights."""
    if anchor is None or not anchor.can_fill:
        anchor = MixtureAnchor("uniform")
        anchor.bind([str(k) for k in range(features.shape[1])], level + 1)
        anchor.to(features.device)
    count = features.shape[1]
    probe = torch.eye(count, device=features.device).view(1, count, count, 1, 1, 1)
    with torch.no_grad():
        weights = anchor(probe, present, level).flatten()
        return anchor(features, present, level), weights.double().cpu()
