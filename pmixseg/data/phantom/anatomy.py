"""Anatomy of the phantom: voxel grids, smooth random fields, a deformed MNI152 brain.

All lengths are millimetres in one fixed field of view of 240×240×155 mm (the BraTS volume), so a
case has the same anatomy at every voxel size: random fields live on lattices that do not know the
voxel grid they are evaluated on.

Brain tissue comes from the ICBM 2009a maps that the nilearn package carries (Fonov et al. 2011,
doi 10.1016/j.neuroimage.2010.07.033); nothing is downloaded.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Field = NDArray[np.float32]
"""One value per voxel of a grid, ``[X, Y, Z]``."""

FIELD_OF_VIEW = (240.0, 240.0, 155.0)
"""Extent of a BraTS volume in mm; position p mm is the centre of the 1 mm voxel of index p."""

BRAIN_CENTRE = (119.5, 123.0, 73.0)
"""Where the brain's middle lies in the field of view, in mm."""

MNI_CENTRE = (0.0, -17.0, 5.0)
"""The brain's middle in MNI152 coordinates (mm, RAS)."""

MNI_ORIGIN = (-98.0, -134.0, -72.0)
"""MNI152 coordinates of voxel 0 of nilearn's 1 mm maps."""

MEAN_SIZE = 0.93
"""The MNI152 average is larger than a brain: 1.89 l against some 1.5 l in BraTS scans."""


class Tissues(NamedTuple):
    """Shares of the three tissues per voxel; they sum to ``brain``, which is 0 or 1."""

    wm: Field
    gm: Field
    csf: Field
    brain: NDArray[np.bool_]


@dataclass(frozen=True)
class Grid:
    """Voxel centres, isotropic ``spacing`` in mm, LPS as in BraTS, centred on the field of view."""

    shape: tuple[int, int, int]
    spacing: float

    @property
    def origin(self) -> tuple[float, float, float]:
        """Position of voxel (0, 0, 0) in the field of view, in mm."""
        x, y, z = (
            (extent - 1) / 2 - (n - 1) / 2 * self.spacing
            for extent, n in zip(FIELD_OF_VIEW, self.shape, strict=True)
        )
        return x, y, z

    def axes(self) -> list[NDArray[np.float64]]:
        """Return positions of the voxel centres per axis, in mm."""
        return [
            o + self.spacing * np.arange(n, dtype=np.float64)
            for o, n in zip(self.origin, self.shape, strict=True)
        ]

    def affine(self) -> NDArray[np.float64]:
        """Map voxels to scanner coordinates (RAS mm); first axis to the left, second backwards."""
        x, y, z = self.origin
        affine = np.diag([-self.spacing, -self.spacing, self.spacing, 1.0])
        affine[:3, 3] = -x, FIELD_OF_VIEW[1] - 1 - y, z
        return affine


