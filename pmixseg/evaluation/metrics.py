"""Scores of predictions against the truth of one case, region by region, in the native grid.

Everything about the truth is computed once; a case is usually scored for many combinations.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from pmixseg.errors import InputError
from pmixseg.evaluation.conventions import Conventions
from pmixseg.evaluation.surfaces import (
    Extent,
    Points,
    Spacing,
    Surfels,
    extent_of,
    surface_bits,
    surfels,
)
from pmixseg.task import Task

__all__ = ["MEASURES", "CaseMetrics", "Conventions", "RegionMasks", "region_dice", "region_words"]

LabelMap = NDArray[np.uint8]

OVERLAP = (
    "dice",
    "sensitivity",
    "specificity",
    "precision",
    "volume_ml",
    "truth_volume_ml",
    "volume_error_ml",
    "empty",
    "presence_fp",
    "presence_fn",
)
DISTANCE = ("hd95", "asd")
SURFACE_OVERLAP = ("nsd",)
MEASURES = (*OVERLAP[:1], *DISTANCE, *SURFACE_OVERLAP, *OVERLAP[1:])
"""Every measure of a region, in the order of a record."""


class RegionMasks:
    """All regions of one label map, cropped to where anything is labelled.

    Args:
        label: class indices, ``[d, h, w]``.
        task: names the regions.
        spacing: mm along each axis.
        where: how an error names the map.

    Raises:
        InputError: not a three-dimensional map of the task's class indices.
    """

    def __init__(self, label: LabelMap, task: Task, spacing: Spacing, where: str) -> None:
        label = _checked(label, task, where)
        self.shape, self.spacing = label.shape, spacing
        self.extent = extent_of(label)
        self._points: dict[int, Points] = {}
        self._surfels: dict[int, Surfels] = {}
        crop = label[self.extent.slices] if self.extent else label[:0, :0, :0]
        self.bits = region_words(task)[crop]
        self.sizes = [int(np.count_nonzero(self.mask(r))) for r in range(len(task.regions))]

    def mask(self, region: int) -> NDArray[np.bool_]:
        """One region inside ``extent``."""
        inside: NDArray[np.bool_] = (self.bits & self.bits.dtype.type(1 << region)) != 0
        return inside

    @cached_property
    def _borders(self) -> NDArray[Any]:
        return surface_bits(self.bits)

    def surface(self, region: int) -> Points:
        """Surface voxels of a region, which is not empty."""
        if region not in self._points:
            bit = self._borders.dtype.type(1 << region)
            flat = np.flatnonzero(self._borders & bit)
            inner = np.stack(np.unravel_index(flat, self._borders.shape), -1)
            self._points[region] = Points(inner + self._low, self.spacing)
        return self._points[region]

    def surfels(self, region: int) -> Surfels:
        """Surface elements of a region."""
        if region not in self._surfels:
            self._surfels[region] = surfels(self.mask(region), self._low.tolist(), self.spacing)
        return self._surfels[region]

    @cached_property
    def _low(self) -> NDArray[np.int64]:
        return np.asarray(self.extent.low if self.extent else (0, 0, 0))

    def shared(self, other: RegionMasks) -> list[int]:
        """Voxels that both maps have in each region."""
        if self.extent is None or other.extent is None:
            return [0] * len(self.sizes)
        low = np.maximum(self.extent.low, other.extent.low)
        high = np.minimum(self.extent.high, other.extent.high)
        if (low >= high).any():
            return [0] * len(self.sizes)
        common = Extent(tuple(low), tuple(high))
        both = (
            self.bits[_relative(common, self.extent)] & other.bits[_relative(common, other.extent)]
        )
        words = [both.dtype.type(1 << r) for r in range(len(self.sizes))]
        return [int(np.count_nonzero(both & word)) for word in words]


def _relative(inner: Extent, outer: Extent) -> tuple[slice, ...]:
    low = outer.low
    return tuple(slice(s.start - o, s.stop - o) for s, o in zip(inner.slices, low, strict=True))


def region_words(task: Task) -> NDArray[Any]:
    """Class index -> word whose bit r is set where the class belongs to region r, ``[C]``.

    Raises:
        InputError: more than 64 regions.
    """
    count = len(task.regions)
    sizes = (np.uint8, np.uint16, np.uint32, np.uint64)
    kind = next((k for k in sizes if count <= np.iinfo(k).bits), None)
    if kind is None:
        raise InputError(f"task '{task.name}' has {count} regions; name at most 64.")
    words = np.zeros(task.num_classes, kind)
    for r, region in enumerate(task.regions):
        for c in task.region_classes(region):
            words[c] |= kind(1 << r)
    return words


def _checked(label: NDArray[Any], task: Task, where: str) -> LabelMap:
    label = np.asarray(label)
    if label.ndim != 3 or label.dtype.kind not in "bui":
        raise InputError(
            f"the {where} is a {label.dtype} array of shape {label.shape}; give class indices as "
            "a three-dimensional integer array."
        )
    if label.size and (int(label.max()) >= task.num_classes or int(label.min()) < 0):
        value = int(label.max()) if int(label.min()) >= 0 else int(label.min())
        raise InputError(
            f"the {where} holds class index {value}, but task '{task.name}' has 0 to "
            f"{task.num_classes - 1}; map the label codes to class indices first."
        )
    return label.astype(np.uint8, copy=False)


class CaseMetrics:
    """Scores predictions of one case; what depends on the truth alone is computed once.

    Args:
        truth: class indices in the native grid, ``[d, h, w]``.
        task: names the regions.
        spacing: mm along each axis of ``truth``.
        conventions: what empty masks count, which percentile, and so on.

    Raises:
        InputError: ``truth`` is not a map of the task's class indices, or a spacing is not
            positive.

    Example:
        >>> from pmixseg.task import BRATS
        >>> truth = np.zeros((8, 8, 8), np.uint8)
        >>> truth[2:6, 2:6, 2:6] = 3
        >>> CaseMetrics(truth, BRATS, (1, 1, 1)).score(truth, only=("dice", "hd95"))[0]
        {'region': 'WT', 'dice': 1.0, 'hd95': 0.0}
    """

    def __init__(
        self,
        truth: LabelMap,
        task: Task,
        spacing: Sequence[float],
        conventions: Conventions | None = None,
    ) -> None:
        mm = tuple(float(s) for s in spacing)
        if len(mm) != 3 or not all(math.isfinite(s) and s > 0 for s in mm):
            raise InputError(f"spacing is {list(mm)}; give three positive numbers in mm.")
        self.task = task
        self.spacing: Spacing = (mm[0], mm[1], mm[2])
        self.conventions = conventions or Conventions()
        self.truth = RegionMasks(truth, task, self.spacing, "truth")

    def score(
        self, prediction: LabelMap, only: Collection[str] | None = None
    ) -> list[dict[str, Any]]:
        """Every measure of every region.

        Args:
            prediction: class indices, ``[d, h, w]`` as the truth.
            only: names among :data:`MEASURES`; others are not computed. Default: all.

        Returns:
            One dict per region of the task: ``region``, ``dice``, ``hd95``, ``asd`` (mm), ``nsd``,
            ``sensitivity``, ``specificity``, ``precision``, ``volume_ml``, ``truth_volume_ml``,
            ``volume_error_ml`` (prediction minus truth), ``empty`` (which mask is: ``none``,
            ``truth``, ``prediction`` or ``both``), ``presence_fp`` (predicted but not there) and
            ``presence_fn`` (there but not predicted).

        Raises:
            InputError: the prediction has another shape, or values outside the task, or ``only``
                names an unknown measure.
        """
        unknown = sorted(set(only or ()) - set(MEASURES))
        if unknown:
            raise InputError(f"measures {unknown} are unknown; use names of {list(MEASURES)}.")
        predicted = RegionMasks(prediction, self.task, self.spacing, "prediction")
        if predicted.shape != self.truth.shape:
            raise InputError(
                f"the prediction has shape {predicted.shape} but the truth {self.truth.shape}; "
                "bring the prediction into the truth's grid."
            )
        wanted = set(MEASURES if only is None else only)
        shared = self.truth.shared(predicted)
        rows = []
        for r, region in enumerate(self.task.regions):
            row = self._overlap(predicted.sizes[r], self.truth.sizes[r], shared[r])
            if wanted.intersection(DISTANCE):
                row |= self._distance(predicted, r)
            if wanted.intersection(SURFACE_OVERLAP):
                row["nsd"] = self._surface_dice(predicted, r)
            rows.append({"region": region} | {k: row[k] for k in MEASURES if k in wanted})
        return rows

    def _overlap(self, predicted: int, true: int, shared: int) -> dict[str, Any]:
        voxels = math.prod(self.truth.shape)
        millilitre = math.prod(self.spacing) / 1000
        negatives = voxels - true
        empty = {(0, 0): "both", (0, 1): "prediction", (1, 0): "truth", (1, 1): "none"}
        return {
            "dice": _ratio(2 * shared, predicted + true, 1.0),
            "sensitivity": _ratio(shared, true),
            "specificity": _ratio(negatives - (predicted - shared), negatives),
            "precision": _ratio(shared, predicted),
            "volume_ml": predicted * millilitre,
            "truth_volume_ml": true * millilitre,
            "volume_error_ml": (predicted - true) * millilitre,
            "empty": empty[int(predicted > 0), int(true > 0)],
            "presence_fp": predicted > 0 and true == 0,
            "presence_fn": predicted == 0 and true > 0,
        }

    def _distance(self, predicted: RegionMasks, r: int) -> dict[str, float]:
        rule = self.conventions
        if not predicted.sizes[r] or not self.truth.sizes[r]:
            both = predicted.sizes[r] == self.truth.sizes[r]
            value = rule.both_empty if both else rule.one_empty
            return {"hd95": value, "asd": value}
        a, b = predicted.surface(r), self.truth.surface(r)
        directed = [b.distances_from(a), a.distances_from(b)]
        pooled = np.concatenate(directed)
        if rule.percentile == "pooled":
            hd95 = np.percentile(pooled, 95)
        else:
            hd95 = max(np.percentile(d, 95) for d in directed)
        return {"hd95": float(hd95), "asd": float(pooled.mean())}

    def _surface_dice(self, predicted: RegionMasks, r: int) -> float:
        if not predicted.sizes[r] or not self.truth.sizes[r]:
            return float(predicted.sizes[r] == self.truth.sizes[r])
        a, b = predicted.surfels(r), self.truth.surfels(r)
        tolerance = self.conventions.nsd_tolerance_mm
        agreed = a.areas[b.points.within(a.points, tolerance)].sum()
        agreed += b.areas[a.points.within(b.points, tolerance)].sum()
        return float(agreed / (a.areas.sum() + b.areas.sum()))


def _ratio(part: int, whole: int, empty: float = math.nan) -> float:
    return part / whole if whole else empty


def region_dice(
    prediction: Int[Tensor, "*shape"], truth: Int[Tensor, "*shape"], task: Task
) -> dict[str, float]:
    """Dice of every region of one case, quickly and on the tensors' device (for validation).

    2·|P∩T| / (|P| + |T|); both empty gives 1.

    Args:
        prediction: class indices, any shape.
        truth: class indices, the same shape.
        task: names the regions.

    Example:
        >>> from pmixseg.task import BRATS
        >>> region_dice(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]), BRATS)
        {'WT': 1.0, 'TC': 0.6666666666666666, 'ET': 1.0}
    """
    classes = task.num_classes
    pairs = prediction.reshape(-1).long() * classes + truth.reshape(-1)
    table = torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes).tolist()
    scores = {}
    for region in task.regions:
        members = task.region_classes(region)
        shared = sum(table[p][t] for p in members for t in members)
        predicted = sum(sum(table[p]) for p in members)
        true = sum(row[t] for row in table for t in members)
        scores[region] = _ratio(2 * shared, predicted + true, 1.0)
    return scores
