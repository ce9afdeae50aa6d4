"""What one file of a case must be, and what is computed from it alone.

Voxels are handled in the file's own axis order (in memory, its reverse), since numpy's loops are
several times slower over flipped axes; the result is a view in canonical orientation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pmixseg.data.scans.geometry import Box, Geometry, Spacing
from pmixseg.data.scans.nifti import Scan
from pmixseg.errors import InputError
from pmixseg.task import Task

_NO_CLASS = 255
_BLOCK = 8
_SAME_GRID = 0.1
"""Share of a voxel by which the corners of two files of a case may differ."""


def geometry_of(scan: Scan, spacing: Spacing | None, where: str) -> Geometry:
    """The grids of one file, without boxes.

    Raises:
        InputError: its affine has no orientation.
    """
    x, y, z = scan.data.shape
    try:
        return Geometry.of((x, y, z), scan.affine, spacing)
    except ValueError as error:
        raise InputError(
            f"{where}: {scan.name} has no usable orientation ({error}); repair its header."
        ) from error


def check_same_grid(first: Geometry, other: Geometry, name: str, named: str, where: str) -> None:
    """Compare two files of one case after both are in canonical orientation.

    Args:
        first: grid of the reference file.
        other: grid of the file in question.
        name: the reference file.
        named: the file in question.
        where: how messages name the case.

    Raises:
        InputError: shapes differ, or some corner lies further apart than a tenth of a voxel.
    """
    if first.canonical_shape != other.canonical_shape:
        raise InputError(
            f"{where}: {named} has shape {other.source_shape}, but {name} has "
            f"{first.source_shape}; co-register the files of a case to one grid."
        )
    corners = np.array([[*c, 1] for c in np.ndindex(2, 2, 2)]) * [*first.canonical_shape, 1]
    distance = np.abs((first.canonical_affine - other.canonical_affine) @ corners.T).max()
    if distance > _SAME_GRID * min(first.source_spacing):
        raise InputError(
            f"{where}: {named} and {name} have affines that differ by up to {distance:.3g} mm; "
            "co-register the files of a case to one grid, or correct the header."
        )


@dataclass(frozen=True)
class Signal:
    """The non-zero part of one modality, and its statistics.

    Args:
        values: intensities on the tight box of the non-zero voxels; in the source's axis order, or
            in canonical order if ``geometry`` is resampled.
        box: that box in the grid.
        mean: over the non-zero voxels.
        deviation: population standard deviation over the non-zero voxels.
        geometry: the grids.
    """

    values: npt.NDArray[Any]
    box: Box
    mean: float
    deviation: float
    geometry: Geometry

    def write_zscores(self, target: npt.NDArray[Any]) -> None:
        """Write (x - mean) / deviation in non-zero voxels, and 0 elsewhere.

        Args:
            target: float16 or float32, canonical orientation, the shape of :attr:`box`.
        """
        view = target if self.geometry.resampled else self.geometry.source_view(target)
        order = _memory_order(self.values)
        source, view = self.values.transpose(order), view.transpose(order)
        mean, factor = np.float32(self.mean), np.float32(1.0 / self.deviation)
        # Memory order is usually reversed on the way; blocks of the middle axis keep both sides of
        # that, and all that is computed, in the cache.
        for start in range(0, source.shape[1], _BLOCK):
            scores = source[:, start : start + _BLOCK].astype(np.float32)
            # Not a product with the mask afterwards: that would make zeros negative.
            scores -= np.multiply(scores != 0, mean, dtype=np.float32)
            scores *= factor
            for offset, plane in enumerate(_rounded(scores, target.dtype).swapaxes(0, 1)):
                view[:, start + offset] = plane


def signal_of(scan: Scan, geometry: Geometry, where: str) -> Signal:
    """Find a modality's non-zero voxels in the grid, after resampling if the grid asks for it.

    Raises:
        InputError: NaN or infinity, no non-zero voxel, or the same value in all of them.
    """
    values = scan.values()
    if geometry.resampled:
        _check_contrast(values, scan.name, where)  # afterwards, its border would look like contrast
        values = geometry.to_grid(geometry.canonical_view(values), order=1)
    box = bounds(values)
    if box is None:
        raise InputError(f"{where}: {scan.name} is 0 everywhere; leave the file out or replace it.")
    # A copy, so that the file's whole content can go: its memory serves the next file again.
    values = values[box.slices].copy(order="K")
    with np.errstate(over="ignore", invalid="ignore"):  # told below
        count, mean, deviation = _statistics(values)
    if count == 0 or not np.isfinite(mean + deviation):
        raise InputError(
            f"{where}: {scan.name} holds NaN or infinite voxels; replace them, background by 0."
        )
    if deviation <= 1e-5 * abs(mean):
        raise _flat(scan.name, mean, where)
    on_grid = box if geometry.resampled else geometry.canonical_box(box)
    return Signal(values, on_grid, mean, deviation, geometry)


def _statistics(values: npt.NDArray[Any]) -> tuple[int, float, float]:
    """Number, mean and population standard deviation of the non-zero voxels.

    Blocks are summed in float32 around their own mean, and joined in float64 after Chan, Golub and
    LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """
    slow = values.transpose(_memory_order(values))
    counts, means, squares = [], [], []
    for start in range(0, len(slow), _BLOCK):
        planes = slow[start : start + _BLOCK].astype(np.float32).reshape(-1, slow[0].size)
        brain = planes != 0
        counts.append(np.count_nonzero(brain))
        means.append(planes.sum(axis=1).sum(dtype=np.float64) / max(counts[-1], 1))
        planes -= np.multiply(brain, np.float32(means[-1]), dtype=np.float32)
        squares.append(np.square(planes, out=planes).sum(axis=1).sum(dtype=np.float64))
    count = sum(counts)
    mean = float(np.dot(counts, means)) / max(count, 1)
    spread = sum(squares) + float(np.dot(counts, (np.array(means) - mean) ** 2))
    return int(count), mean, math.sqrt(spread / max(count, 1))


def _rounded(values: npt.NDArray[np.float32], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if dtype != np.float16:
        return values
    # numpy rounds to half precision several times slower than torch, to the same bits.
    half: npt.NDArray[Any] = torch.from_numpy(values).half().numpy()
    return half


def _check_contrast(values: npt.NDArray[Any], name: str, where: str) -> None:
    value = values.max() or values.min()
    if value != 0 and np.array_equal(values == value, values != 0):
        raise _flat(name, float(value), where)


def _flat(name: str, value: float, where: str) -> InputError:
    return InputError(
        f"{where}: {name} has the same value {value:g} in all its non-zero voxels; leave the file "
        "out or replace it."
    )


def bounds(values: npt.NDArray[Any]) -> Box | None:
    """The tight box of the non-zero voxels (NaN counts as one), or ``None``."""
    order = _memory_order(values)
    slow = values.transpose(order)
    integers = slow.dtype.kind in "iu"
    plane = np.bitwise_or.reduce(slow, axis=0) != 0 if integers else (slow != 0).any(axis=0)
    if not plane.any():
        return None
    edges = [(0, 0), _edges(plane.any(axis=1)), _edges(plane.any(axis=0))]
    first = next(i for i in range(len(slow)) if slow[i].any())
    last = next(i for i in reversed(range(len(slow))) if slow[i].any())
    edges[0] = (first, last + 1)
    lo, hi = [0, 0, 0], [0, 0, 0]
    for axis, (low, high) in zip(order, edges, strict=True):
        lo[axis], hi[axis] = low, high
    return Box((lo[0], lo[1], lo[2]), (hi[0], hi[1], hi[2]))


def _edges(hit: npt.NDArray[np.bool_]) -> tuple[int, int]:
    return int(hit.argmax()), len(hit) - int(hit[::-1].argmax())


def _memory_order(values: npt.NDArray[Any]) -> list[int]:
    """Axes by falling stride: transposed so, a volume is walked as it lies in memory."""
    return [int(a) for a in np.argsort([-abs(s) for s in values.strides], kind="stable")]


def class_table(
    task: Task, codes: Mapping[str, int] | None, ignored: Sequence[int]
) -> npt.NDArray[np.uint8]:
    """Table of 256 entries from a number in the label file to a class index.

    Args:
        task: its labels, class index = position + 1.
        codes: label name -> number (``None``: class index).
        ignored: numbers that become background.

    Raises:
        InputError: a label without a number of its own from 1 to 255, or a name too many.
    """
    used = codes or {name: i + 1 for i, name in enumerate(task.labels)}
    numbers = [*used.values(), *ignored]
    usable = len({0, *numbers}) == len(numbers) + 1 and all(0 < n < 256 for n in numbers)
    if set(used) != set(task.labels) or not usable:
        raise InputError(
            f"label codes {dict(used)} with ignored codes {list(ignored)} must give each of "
            f"{list(task.labels)} a number of its own from 1 to 255; correct the layout."
        )
    table = np.full(256, _NO_CLASS, dtype=np.uint8)
    table[[0, *ignored]] = 0
    for index, name in enumerate(task.labels):
        table[used[name]] = index + 1
    return table


def classes_of(
    scan: Scan, geometry: Geometry, table: npt.NDArray[np.uint8], where: str
) -> tuple[Box, npt.NDArray[np.uint8]]:
    """Class indices on the tight box of a label map's non-zero voxels, canonical orientation.

    An empty label map gives a box and an array without voxels.

    Raises:
        InputError: a number that is no integer, or that the table does not know.
    """
    numbers = scan.values()
    box = bounds(numbers) or Box((0, 0, 0), (0, 0, 0))
    part = numbers[box.slices]
    with np.errstate(invalid="ignore"):  # what cannot be cast differs from its cast, below
        small = (np.rint(part) if part.dtype.kind == "f" else part).astype(np.uint8)
    # A thousandth: scale factors and float files leave noise on integers.
    same = np.abs(part - small) < 1e-3 if part.dtype.kind == "f" else part == small
    classes = table[small]
    wrong = ~same | (classes == _NO_CLASS)
    if wrong.any():
        odd = np.unique(part[wrong]).tolist()
        shown = ", ".join(f"{v:g}" for v in odd[:5]) + (", ..." if len(odd) > 5 else "")
        known = ", ".join(str(v) for v in np.flatnonzero(table != _NO_CLASS))
        raise InputError(
            f"{where}: {scan.name} holds the label values {shown}, but its layout knows {known}; "
            "name the right layout, or add them to the layout's codes or ignored codes."
        )
    return geometry.canonical_box(box), geometry.canonical_view(classes)
