"""Lesion-wise Dice and HD95: scores per connected component instead of per region.

Two conventions are in use and give different numbers for the same masks:

``brats2023-gli``
    BraTS 2023 adult glioma (Saluja et al., the challenge's published metric). Truth lesions whose
    dilations (3 times, 18-neighbourhood) touch are one. Every predicted component that reaches into
    the dilation of a lesion belongs to it; Dice and HD95 compare the lesion with all of them
    together (HD95: weighted by surface area, larger direction). Truth lesions of at most 50 mm³ are
    dropped. Every predicted component that belongs to none counts Dice 0 and HD95 374. Nothing to
    count: Dice 1, HD95 0.

``panoptica-0.0.10``
    What the package brats-evaluation 0.0.10 computes with panoptica. Components are matched one to
    one so that their summed Dice is largest; scores are means over the matches, so that missed and
    invented lesions show in the counts only. No lesion is too small. HD95 is pooled. No match:
    Dice 0, HD95 373 (the package's raw result is infinite). No lesion on either side: NaN.

Components are 26-connected in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize

from pmixseg.data.scans.boxes import Box
from pmixseg.data.scans.geometry import Spacing
from pmixseg.evaluation.scores.conventions import LesionRule
from pmixseg.evaluation.scores.surfaces import (
    Points,
    Surfels,
    robust_hausdorff,
    surfels,
    voxel_surface,
)

DILATIONS = 3
SMALLEST_MM3 = 50.0
BRATS2023_PENALTY_MM = 374.0
PANOPTICA_PENALTY_MM = 373.0
_MATCH = 1e-6
"""Least Dice of a panoptica match."""

_FULL = ndimage.generate_binary_structure(3, 3)
_DILATION = ndimage.generate_binary_structure(3, 2)

Mask = NDArray[np.bool_]
Labels = NDArray[np.int32]


@dataclass(frozen=True)
class LesionScore:
    """Lesion-wise scores of one region.

    Args:
        dice: lesion-wise Dice.
        hd95: lesion-wise HD95 in mm.
        tp: truth lesions that were found.
        fp: predicted components that belong to no truth lesion.
        fn: truth lesions that were missed.
    """

    dice: float
    hd95: float
    tp: int
    fp: int
    fn: int

    def row(self) -> dict[str, float]:
        """Return the columns of a record."""
        return {f"lesion_{k}": v for k, v in vars(self).items()}


@dataclass(frozen=True)
class Components:
    """The connected components of a mask.

    Args:
        labels: 0 or the number of the component, inside ``box``.
        box: where ``labels`` lies in the volume.
        count: number of components.
    """

    labels: Labels
    box: Box
    count: int

    @classmethod
    def of(cls, mask: Mask, box: Box) -> Components:
        """Find the 26-connected components of a mask."""
        labels = np.empty(mask.shape, np.int32)
        count = ndimage.label(mask, _FULL, output=labels)
        return cls(labels, box, int(count))

    def sizes(self) -> NDArray[np.int64]:
        """Return voxels per component; entry 0 is meaningless, ``[count + 1]``."""
        return np.bincount(self.labels.ravel(), minlength=self.count + 1)

    def select(self, numbers: NDArray[np.integer[Any]]) -> tuple[Mask, list[int]]:
        """Join these components, cropped; return the coordinates of the crop's first voxel, too."""
        boxes = ndimage.find_objects(self.labels)
        parts = [boxes[n - 1] for n in numbers]
        low = [min(p[a].start for p in parts) for a in range(3)]
        high = [max(p[a].stop for p in parts) for a in range(3)]
        chosen = np.zeros(self.count + 1, bool)
        chosen[numbers] = True
        crop = self.labels[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        return chosen[crop], [a + o for a, o in zip(low, self.box.lo, strict=True)]

    def shared(self, other: Components, own: Labels | None = None) -> NDArray[np.int64]:
        """Count voxels that component i here and j there share, ``[count + 1, count + 1]``.

        ``own``, of the same shape and numbers, is counted instead of ``labels``.
        """
        common = self.box.intersection(other.box)
        if common is None:
            return np.zeros((self.count + 1, other.count + 1), np.int64)
        mine = (self.labels if own is None else own)[common.relative_to(self.box).slices]
        theirs = other.labels[common.relative_to(other.box).slices]
        pairs = mine.astype(np.int64) * (other.count + 1) + theirs
        table = np.bincount(pairs.ravel(), minlength=(self.count + 1) * (other.count + 1))
        return table.reshape(self.count + 1, other.count + 1)


class Brats2023Lesions:
    """The lesions of one truth under ``brats2023-gli``, which predictions are scored against.

    ``truth`` is the region inside ``box``, spacings are in mm.
    """

    def __init__(self, truth: Mask, box: Box, spacing: Spacing) -> None:
        self._spacing = spacing
        self._surfels: dict[int, Surfels] = {}
        # Dilations that meet beyond the volume's border also meet inside it, so it may be crossed.
        around = box.widened(DILATIONS)
        wide = np.zeros(around.shape, bool)
        wide[box.relative_to(around).slices] = truth
        zones = Components.of(ndimage.binary_dilation(wide, _DILATION, DILATIONS), around)
        lesions = np.where(wide, zones.labels, 0)
        self._zones, self._lesions = zones, Components(lesions, around, zones.count)
        self._sizes = self._lesions.sizes()

    def score(self, prediction: Mask, box: Box) -> LesionScore:
        """Score one prediction, cut to ``box``, which is where it lies in the volume."""
        predicted = Components.of(prediction, box)
        # Which predicted components reach into the dilation of which lesion.
        reached = self._zones.shared(predicted) > 0
        reached[:, 0] = False
        overlap = self._zones.shared(predicted, self._lesions.labels)
        sizes = predicted.sizes()
        large = self._sizes[1:] * math.prod(self._spacing) > SMALLEST_MM3
        dice, hd95, hits = [], [], 0
        # Each lesion that is large enough, against all components that reach it.
        for lesion in np.flatnonzero(large) + 1:
            parts = np.flatnonzero(reached[lesion])
            if not len(parts):
                dice.append(0.0)
                hd95.append(BRATS2023_PENALTY_MM)
                continue
            hits += 1
            total = self._sizes[lesion] + sizes[parts].sum()
            dice.append(float(2 * overlap[lesion, parts].sum() / total))
            surface = surfels(*predicted.select(parts), self._spacing)
            hd95.append(robust_hausdorff(self._surface(int(lesion)), surface, 95))
        # What reaches no lesion counts as one that was invented.
        invented = int((~reached[1:, 1:].any(0)).sum())
        count = len(dice) + invented
        if not count:
            return LesionScore(1.0, 0.0, 0, 0, 0)
        distance = (sum(hd95) + invented * BRATS2023_PENALTY_MM) / count
        return LesionScore(sum(dice) / count, distance, hits, invented, len(dice) - hits)

    def _surface(self, lesion: int) -> Surfels:
        if lesion not in self._surfels:
            mask, origin = self._lesions.select(np.array([lesion]))
            self._surfels[lesion] = surfels(mask, origin, self._spacing)
        return self._surfels[lesion]


class PanopticaLesions:
    """The same under ``panoptica-0.0.10``."""

    def __init__(self, truth: Mask, box: Box, spacing: Spacing) -> None:
        self._spacing = spacing
        self._truth = Components.of(truth, box)
        self._surfaces: dict[int, Points] = {}

    def score(self, prediction: Mask, box: Box) -> LesionScore:
        """Score one prediction; arguments as in :class:`Brats2023Lesions`."""
        truth, predicted = self._truth, Components.of(prediction, box)
        if not truth.count and not predicted.count:
            return LesionScore(math.nan, math.nan, 0, 0, 0)
        matches = _best_matches(truth, predicted)
        if not matches:
            return LesionScore(0.0, PANOPTICA_PENALTY_MM, 0, predicted.count, truth.count)
        distances = [self._hd95(lesion, predicted, part) for lesion, part, _ in matches]
        hits = len(matches)
        dice = sum(d for _, _, d in matches) / hits
        hd95 = sum(distances) / hits
        return LesionScore(dice, hd95, hits, predicted.count - hits, truth.count - hits)

    def _hd95(self, lesion: int, predicted: Components, part: int) -> float:
        if lesion not in self._surfaces:
            mask, origin = self._truth.select(np.array([lesion]))
            self._surfaces[lesion] = voxel_surface(mask, origin, self._spacing)
        true = self._surfaces[lesion]
        mask, origin = predicted.select(np.array([part]))
        other = voxel_surface(mask, origin, self._spacing)
        pooled = np.concatenate([true.distances_from(other), other.distances_from(true)])
        return float(np.percentile(pooled, 95))


def _best_matches(truth: Components, predicted: Components) -> list[tuple[int, int, float]]:
    """Return truth component, predicted component and Dice of each pair of the best assignment."""
    shared = truth.shared(predicted)[1:, 1:]
    total = truth.sizes()[1:, None] + predicted.sizes()[None, 1:]
    dice = 2 * shared / total
    # Pairs that may not match cost a little more than the worst that may.
    cost = np.where(dice >= _MATCH, 1 - dice, 1 + 1e-6)
    rows, columns = optimize.linear_sum_assignment(cost)
    pairs = zip(rows, columns, strict=True)
    return [(int(i) + 1, int(j) + 1, float(dice[i, j])) for i, j in pairs if cost[i, j] < 1]


Lesions = Brats2023Lesions | PanopticaLesions

RULES: Mapping[LesionRule, type[Lesions]] = {
    "brats2023-gli": Brats2023Lesions,
    "panoptica-0.0.10": PanopticaLesions,
}
"""Convention -> how it scores; ``none`` does not."""
