"""Read the volume of one file of a case, check it, and compute what depends on it alone.

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

from pmixseg.data.formats.nifti import Scan
from pmixseg.data.scans.boxes import Box, bounds, memory_order
from pmixseg.data.scans.brains import not_a_brain
from pmixseg.data.scans.geometry import Geometry, Spacing
from pmixseg.errors import InputError
from pmixseg.task import Task

_NO_CLASS = 255
_BLOCK = 8
_SMALLEST = 1e-12
"""Smaller intensities are none, and their squares would vanish in float32."""

_SAME_GRID = 0.1
"""Share of a voxel by which the corners of two files of a case may differ."""


@dataclass(frozen=True)
class Place:
    """Where one file of a case lies.

    Args:
        geometry: its grids, without boxes.
        name: how messages name the file.
        oriented: whether the file says how it lies.
    """

    geometry: Geometry
    name: str
    oriented: bool = True


def place_of(scan: Scan, spacing: Spacing | None, where: str) -> Place:
    """Say where a file lies, on a grid of ``spacing`` or, with ``None``, of its own.

    Raises:
        InputError: its affine has no orientation, or its voxels or its grid have a size that no
            scan has.
    """
    x, y, z = scan.data.shape
    try:
        geometry = Geometry.of((x, y, z), scan.affine, spacing, unit=scan.unit)
    except ValueError as error:
        unit = "" if scan.unit == 1 else f"; one unit of its header is {scan.unit:g} mm"
        raise InputError(
            f"{where}: {scan.name} has no usable geometry ({error}{unit}); repair its header."
        ) from error
    return Place(geometry, scan.name, scan.oriented)


def same_grid(first: Place, other: Place, where: str) -> Geometry:
    """Compare two files of one case after both are in canonical orientation.

    The other file is read by the geometry that is returned: the reference's where both have the
    same axes. Of axes near 45 degrees, rounding must not decide twice which is which.

    Raises:
        InputError: shapes differ, or some corner lies further apart than a tenth of a voxel.
    """
    one, two = first.geometry, other.geometry
    limit = _SAME_GRID * min(one.source_spacing)
    same_axes = one.source_shape == two.source_shape
    if same_axes and _apart(one.affine, two.affine, one.source_shape) <= limit:
        return one
    if one.canonical_shape != two.canonical_shape:
        raise InputError(
            f"{where}: {other.name} has shape {two.source_shape}, but {first.name} has "
            f"{one.source_shape}; co-register the files of a case to one grid."
        )
    # Of axes in another order, the grids may still be one.
    distance = _apart(one.canonical_affine, two.canonical_affine, one.canonical_shape)
    if distance > limit:
        if first.oriented != other.oriented:
            silent = other if first.oriented else first
            raise InputError(
                f"{where}: {other.name} and {first.name} differ by up to {distance:.3g} mm, for "
                f"{silent.name} does not say how it lies (its qform_code and sform_code are 0); "
                "restore its header from the original scan."
            )
        raise InputError(
            f"{where}: {other.name} and {first.name} have affines that differ by up to "
            f"{distance:.3g} mm; co-register the files of a case to one grid, or correct the "
            "header."
        )
    return two


def _apart(
    one: npt.NDArray[np.float64], two: npt.NDArray[np.float64], shape: tuple[int, int, int]
) -> float:
    """Return the largest distance in mm, along an axis, of corners of two volumes of one shape."""
    corners = np.array([[*c, 1] for c in np.ndindex(2, 2, 2)]) * [*shape, 1]
    return float(np.abs((one - two) @ corners.T).max())


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
        doubt: a phrase of :func:`~pmixseg.data.scans.brains.not_a_brain` on the scan as it lies in
            its file, whatever the grid.
    """

    values: npt.NDArray[Any]
    box: Box
    mean: float
    deviation: float
    geometry: Geometry
    doubt: str | None = None

    def write_zscores(self, target: npt.NDArray[Any]) -> None:
        """Write (x - mean) / deviation in non-zero voxels, and 0 elsewhere.

        The target is float16 or float32, in canonical orientation and of the shape of :attr:`box`.
        """
        view = target if self.geometry.resampled else self.geometry.source_view(target)
        order = memory_order(self.values)
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


