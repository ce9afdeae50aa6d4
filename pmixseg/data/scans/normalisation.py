"""Named normalisations of intensities, also that of the published RFNet and mmFormer code."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pmixseg.data.scans.boxes import Box, bounds, triple
from pmixseg.data.scans.canonical import NORMALISATION, CanonicalCase
from pmixseg.errors import InputError

Number = TypeVar("Number", bound=np.generic)

JOINT_MASK = "zscore-joint-mask"
"""Published preprocessing of RFNet and mmFormer, see :func:`joint_mask`."""

NORMALISATIONS = (NORMALISATION, JOINT_MASK)
"""All of them; the first is the default."""

SMALLEST_SIDE = 128
"""Least voxels per axis of a crop, where the volume has them."""


def check_normalisation(name: str) -> None:
    """Refuse a normalisation that does not exist."""
    if name not in NORMALISATIONS:
        raise InputError(
            f"normalisation '{name}' is not known; use one of {', '.join(NORMALISATIONS)}."
        )


def computed_dtype(name: str, dtype: npt.DTypeLike) -> npt.DTypeLike:
    """Return the number type that a case is read in, before :func:`normalised`."""
    return dtype if name == NORMALISATION else np.float32


def normalised(case: CanonicalCase, name: str, dtype: npt.DTypeLike) -> CanonicalCase:
    """Return a case in a named normalisation.

    The case is in :func:`computed_dtype`; ``dtype`` is the result's.
    """
    check_normalisation(name)
    return case if name == NORMALISATION else joint_mask(case, dtype)


def joint_mask(case: CanonicalCase, dtype: npt.DTypeLike = np.float32) -> CanonicalCase:
    r"""Return a case as the published code of RFNet and mmFormer prepares it.

    The mask is where the sum of the acquired scans is above 0. With mean and deviation of a scan
    over this mask, every voxel of the crop becomes :math:`(x - \mu) / \sigma`, so the background
    is :math:`-\mu / \sigma` and not 0. The crop is the box of voxels that are not 0 in some scan,
    as the code has it: the last slice of each axis is lost, and a side below 128 voxels is grown.
    Axes count to the left, back and top, as in the files of BraTS. One crop serves all
    combinations. Scans that were not acquired stay 0.

    The published code always has four scans; with fewer, the mask is that of the acquired ones. The
    case must be in float32, for its rounding would show.
    """
    inner = bounds(np.any(case.image, axis=0))
    assert inner is not None  # a case has a scan that is not 0 everywhere
    old = case.geometry.box()
    box = published_crop(inner.moved(old.lo), case.geometry.grid_shape)
    scans = _intensities(_moved(case.image, old, box), case)
    mask = scans.sum(axis=0, dtype=np.float32) > 0
    image = np.zeros(scans.shape, dtype)
    for index, acquired in enumerate(case.acquired):
        if acquired:
            inside = scans[index][mask].astype(np.float64)
            image[index] = (scans[index] - inside.mean()) / inside.std()
    boxes = dict.fromkeys(case.geometry.boxes, box)
    made = replace(case, image=image, geometry=replace(case.geometry, boxes=boxes))
    return made if case.label is None else _with_label(made, case)


def published_crop(tight: Box, shape: tuple[int, int, int]) -> Box:
    """Return the crop of the published code, in canonical axes.

    Args:
        tight: box of the voxels that are not 0.
        shape: of the volume.

    Example:
        A side of 101 voxels is grown to 128. Of the other two the last voxel is lost: the lowest
        on axes that count to the right or front, the highest on the one that counts upwards.

        >>> published_crop(Box((50, 40, 7), (200, 220, 108)), (240, 240, 155))
        Box(lo=(51, 41, 0), hi=(200, 220, 129))
    """
    sides = []
    for axis, size in enumerate(shape):
        lo, hi = tight.lo[axis], tight.hi[axis]
        if axis < 2:  # counted from the other end
            lo, hi = size - hi, size - lo
        first, last = _published_side(lo, hi - 1)
        last = min(last, size)
        sides.append((size - last, size - first) if axis < 2 else (first, last))
    return Box(triple(lo for lo, _ in sides), triple(hi for _, hi in sides))


def _published_side(first: int, last: int) -> tuple[int, int]:
    """Return one side of the crop: where it begins, and where it ends (exclusive)."""
    if last - first < SMALLEST_SIDE:
        more = (SMALLEST_SIDE - (last - first)) // 2
        first, last = first - more, last + more + 1
    if first < 0:
        first, last = 0, last - first
    return first, last


def _intensities(zscores: npt.NDArray[np.float32], case: CanonicalCase) -> npt.NDArray[np.float32]:
    """Return the intensities of every scan, 0 outside its voxels."""
    scans = np.zeros_like(zscores)
    statistics = iter(case.statistics.values())  # in the order of the channels
    for index, acquired in enumerate(case.acquired):
        if acquired:
            mean, deviation = next(statistics)
            inside = zscores[index] != 0
            scans[index][inside] = zscores[index][inside] * deviation + mean
    return scans


def _moved(array: npt.NDArray[Number], old: Box, new: Box) -> npt.NDArray[Number]:
    """Move the last three axes from one box to another of a grid; 0 where the old one ends."""
    made: npt.NDArray[Number] = np.zeros((*array.shape[:-3], *new.shape), array.dtype)
    both = old.intersection(new)
    assert both is not None  # a crop holds the brain
    made[(..., *both.relative_to(new).slices)] = array[(..., *both.relative_to(old).slices)]
    return made


def _with_label(made: CanonicalCase, case: CanonicalCase) -> CanonicalCase:
    """Return the label on the new crop; what the crop cuts off is kept at source resolution."""
    assert case.label is not None
    old, new = case.geometry.box(), made.geometry.box()
    label = _moved(case.label, old, new)
    native, place = case.label_native, case.label_box
    if native is None and np.count_nonzero(label) < np.count_nonzero(case.label):
        native, place = case.label, old  # not resampled: the grid is the canonical volume
    return replace(made, label=label, label_native=native, label_box=place)
