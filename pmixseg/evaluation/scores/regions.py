"""The regions of one label map: masks, surfaces and sizes, each computed once."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmixseg.data.scans.boxes import Box, bounds
from pmixseg.data.scans.geometry import Spacing
from pmixseg.errors import InputError
from pmixseg.evaluation.scores.surfaces import Points, Surfels, surface_bits, surfels
from pmixseg.task import Task

LabelMap = NDArray[np.uint8]


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
        self.box = bounds(label) or Box.whole((0, 0, 0))
        self._points: dict[int, Points] = {}
        self._surfels: dict[int, Surfels] = {}
        self.bits = region_words(task)[np.ascontiguousarray(label[self.box.slices])]
        self.sizes = [int(np.count_nonzero(self.mask(r))) for r in range(len(task.regions))]

    def mask(self, region: int) -> NDArray[np.bool_]:
        """Return one region inside ``box``."""
        inside: NDArray[np.bool_] = (self.bits & self.bits.dtype.type(1 << region)) != 0
        return inside

    @cached_property
    def _borders(self) -> NDArray[Any]:
        return surface_bits(self.bits)

    def surface(self, region: int) -> Points:
        """Find the surface voxels of a region, which is not empty."""
        if region not in self._points:
            bit = self._borders.dtype.type(1 << region)
            flat = np.flatnonzero(self._borders & bit)
            inner = np.stack(np.unravel_index(flat, self._borders.shape), -1)
            self._points[region] = Points(inner + np.asarray(self.box.lo), self.spacing)
        return self._points[region]

    def surfels(self, region: int) -> Surfels:
        """Find the surface elements of a region."""
        if region not in self._surfels:
            self._surfels[region] = surfels(self.mask(region), self.box.lo, self.spacing)
        return self._surfels[region]

    def shared(self, other: RegionMasks) -> list[int]:
        """Return voxels that both maps have in each region."""
        common = self.box.intersection(other.box)
        if common is None:
            return [0] * len(self.sizes)
        mine = self.bits[common.relative_to(self.box).slices]
        both = mine & other.bits[common.relative_to(other.box).slices]
        words = [both.dtype.type(1 << r) for r in range(len(self.sizes))]
        return [int(np.count_nonzero(both & word)) for word in words]


def region_words(task: Task) -> NDArray[Any]:
    """Return a word per class, whose bit r is set where it belongs to region r, ``[C]``."""
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
    lowest = int(label.min(initial=0)) if label.dtype.kind == "i" else 0
    value = lowest if lowest < 0 else int(label.max(initial=0))
    if not 0 <= value < task.num_classes:
        raise InputError(
            f"the {where} holds class index {value}, but task '{task.name}' has 0 to "
            f"{task.num_classes - 1}; map the label codes to class indices first."
        )
    return label.astype(np.uint8, copy=False)
