"""Where a stored volume lies in its source scan, and the way back."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from pmixseg.data.scans.boxes import Box, Triple, memory_order, triple
from pmixseg.errors import InputError

Spacing = tuple[float, float, float]
Matrix = tuple[tuple[float, ...], ...]

BOX_MULTIPLE = 8
"""Boxes begin and end at multiples of this many voxels of the absolute grid (or at its end)."""

MIN_SPACING, MAX_SPACING = 0.05, 30.0
"""Smallest and largest credible voxel size in mm: below any scanner, above any slice gap."""

MAX_ORIGIN = 1e5
"""Largest credible distance in mm of the first voxel from the origin: a hundred metres."""

MAX_VOXELS = 1 << 29
"""Most voxels of a grid, 812 cubed: 2 GiB per modality while it is resampled."""

MAX_SHEAR = 0.02
"""Largest cosine of the angle between two axes: distances are computed as if it were 0, and
registration programs may leave a trace of shear."""

_SAME_SPACING = 1e-3
"""Relative difference below which two spacings count as equal and nothing is resampled."""


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
        unit: mm per unit of length of the reference file (metre 1000, micron 0.001).
    """

    source_shape: Triple
    source_affine: Matrix
    source_spacing: Spacing
    canonical_shape: Triple
    grid_shape: Triple
    grid_spacing: Spacing
    boxes: Mapping[str, Box]
    unit: float = 1.0

    @classmethod
    def of(
        cls,
        shape: Triple,
        affine: npt.ArrayLike,
        spacing: Spacing | None = None,
        boxes: Mapping[str, Box] | None = None,
        unit: float = 1.0,
    ) -> Geometry:
        """Return the grids that follow from a file's shape and affine.

        A spacing of ``None`` keeps the source's; the other arguments are fields of the class.

        Raises:
            ValueError: the affine is singular or not finite, so it has no orientation; its axes are
                not at right angles; or voxels or grid have a size that no scan has. The text is a
                phrase.
        """
        matrix = np.asarray(affine, dtype=np.float64)
        zooms = np.sqrt((matrix[:3, :3] ** 2).sum(axis=0))
        # Relative to the voxel: a determinant in mm³ would call fine voxels singular.
        if not np.isfinite(matrix).all() or not abs(np.linalg.det(matrix[:3, :3])) > 1e-6 * np.prod(
            zooms
        ):
            raise ValueError("the affine is singular or not finite")
        check_spacing(zooms.tolist(), "its voxels")
        if (reach := np.abs(matrix[:3, 3]).max()) > MAX_ORIGIN:
            raise ValueError(f"its first voxel lies {reach:.3g} mm from the origin")
        axes = matrix[:3, :3] / zooms
        shear = np.abs(np.triu(axes.T @ axes, 1)).max()
        if shear > MAX_SHEAR:
            raise ValueError(
                f"its axes are at {np.degrees(np.arccos(shear)):.3g} degrees to each other, where "
                "distances need right angles: resample it"
            )
        rows = tuple(tuple(float(v) for v in row) for row in matrix)
        order = _axes_of(rows)
        source = spacing_of(zooms[a] for a, _ in order)
        canonical = triple(shape[a] for a, _ in order)
        grid, grid_shape = source, canonical
        if spacing is not None:
            pairs = list(zip(source, spacing, strict=True))
            grid = spacing_of(s if abs(s - t) <= _SAME_SPACING * t else t for s, t in pairs)
            extent = (n * s / t for n, s, t in zip(canonical, source, grid, strict=True))
            # A hundredth is spared: header noise such as 1.00001 mm must not add a voxel.
            grid_shape = triple(max(1, math.ceil(e - 0.01)) for e in extent)
        if math.prod(grid_shape) > MAX_VOXELS:
            raise ValueError(
                f"{_by(grid_shape)} voxels of {_by(grid)} mm are more than memory is asked for; "
                "larger voxels would fit"
            )
        return cls(
            source_shape=triple(shape),
            source_affine=rows,
            source_spacing=source,
            canonical_shape=canonical,
            grid_shape=grid_shape,
            grid_spacing=grid,
            boxes=dict(boxes or {}),
            unit=unit,
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
        for canonical_axis, (source_axis, _) in enumerate(_axes_of(self.source_affine)):
            zooms[source_axis] = self.source_spacing[canonical_axis]
        return spacing_of(zooms)

    def box(self, combination: Iterable[str] | None = None) -> Box:
        """Return the union of the boxes of a combination's modalities (``None``: of all acquired).

        Raises:
            InputError: a modality that was not acquired, or none.
        """
        if combination is None:
            return self._whole
        return self._union(list(combination))

    @functools.cached_property
    def _whole(self) -> Box:
        return self._union(list(self.boxes))

    def _union(self, names: list[str]) -> Box:
        missing = [n for n in names if n not in self.boxes]
        if missing or not names:
            raise InputError(
                f"no box for {missing or 'an empty combination'}: this case has "
                f"{list(self.boxes)}; ask for a combination of these."
            )
        return functools.reduce(Box.union, (self.boxes[name] for name in names))

    def canonical_view(self, source: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """View the last three axes, now the source's, in canonical orientation."""
        order = _axes_of(self.source_affine)
        leading = source.ndim - 3
        moved = source.transpose(*range(leading), *(leading + a for a, _ in order))
        a, b, c = (slice(None, None, -1 if flip else 1) for _, flip in order)
        return moved[..., a, b, c]

    def source_view(self, canonical: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Undo :meth:`canonical_view`, for ``[D, H, W]`` or a box of it."""
        order = _axes_of(self.source_affine)
        a, b, c = (slice(None, None, -1 if flip else 1) for _, flip in order)
        return canonical[a, b, c].transpose(np.argsort([axis for axis, _ in order]))

    def canonical_box(self, source: Box) -> Box:
        """Return a box of the source array, in canonical orientation."""
        lo, hi = [], []
        for axis, flip in _axes_of(self.source_affine):
            first, last, size = source.lo[axis], source.hi[axis], self.source_shape[axis]
            lo.append(size - last if flip else first)
            hi.append(size - first if flip else last)
        return Box(triple(lo), triple(hi))

    def to_grid(
        self, canonical: npt.NDArray[Any], order: Literal[0, 1]
    ) -> npt.NDArray[np.float32] | npt.NDArray[np.uint8]:
        """Resample ``[*, D, H, W]`` from the canonical volume to the full grid.

        Order 1 is linear and gives float32; 0, for labels, is nearest and gives uint8.
        """
        return _resample(canonical, self.source_spacing, self.grid_spacing, self.grid_shape, order)

    def to_source(
        self, volume: npt.NDArray[Any], box: Box, order: Literal[0, 1], *, first: float = 0
    ) -> npt.NDArray[Any]:
        """Put a box of the grid back into the source file's shape and orientation.

        ``[*, d, h, w]`` becomes ``[*, *source_shape]``, contiguous, 0 outside the box; ``first``
        stands there in ``volume[0]``: 1 where that is the background's probability. Order is 1
        (linear) for probabilities, 0 (nearest) for labels, where the spacing differs.
        """
        return self._placed(*self._source_part(volume, box, order, first), first)

    def to_source_classes(
        self, probabilities: npt.NDArray[np.float32], box: Box
    ) -> npt.NDArray[np.uint8]:
        """Return the most probable class, of equal ones the first, that :meth:`to_source` gives.

        Outside the box of ``[C, d, h, w]``, background first, all is background.
        """
        part, place = self._source_part(probabilities, box, 1, first=1)
        # Many times faster than argmax.
        classes = torch.from_numpy(part).max(0).indices.to(torch.uint8)
        return self._placed(classes.numpy(), place)

    def _source_part(
        self, volume: npt.NDArray[Any], box: Box, order: Literal[0, 1], first: float
    ) -> tuple[npt.NDArray[Any], Box]:
        """Bring a box of the grid to the canonical volume; beside it the place that it fills."""
        if tuple(volume.shape[-3:]) != box.shape:
            raise ValueError(f"the volume is {volume.shape[-3:]}, its box is {box.shape}")
        if not self.resampled:
            return volume, box
        near, far = self._surroundings(box)
        margin = np.zeros((*volume.shape[:-3], *near.shape), dtype=volume.dtype)
        if first:
            margin[0] = first
        margin[(..., *box.relative_to(near).slices)] = volume
        made = _resample(margin, self.grid_spacing, self.source_spacing, far.shape, order)
        return made.astype(volume.dtype, copy=False), far

    def _placed(self, part: npt.NDArray[Any], place: Box, first: float = 0) -> npt.NDArray[Any]:
        result = np.zeros((*part.shape[:-3], *self.source_shape), dtype=part.dtype)
        if first:
            result[0] = first
        self.canonical_view(result)[(..., *place.slices)] = part
        return result

    def _surroundings(self, box: Box) -> tuple[Box, Box]:
        """Return a box of the grid with a margin of one voxel or more, and its place in the source.

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
        return (Box(triple(near_lo), triple(near_hi)), Box(triple(far_lo), triple(far_hi)))

    def to_dict(self) -> dict[str, Any]:
        """Return primitives only, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Geometry:
        """Read what :meth:`to_dict` wrote."""
        return cls(
            source_shape=triple(raw["source_shape"]),
            source_affine=tuple(tuple(float(v) for v in row) for row in raw["source_affine"]),
            source_spacing=spacing_of(raw["source_spacing"]),
            canonical_shape=triple(raw["canonical_shape"]),
            grid_shape=triple(raw["grid_shape"]),
            grid_spacing=spacing_of(raw["grid_spacing"]),
            boxes={name: Box.from_dict(box) for name, box in raw["boxes"].items()},
            unit=float(raw.get("unit", 1.0)),
        )


def check_spacing(spacing: Iterable[float], what: str) -> None:
    """Compare a voxel size with what scanners make.

    The ``ValueError`` of a size outside :data:`MIN_SPACING` to :data:`MAX_SPACING` is a phrase that
    begins with ``what``.
    """
    sizes = list(spacing)
    if not all(MIN_SPACING <= s <= MAX_SPACING for s in sizes):
        raise ValueError(
            f"{what} measure {_by(sizes)} mm, where {MIN_SPACING:g} to {MAX_SPACING:g} mm are "
            "credible"
        )


def _by(numbers: Iterable[float]) -> str:
    return " x ".join(f"{n:.4g}" for n in numbers)


@functools.lru_cache(1024)  # the files of a case share their affine
def _axes_of(affine: Matrix) -> tuple[tuple[int, bool], ...]:
    """Return per canonical axis the source axis along it, and whether that one runs backwards."""
    pairs = [(0, False)] * 3
    for source_axis, (canonical_axis, sign) in enumerate(nib.io_orientation(np.array(affine))):
        pairs[int(canonical_axis)] = (source_axis, bool(sign < 0))
    return tuple(pairs)


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
    axes = memory_order(volume[(0,) * leading])
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


def spacing_of(values: Iterable[float]) -> Spacing:
    """Return three voxel sizes in mm, which YAML and JSON have in a list."""
    a, b, c = (float(v) for v in values)
    return a, b, c
