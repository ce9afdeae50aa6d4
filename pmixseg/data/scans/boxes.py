"""Boxes of voxels, and the smallest box around all voxels that are not 0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Box:
    """A half-open box of voxels, ``lo <= index < hi``.

    Example:
        >>> Box((0, 8, 0), (8, 16, 24)).union(Box((8, 8, 8), (16, 24, 16)))
        Box(lo=(0, 8, 0), hi=(16, 24, 24))
    """

    lo: Triple
    hi: Triple

    @property
    def shape(self) -> Triple:
        """Voxels per axis."""
        return triple(np.subtract(self.hi, self.lo))

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The box as an index into an array that starts at the origin."""
        a, b, c = (slice(o, h) for o, h in zip(self.lo, self.hi, strict=True))
        return a, b, c

    def union(self, other: Box) -> Box:
        """Return the smallest box that contains both."""
        lo, hi = np.minimum(self.lo, other.lo), np.maximum(self.hi, other.hi)
        return Box(triple(lo), triple(hi))

    def intersection(self, other: Box) -> Box | None:
        """Return the box that both share; ``None`` where they share no voxel."""
        lo, hi = np.maximum(self.lo, other.lo), np.minimum(self.hi, other.hi)
        return Box(triple(lo), triple(hi)) if (lo < hi).all() else None

    def contains(self, other: Box) -> bool:
        """Say whether no voxel of ``other`` lies outside."""
        return self.union(other) == self

    def relative_to(self, outer: Box) -> Box:
        """Return the same voxels, counted from the first voxel of ``outer``."""
        return self.moved(np.negative(outer.lo))

    def moved(self, steps: npt.ArrayLike) -> Box:
        """Return the box moved by so many voxels along each axis."""
        return Box(triple(np.add(self.lo, steps)), triple(np.add(self.hi, steps)))

    def widened(self, margin: int) -> Box:
        """Return the box with a margin on every side, also where that leaves the array."""
        return Box(triple(np.subtract(self.lo, margin)), triple(np.add(self.hi, margin)))

    def grow(self, multiple: int, shape: Triple) -> Box:
        """Move every face outwards to a multiple of ``multiple``, at most to ``shape``."""
        lo = np.floor_divide(self.lo, multiple) * multiple
        hi = -np.floor_divide(np.negative(self.hi), multiple) * multiple
        return Box(triple(lo), triple(np.minimum(hi, shape)))

    def to_dict(self) -> dict[str, list[int]]:
        """Return primitives only."""
        return {"lo": list(self.lo), "hi": list(self.hi)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Iterable[int]]) -> Box:
        """Read what :meth:`to_dict` wrote."""
        return cls(triple(raw["lo"]), triple(raw["hi"]))

    @classmethod
    def whole(cls, shape: Triple) -> Box:
        """Return all voxels of an array of this shape."""
        return cls((0, 0, 0), shape)


def bounds(values: npt.NDArray[Any]) -> Box | None:
    """Return the tight box of the non-zero voxels (NaN counts as one), or ``None``."""
    order = memory_order(values)
    slow = values.transpose(order)
    integers = slow.dtype.kind in "iu"
    plane = np.bitwise_or.reduce(slow, axis=0) != 0 if integers else (slow != 0).any(axis=0)
    if not plane.any():
        return None
    first = next(i for i in range(len(slow)) if slow[i].any())
    last = next(i for i in reversed(range(len(slow))) if slow[i].any())
    edges = [(first, last + 1), _edges(plane.any(axis=1)), _edges(plane.any(axis=0))]
    lo, hi = zip(*(edges[order.index(axis)] for axis in range(3)), strict=True)
    return Box(triple(lo), triple(hi))


def _edges(hit: npt.NDArray[np.bool_]) -> tuple[int, int]:
    return int(hit.argmax()), len(hit) - int(hit[::-1].argmax())


def memory_order(values: npt.NDArray[Any]) -> list[int]:
    """Order axes by falling stride: transposed so, a volume is walked as it lies in memory."""
    return [int(a) for a in np.argsort([-abs(s) for s in values.strides], kind="stable")]


def triple(values: Iterable[int]) -> Triple:
    """Return three whole numbers."""
    a, b, c = (int(v) for v in values)
    return a, b, c