def signal_of(scan: Scan, geometry: Geometry, where: str, role: str = "a scan") -> Signal:
    """Find a modality's non-zero voxels in the grid, after resampling if the grid asks for it.

    ``role`` is how a doubt about it names the modality.

    Raises:
        InputError: NaN or infinity, no non-zero voxel, the same value in all of them, or values
            that are too small.
    """
    values = scan.values()
    doubt = None
    if geometry.resampled:
        doubt = not_a_brain(values, geometry.source_spacing, role)
        _check_contrast(values, scan.name, where)  # afterwards, its border would look like contrast
        values = geometry.to_grid(geometry.canonical_view(values), order=1)
    box = bounds(values)
    if box is None:
        raise InputError(f"{where}: {scan.name} is 0 everywhere; leave the file out or replace it.")
    whole = box.shape == values.shape
    # A copy, so that the file's whole content can go: its memory serves the next file again.
    values = values[box.slices].copy(order="K")
    with np.errstate(over="ignore", invalid="ignore"):  # told below
        count, mean, deviation = _statistics(values)
    if count == 0 or not np.isfinite(mean + deviation):
        raise InputError(
            f"{where}: {scan.name} holds NaN, infinite or far too large voxels; replace them, "
            "background by 0."
        )
    if abs(mean) + deviation < _SMALLEST:
        raise InputError(
            f"{where}: {scan.name} holds voxels around {mean:.1g}, too small for an MR signal; "
            "repair scl_slope in its header, or export it again."
        )
    if deviation <= 1e-5 * abs(mean):
        raise _flat(scan.name, mean, where)
    if not geometry.resampled:
        doubt = not_a_brain(values, geometry.source_spacing, role, whole)
    on_grid = box if geometry.resampled else geometry.canonical_box(box)
    return Signal(values, on_grid, mean, deviation, geometry, doubt)


def _statistics(values: npt.NDArray[Any]) -> tuple[int, float, float]:
    """Return the number, mean and population standard deviation of the non-zero voxels.

    Voxels are summed in float64 as distances from the largest one. Sums of integers are exact
    there, so that a scan has one mean, however its axes lie in the file.
    """
    slow = values.transpose(memory_order(values))
    pivot = float(values.max() or values.min())
    count, sums, squares = 0, [], []
    for start in range(0, len(slow), _BLOCK):
        planes = slow[start : start + _BLOCK].astype(np.float64).ravel()
        brain = planes != 0
        count += int(np.count_nonzero(brain))
        planes -= np.multiply(brain, pivot)
        sums.append(float(planes.sum()))
        squares.append(float(np.dot(planes, planes)))
    total = math.fsum(sums)
    # No voxel is further from the mean than √count deviations: little is lost by the difference.
    spread = max(math.fsum(squares) - total * total / max(count, 1), 0.0)
    return count, pivot + total / max(count, 1), math.sqrt(spread / max(count, 1))


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


@dataclass(frozen=True)
class Coding:
    """What the numbers of a label file mean; use :meth:`of`.

    Args:
        table: 256 entries, number in the file -> class index.
        numbers: label name -> number in the file.
        ignored: numbers that become background.
        doubtful: those of them that other cohorts give to :attr:`witness`; they are ignored only
            where the file shows its coding by also holding the witness's own number.
        witness: name of a label.
        unannotated: those ignored numbers that mark voxels which nobody annotated.
    """

    table: npt.NDArray[np.uint8]
    numbers: Mapping[str, int]
    ignored: tuple[int, ...]
    doubtful: tuple[int, ...] = ()
    witness: str = ""
    unannotated: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        task: Task,
        codes: Mapping[str, int] | None = None,
        ignored: Sequence[int] = (),
        doubtful: Sequence[int] = (),
        witness: str = "",
        also: Mapping[int, str] | None = None,
        unannotated: Sequence[int] = (),
    ) -> Coding:
        """Return the coding of one layout.

        Each ``also`` is a further number -> label name, codes of ``None`` are class indices; the
        rest are fields of the class.

        Raises:
            InputError: a label without a number of its own from 1 to 255, or a name too many.
        """
        used = dict(codes or {name: i + 1 for i, name in enumerate(task.labels)})
        further = dict(also or {})
        numbers = [*used.values(), *further, *ignored]
        usable = len({0, *numbers}) == len(numbers) + 1 and all(0 < n < 256 for n in numbers)
        known = set(further.values()) <= set(task.labels)
        if set(used) != set(task.labels) or not usable or not known:
            raise InputError(
                f"label codes {used}{f' and {further}' if further else ''} with ignored codes "
                f"{list(ignored)} must give each of {list(task.labels)} a number of its own from 1 "
                "to 255; correct the layout."
            )
        table = np.full(256, _NO_CLASS, dtype=np.uint8)
        table[[0, *ignored]] = 0
        for index, name in enumerate(task.labels):
            table[[used[name], *(n for n, label in further.items() if label == name)]] = index + 1
        known_as = (tuple(doubtful), witness) if witness in used else ((), "")
        return cls(table, used, tuple(ignored), *known_as, tuple(unannotated))


