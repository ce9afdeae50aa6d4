"""Where a stored volume lies in its source scan, and the way back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from pmixseg.errors import InputError

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]
Matrix = tuple[tuple[float, ...], ...]

BOX_MULTIPLE = 8
"""Boxes begin and end at multiples of this many voxels of the absolute grid (or at its end)."""

_SAME_SPACING = 1e-3
"""Relative difference below which two spacings count as equal and nothing is resampled."""


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
        return _triple(h - o for o, h in zip(self.lo, self.hi, strict=True))

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The box as an index into an array that starts at the origin."""
        a, b, c = (slice(o, h) for o, h in zip(self.lo, self.hi, strict=True))
        return a, b, c

    def union(self, other: Box) -> Box:
        """The smallest box that contains both."""
        return Box(
            _triple(map(min, zip(self.lo, other.lo, strict=True))),
            _triple(map(max, zip(self.hi, other.hi, strict=True))),
        )

    def contains(self, other: Box) -> bool:
        """Whether no voxel of ``other`` lies outside."""
        return self.union(other) == self

    def relative_to(self, outer: Box) -> Box:
        """The same voxels, counted from the first voxel of ``outer``."""
        return Box(
            _triple(a - b for a, b in zip(self.lo, outer.lo, strict=True)),
            _triple(a - b for a, b in zip(self.hi, outer.lo, strict=True)),
        )

    def grow(self, multiple: int, shape: Triple) -> Box:
        """Move every face outwards to a multiple of ``multiple``, at most to ``shape``."""
        return Box(
            _triple(o // multiple * multiple for o in self.lo),
            _triple(
                min(-(-h // multiple) * multiple, n) for h, n in zip(self.hi, shape, strict=True)
            ),
        )

    def to_dict(self) -> dict[str, list[int]]:
        """Primitives only."""
        return {"lo": list(self.lo), "hi": list(self.hi)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Iterable[int]]) -> Box:
        """Inverse of :meth:`to_dict`."""
        return cls(_triple(raw["lo"]), _triple(raw["hi"]))

    @classmethod
    def whole(cls, shape: Triple) -> Box:
        """All voxels of an array of this shape."""
        return cls((0, 0, 0), shape)


@dataclass(frozen=True)
class Geometry:
    """The grids of one case: source file, canonical orientation, store.

    The *canonical* volume is the source with its axes permuted and flipped towards RAS
    (``nibabel.as_closest_canonical``). The *grid* is the canonical volume, or, when a spacing was
    asked for, the lattice of that spacing that shares the canonical volume's lowest corner and
    covers it. A store holds a box of the grid.

    Args:
        source_shape: voxels of the reference file, in its own axis order.
        source_affine: its 4 x 4 affine, voxel index -> mm.
        source_spacing: its voxel size in mm, in canonical axis order.
        canonical_shape: the full volume in canonical orientation, source resolution.
        grid_shape: voxels of the full grid.
        grid_spacing: voxel size of the grid in mm.
        boxes: per acquired modality, the box of its non-zero voxels in the grid, grown outwards to
            multiples of :data:`BOX_MULTIPLE` and clipped to the grid.
    """

    source_shape: Triple
    source_affine: Matrix
    source_spacing: Spacing
    canonical_shape: Triple
    grid_shape: Triple
    grid_spacing: Spacing
    boxes: Mapping[str, Box]

    @classmethod
    def of(
        cls,
        shape: Triple,
        affine: npt.ArrayLike,
        spacing: Spacing | None = None,
        boxes: Mapping[str, Box] | None = None,
    ) -> Geometry:
        """The grids that follow from a file's shape and affine.

        Args:
            shape: voxels of the source file.
            affine: its affine.
            spacing: voxel size of the grid in mm per canonical axis; ``None`` keeps the source's.
            boxes: see the class.

        Raises:
            ValueError: the affine is singular or not finite, so it has no orientation.
        """
        matrix = np.asarray(affine, dtype=np.float64)
        if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:3, :3])) < 1e-9:
            raise ValueError("the affine is singular or not finite")
        order = _axes_of(matrix)
        zooms = np.sqrt((matrix[:3, :3] ** 2).sum(axis=0))
        source = _spacing(zooms[a] for a, _ in order)
        canonical = _triple(shape[a] for a, _ in order)
        grid, grid_shape = source, canonical
        if spacing is not None:
            pairs = list(zip(source, spacing, strict=True))
            grid = _spacing(s if abs(s - t) <= _SAME_SPACING * t else t for s, t in pairs)
            extent = (n * s / t for n, s, t in zip(canonical, source, grid, strict=True))
            # A hundredth is spared: header noise such as 1.00001 mm must not add a voxel.
            grid_shape = _triple(max(1, math.ceil(e - 0.01)) for e in extent)
        return cls(
            source_shape=_triple(shape),
            source_affine=tuple(tuple(float(v) for v in row) for row in matrix),
            source_spacing=source,
            canonical_shape=canonical,
            grid_shape=grid_shape,
            grid_spacing=grid,
            boxes=dict(boxes or {}),
        )

    @property
    def resampled(self) -> bool:
        """Whether the grid differs from the canonical volume."""
        return self.grid_spacing != self.source_spacing

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """``source_affine`` as an array."""
        return np.array(self.source_affine, dtype=np.float64)

    @property
    def canonical_affine(self) -> npt.NDArray[np.float64]:
        """Affine of the canonical volume, voxel index -> mm."""
        order = nib.io_orientation(self.affine)
        inverse = nib.orientations.inv_ornt_aff(order, self.source_shape)
        return np.asarray(self.affine @ inverse)

    @property
    def source_zooms(self) -> Spacing:
        """Voxel size in mm along the axes of the *source* array, for metrics in its grid."""
        zooms = [0.0, 0.0, 0.0]
        for canonical_axis, (source_axis, _) in enumerate(_axes_of(self.affine)):
            zooms[source_axis] = self.source_spacing[canonical_axis]
        return _spacing(zooms)

    def box(self, combination: Iterable[str] | None = None) -> Box:
        """Union of the boxes of a combination's modalities (``None``: of all acquired).

        Raises:
            InputError: a modality that was not acquired, or none.
        """
        names = list(self.boxes) if combination is None else list(combination)
        missing = [n for n in names if n not in self.boxes]
        if missing or not names:
            raise InputError(
                f"no box for {missing or 'an empty combination'}: this case has "
                f"{list(self.boxes)}; ask for a combination of these."
            )
        result = self.boxes[names[0]]
        for name in names[1:]:
            result = result.union(self.boxes[name])
        return result

    def canonical_view(self, source: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The same memory with the last three axes, now the source's, in canonical orientation."""
        order = _axes_of(self.affine)
        leading = source.ndim - 3
        moved = source.transpose(*range(leading), *(leading + a for a, _ in order))
        a, b, c = (slice(None, None, -1 if flip else 1) for _, flip in order)
        return moved[..., a, b, c]

    def source_view(self, canonical: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Inverse of :meth:`canonical_view`, for ``[D, H, W]`` or a box of it."""
        order = _axes_of(self.affine)
        a, b, c = (slice(None, None, -1 if flip else 1) for _, flip in order)
        return canonical[a, b, c].transpose(np.argsort([axis for axis, _ in order]))

    def canonical_box(self, source: Box) -> Box:
        """A box of the source array, in canonical orientation."""
        lo, hi = [], []
        for axis, flip in _axes_of(self.affine):
            first, last, size = source.lo[axis], source.hi[axis], self.source_shape[axis]
            lo.append(size - last if flip else first)
            hi.append(size - first if flip else last)
        return Box(_triple(lo), _triple(hi))

    def to_grid(
        self, canonical: npt.NDArray[Any], order: Literal[0, 1]
    ) -> npt.NDArray[np.float32] | npt.NDArray[np.uint8]:
        """Resample ``[*, D, H, W]`` from the canonical volume to the full grid.

        Args:
            canonical: an array of shape ``[*, *canonical_shape]``.
            order: 1 linear (result float32), 0 nearest (result uint8, for labels).
        """
        return _resample(canonical, self.source_spacing, self.grid_spacing, self.grid_shape, order)

    def to_source(
        self, volume: npt.NDArray[Any], box: Box, order: Literal[0, 1]
    ) -> npt.NDArray[Any]:
        """Put a box of the grid back into the source file's shape and orientation.

        Args:
            volume: ``[*, d, h, w]``, an array that fills ``box``.
            box: where it lies in the grid.
            order: how to resample if the spacing differs: 1 linear, for probabilities; 0 nearest,
                for labels.

        Returns:
            ``[*, *source_shape]``, contiguous, 0 outside the box.

        Raises:
            ValueError: the array does not have the shape of the box.
        """
        if tuple(volume.shape[-3:]) != box.shape:
            raise ValueError(f"the volume is {volume.shape[-3:]}, its box is {box.shape}")
        leading = volume.shape[:-3]
        result = np.zeros((*leading, *self.source_shape), dtype=volume.dtype)
        view = self.canonical_view(result)
        if not self.resampled:
            view[(..., *box.slices)] = volume
            return result
        near, far = self._surroundings(box)
        margin = np.zeros((*leading, *near.shape), dtype=volume.dtype)
        margin[(..., *box.relative_to(near).slices)] = volume
        view[(..., *far.slices)] = _resample(
            margin, self.grid_spacing, self.source_spacing, far.shape, order
        )
        return result

    def _surroundings(self, box: Box) -> tuple[Box, Box]:
        """A box of the grid with a margin of at least one voxel, and that place in the source.

        Both begin at the same point of space, so that the part is resampled as the whole would be;
        all source voxels outside depend on nothing inside ``box``.
        """
        near_lo, near_hi, far_lo, far_hi = [], [], [], []
        for axis in range(3):
            ratio = self.grid_spacing[axis] / self.source_spacing[axis]
            shared = (k for k in range(box.lo[axis] - 1, 0, -1) if _is_whole(k * ratio))
            near_lo.append(next(shared, 0))
            near_hi.append(min(box.hi[axis] + 1, self.grid_shape[axis]))
            far_lo.append(round(near_lo[-1] * ratio))
            far_hi.append(min(math.ceil(near_hi[-1] * ratio), self.canonical_shape[axis]))
        return (
            Box(_triple(near_lo), _triple(near_hi)),
            Box(_triple(far_lo), _triple(far_hi)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for JSON."""
        return {
            "source_shape": list(self.source_shape),
            "source_affine": [list(row) for row in self.source_affine],
            "source_spacing": list(self.source_spacing),
            "canonical_shape": list(self.canonical_shape),
            "grid_shape": list(self.grid_shape),
            "grid_spacing": list(self.grid_spacing),
            "boxes": {name: box.to_dict() for name, box in self.boxes.items()},
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Geometry:
        """Inverse of :meth:`to_dict`."""
        return cls(
            source_shape=_triple(raw["source_shape"]),
            source_affine=tuple(tuple(float(v) for v in row) for row in raw["source_affine"]),
            source_spacing=_spacing(raw["source_spacing"]),
            canonical_shape=_triple(raw["canonical_shape"]),
            grid_shape=_triple(raw["grid_shape"]),
            grid_spacing=_spacing(raw["grid_spacing"]),
            boxes={name: Box.from_dict(box) for name, box in raw["boxes"].items()},
        )


def _axes_of(affine: npt.NDArray[np.float64]) -> list[tuple[int, bool]]:
    """Per canonical axis: the source axis along it, and whether that one runs backwards."""
    pairs = [(0, False)] * 3
    for source_axis, (canonical_axis, sign) in enumerate(nib.io_orientation(affine)):
        pairs[int(canonical_axis)] = (source_axis, bool(sign < 0))
    return pairs


def _resample(
    volume: npt.NDArray[Any],
    spacing: Spacing,
    new_spacing: Spacing,
    new_shape: Triple,
    order: Literal[0, 1],
) -> npt.NDArray[Any]:
    """Resample ``[*, D, H, W]`` between two lattices that share their lowest corner.

    Voxel i of the result has its centre at ``(i + 1/2) * new_spacing / spacing - 1/2`` of the
    input; beyond the outermost centres the border value is repeated.
    """
    # In the array's own memory order: transposing a whole volume costs more than resampling it.
    leading = volume.ndim - 3
    order_in_memory = np.argsort([-abs(s) for s in volume.strides[leading:]], kind="stable")
    axes = [int(a) for a in order_in_memory]
    factors = [spacing[a] / new_spacing[a] for a in axes]
    shape = [new_shape[a] for a in axes]
    stack = volume.transpose(*range(leading), *(leading + a for a in axes))
    # torch makes floor(n * factor) voxels: give it enough input that none is lost to rounding.
    enough = (math.ceil((n + 1) / f) for n, f in zip(shape, factors, strict=True))
    short = [max(0, e - n) for e, n in zip(enough, stack.shape[leading:], strict=True)]
    kind: type[np.generic] = np.float32 if order == 1 else np.uint8
    stack = np.ascontiguousarray(stack, dtype=kind).reshape(-1, *stack.shape[leading:])
    if any(short):
        stack = np.pad(stack, [(0, 0), *((0, s) for s in short)], mode="edge")
    made = functional.interpolate(
        torch.from_numpy(stack)[None],
        scale_factor=factors,
        mode="trilinear" if order == 1 else "nearest-exact",
        align_corners=False if order == 1 else None,
        recompute_scale_factor=False,
    )[0]
    a, b, c = (slice(0, n) for n in shape)
    result = made[:, a, b, c].numpy().reshape(*volume.shape[:leading], *shape)
    back = np.argsort(axes)
    return result.transpose(*range(leading), *(leading + int(a) for a in back))


def _is_whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-6


def _triple(values: Iterable[int]) -> Triple:
    a, b, c = (int(v) for v in values)
    return a, b, c


def _spacing(values: Iterable[float]) -> Spacing:
    a, b, c = (float(v) for v in values)
    return a, b, c