def stream(seed: int, index: int, name: str) -> np.random.Generator:
    """Start random numbers of one purpose in one case, which shift those of no other."""
    return np.random.default_rng([seed, index, zlib.crc32(name.encode())])


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the uniform cubic B-spline at ``distance`` ≥ 0 knots from its middle."""
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far)


def _separable(values: Field, weights: list[Field]) -> Field:
    """Multiply every axis of ``values`` by its matrix ``[out, in]``."""
    for matrix in weights:
        # Contracting the first axis and appending the result cycles the axes back after three.
        values = np.tensordot(values, matrix, axes=([0], [1]))
    return np.ascontiguousarray(values, dtype=np.float32)


def smooth_noise(rng: np.random.Generator, grid: Grid, wavelength: float) -> Field:
    """Smooth Gaussian field of mean 0 and variance 1; its shortest period is ``wavelength`` mm.

    Standard normal coefficients on a lattice of half the wavelength that covers the field of view,
    interpolated by cubic B-splines and divided by the standard deviation that this leaves. The
    coefficients do not depend on ``grid``.
    """
    step = wavelength / 2
    counts = [int(np.ceil(extent / step)) + 7 for extent in FIELD_OF_VIEW]
    coefficients = rng.standard_normal(counts, dtype=np.float32)
    weights = []
    for positions, n in zip(grid.axes(), counts, strict=True):
        matrix = _cubic(np.abs(positions[:, None] / step + 3 - np.arange(n)))
        matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
        weights.append(matrix.astype(np.float32))
    return _separable(coefficients, weights)


def refine(values: Field, source: Grid, target: Grid) -> Field:
    """Evaluate a smooth field known on ``source`` on ``target`` (cubic B-splines).

    Values outside ``source`` continue its border.
    """
    if source == target:
        return values
    coefficients = ndimage.spline_filter(values, order=3, mode="mirror", output=np.float32)
    weights = []
    for positions, origin, n in zip(target.axes(), source.origin, source.shape, strict=True):
        inside = np.clip(positions, origin, origin + (n - 1) * source.spacing)
        t = (inside - origin) / source.spacing
        matrix = np.zeros((len(t), n), dtype=np.float32)
        for tap in range(-1, 3):
            knot = np.floor(t).astype(int) + tap
            # Knots beyond the border are mirrored, as spline_filter assumed.
            mirrored = np.abs(knot)
            mirrored = np.where(mirrored > n - 1, 2 * (n - 1) - mirrored, mirrored)
            np.add.at(matrix, (np.arange(len(t)), mirrored), _cubic(np.abs(t - knot)))
        weights.append(matrix)
    return _separable(coefficients, weights)


@lru_cache(maxsize=2)
def _templates(coarse: bool) -> tuple[Field, Field, Field, float]:
    """Return white matter, grey matter and brain mask of MNI152, and their voxel size in mm."""
    from nilearn import datasets  # takes two seconds to import, which only making a case should pay

    maps = [
        np.asarray(load(resolution=1).dataobj, dtype=np.float32)
        for load in (
            datasets.load_mni152_wm_template,
            datasets.load_mni152_gm_template,
            datasets.load_mni152_template,
        )
    ]
    maps[2] = (maps[2] > 0).astype(np.float32)
    if not coarse:
        return maps[0], maps[1], maps[2], 1.0
    # Point samples 3 mm apart of a 1 mm map would alias: average over 2 mm first.
    halves = []
    for values in maps:
        x, y, z = (n // 2 for n in values.shape)
        blocks = values[: 2 * x, : 2 * y, : 2 * z].reshape(x, 2, y, 2, z, 2)
        halves.append(blocks.mean(axis=(1, 3, 5), dtype=np.float32))
    return halves[0], halves[1], halves[2], 2.0


class Deformation:
    """Random affine and smooth elastic deformation of one patient's brain.

    An ``elastic`` part of 1 moves tissue by some 4 mm.
    """

    def __init__(self, seed: int, index: int, elastic: float = 1.0) -> None:
        self._key = seed, index
        self._elastic = elastic
        rng = stream(seed, index, "affine")
        pitch, yaw, roll = rng.normal(0, np.deg2rad(3), 3)
        turn = _rotation(0, pitch) @ _rotation(2, yaw) @ _rotation(1, roll)
        stretch = np.eye(3) + rng.normal(0, 0.01, (3, 3))
        scale = np.diag(1 / (MEAN_SIZE * rng.normal(1, 0.02) * rng.normal(1, 0.015, 3)))
        matrix = turn @ stretch @ scale @ np.diag([-1.0, -1.0, 1.0])
        self._from_lps: Field = matrix.astype(np.float32)
        self._shift: NDArray[np.float64] = rng.normal(0, 2.0, 3)
        self._atrophy = float(rng.lognormal(0, 0.25))

    def template_positions(self, grid: Grid) -> Field:
        """Return MNI152 coordinates (RAS mm) of the tissue at each voxel, ``[3, X, Y, Z]``."""
        rng = stream(*self._key, "elastic")
        position = np.empty((3, *grid.shape), dtype=np.float32)
        for axis, values in enumerate(np.meshgrid(*grid.axes(), indexing="ij", sparse=True)):
            position[axis] = values - BRAIN_CENTRE[axis] - self._shift[axis]
        position = np.tensordot(self._from_lps, position, axes=1)
        for axis in range(3):
            for amplitude, wavelength in ((3.0, 90.0), (1.6, 40.0), (0.8, 18.0)):
                noise = smooth_noise(rng, grid, wavelength)
                position[axis] += self._elastic * amplitude * noise
            position[axis] += MNI_CENTRE[axis]
        return position

    def tissues(self, grid: Grid, moved: Field | None = None) -> Tissues:
        """Return tissue shares of the deformed brain on ``grid``.

        ``moved`` says how far a tumour pushed tissue, ``[3, X, Y, Z]`` in mm and LPS: a voxel shows
        what was at its position minus this. The skull does not give way: the brain mask stays that
        of the healthy head.
        """
        position = self.template_positions(grid)
        wm_map, gm_map, mask_map, size = _templates(grid.spacing >= 2)
        brain = _sample(mask_map, size, position) > 0.5
        if moved is not None:
            position -= np.tensordot(self._from_lps, moved, axes=1)
        wm, gm = _sample(wm_map, size, position), _sample(gm_map, size, position)
        sulci = self._sulci(grid, position) * gm
        csf = self._atrophy * np.clip(1 - wm - gm, 0, None) + sulci
        # The maps are averages of 152 people; a single brain has sharper borders.
        shares = np.stack([wm, gm - sulci, csf]) ** 2
        shares *= brain / np.maximum(shares.sum(axis=0), 1e-6)
        return Tissues(shares[0], shares[1], shares[2], brain)

    def _sulci(self, grid: Grid, position: Field) -> Field:
        """Return winding sheets of CSF, 0 to 1, in the outer brain, where the average map has none.

        The sheets are where a smooth field is near 0. On voxels larger than a sheet is thick they
        are as much paler as they are wider.
        """
        sheet = smooth_noise(stream(*self._key, "sulci"), grid, 24.0)
        thin, wide = 0.16, np.hypot(0.16, 0.08 * grid.spacing)
        sheet = np.exp(-0.5 * (sheet / wide) ** 2) * (thin / wide)
        radius = sum(
            ((position[axis] - MNI_CENTRE[axis]) / extent) ** 2
            for axis, extent in enumerate((72.0, 90.0, 77.0))
        )
        return np.asarray(sheet * np.clip((radius - 0.35) / 0.2, 0, 1), dtype=np.float32)


def _rotation(axis: int, angle: float) -> NDArray[np.float64]:
    a, b = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[a, a] = matrix[b, b] = np.cos(angle)
    matrix[a, b], matrix[b, a] = -np.sin(angle), np.sin(angle)
    return matrix


def _sample(values: Field, size: float, position: Field) -> Field:
    """Interpolate a template linearly at MNI152 coordinates; 0 outside."""
    index = np.empty_like(position)
    for axis in range(3):
        # A block of `size` voxels has its centre (size - 1) / 2 mm behind its first voxel.
        index[axis] = (position[axis] - MNI_ORIGIN[axis] - (size - 1) / 2) / size
    sampled: Field = ndimage.map_coordinates(values, index, order=1, output=np.float32)
    return sampled