@dataclass(frozen=True)
class LabelMap:
    """A label file as classes.

    Args:
        box: of the non-zero voxels, in the canonical volume; empty where there are none.
        classes: class indices on that box, canonical orientation.
        ignored: number in the file -> voxels of it that became background, of those that occur.
        partly: whether there are voxels that nobody annotated; then it is not used as a label.
    """

    box: Box
    classes: npt.NDArray[np.uint8]
    ignored: Mapping[int, int]
    partly: bool


def label_map(scan: Scan, geometry: Geometry, coding: Coding, where: str) -> LabelMap:
    """Read a label file.

    Raises:
        InputError: a number that is no integer or that the coding does not know, a number whose
            meaning is in doubt, or a scale that leaves nothing of the labels.
    """
    numbers = scan.values()
    tight = bounds(numbers)
    box = tight or Box((0, 0, 0), (0, 0, 0))
    part = numbers[box.slices]
    with np.errstate(invalid="ignore"):  # what cannot be cast differs from its cast, below
        small = (np.rint(part) if part.dtype.kind == "f" else part).astype(np.uint8)
    # A thousandth: scale factors and float files leave noise on integers.
    same = np.abs(part - small) < 1e-3 if part.dtype.kind == "f" else part == small
    classes = coding.table[small]
    wrong = ~same | (classes == _NO_CLASS)
    if wrong.any():
        raise _unknown_numbers(np.unique(part[wrong]), scan.name, coding, where)
    if scan.scaled and tight is not None and not small.any():
        raise InputError(
            f"{where}: {scan.name} holds labels, but times its scale factor of {scan.slope:g} all "
            "of them are 0; repair scl_slope in its header."
        )
    counts = np.bincount(small.ravel(), minlength=256) if coding.ignored else np.zeros(256, int)
    ignored = {c: int(counts[c]) for c in coding.ignored if counts[c]}
    doubtful = [c for c in coding.doubtful if c in ignored]
    if doubtful and not counts[coding.numbers[coding.witness]]:
        raise InputError(
            f"{where}: {scan.name} holds the label value {doubtful[0]} and no "
            f"{coding.numbers[coding.witness]}, so {doubtful[0]} may be {coding.witness}, as until "
            "BraTS 2021, or a cavity, as from 2024; say which: --layout brats2024 takes it for a "
            "cavity, and a layout file with its own codes for what you write there."
        )
    partly = bool(set(ignored).intersection(coding.unannotated))
    return LabelMap(geometry.canonical_box(box), geometry.canonical_view(classes), ignored, partly)


def _unknown_numbers(odd: npt.NDArray[Any], name: str, coding: Coding, where: str) -> InputError:
    values = odd.tolist()
    shown = ", ".join(f"{v:g}" for v in values[:5]) + (", ..." if len(values) > 5 else "")
    start = f"{where}: {name} holds the label values {shown}"
    if not np.isfinite(odd).all():
        return InputError(f"{start}, which are no numbers; replace them, background by 0.")
    if (np.abs(odd - np.rint(odd)) >= 1e-3).any():
        return InputError(
            f"{start}, which are no whole numbers, as after interpolation or a wrong scale factor; "
            "resample labels by nearest neighbours, or export them again."
        )
    known = ", ".join(str(v) for v in np.flatnonzero(coding.table != _NO_CLASS))
    return InputError(
        f"{start}, but its layout knows {known}; name the right layout, or add them to the "
        "layout's codes or ignored codes."
    )
