"""One canonicalisation for everything: `prepare` and `segment` both go through here.

RAS orientation, optional resampling, z-score of each modality inside its own non-zero voxels,
background exactly 0, crop to the brain. What becomes of one modality depends on no other, so that
testing a combination equals segmenting that combination's files alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pmixseg.data.geometry import BOX_MULTIPLE, Box, Geometry, Spacing
from pmixseg.data.nifti import Scan, ScanReader, Source
from pmixseg.errors import InputError
from pmixseg.task import Task

__all__ = [
    "BOX_MULTIPLE",
    "NORMALISATION",
    "STORE_DTYPE",
    "Box",
    "CanonicalCase",
    "Geometry",
    "Source",
    "canonicalise",
]

NORMALISATION = "zscore-own-mask"
"""Name of the intensity rule, written to stores and checkpoints."""

STORE_DTYPE = "float16"
"""Default number type; a scan segmented directly is rounded like a stored one."""


@dataclass
class CanonicalCase:
    """A case ready for the network.

    Args:
        image: ``[M, d, h, w]``, cropped to ``geometry.box()``; a modality that was not acquired is
            all 0.
        acquired: one flag per modality of the task.
        label: ``[d, h, w]`` uint8 class indices on the same box, or ``None`` without a label.
        label_native: where ``label`` cannot give the source label back (resampled, or voxels
            outside the box): uint8 class indices at source resolution in canonical orientation,
            cropped to ``label_box``.
        label_box: where ``label_native`` lies in the canonical volume.
        geometry: the grids, and the way back.
        digests: modality or ``label`` -> SHA-256 of its file's bytes.
    """

    image: npt.NDArray[Any]
    acquired: tuple[bool, ...]
    label: npt.NDArray[np.uint8] | None
    label_native: npt.NDArray[np.uint8] | None
    label_box: Box | None
    geometry: Geometry
    digests: Mapping[str, str]


def canonicalise(
    images: Mapping[str, Source],
    label: Source | None,
    task: Task,
    codes: Mapping[str, int] | None = None,
    spacing: Spacing | None = None,
    *,
    ignored: Sequence[int] = (),
    dtype: npt.DTypeLike = STORE_DTYPE,
    where: str = "case",
) -> CanonicalCase:
    """Bring one case into the form that stores hold and networks read.

    Args:
        images: modality name -> file, (4-D file, channel) or nibabel image; any subset of the
            task's modalities, at least one.
        label: the label map, or ``None``.
        task: modalities and labels.
        codes: label name -> number in the label file (``None``: class index).
        spacing: voxel size in mm to resample to, per canonical axis; linear for images, nearest
            for labels. ``None`` keeps the source's.
        ignored: numbers in the label file that are no class of the task and become background.
        dtype: ``float16`` or ``float32``.
        where: how messages name the case.

    Raises:
        InputError: a damaged file, files that do not lie on one grid, a volume without signal or
            with NaN, a label value outside the coding.
    """
    unknown = sorted(set(images) - set(task.modalities))
    if unknown or not images:
        raise InputError(
            f"{where}: {unknown or 'no image'} given, but task '{task.name}' has the modalities "
            f"{list(task.modalities)}; give at least one of these."
        )
    reader = ScanReader(where)
    geometry: Geometry | None = None
    reference = ""
    parts: dict[str, tuple[Box, npt.NDArray[Any]]] = {}
    for name in task.modalities:
        if name not in images:
            continue
        scan = reader.read(images[name], name)
        own = _geometry_of(scan, spacing, where)
        if geometry is None:
            geometry, reference = own, scan.name
        _check_same_grid(geometry, own, reference, scan.name, where)
        parts[name] = _normalised(scan, own, np.dtype(dtype), where)
    assert geometry is not None
    geometry = replace(
        geometry,
        boxes={n: b.grow(BOX_MULTIPLE, geometry.grid_shape) for n, (b, _) in parts.items()},
    )
    box = geometry.box()
    image = np.zeros((task.num_modalities, *box.shape), dtype=dtype)
    for index, name in enumerate(task.modalities):
        if name in parts:
            tight, values = parts[name]
            image[(index, *tight.relative_to(box).slices)] = values
    case = CanonicalCase(
        image=image,
        acquired=tuple(n in parts for n in task.modalities),
        label=None,
        label_native=None,
        label_box=None,
        geometry=geometry,
        digests=reader.digests,
    )
    if label is not None:
        _add_label(case, reader, label, reference, _coding(task, codes, ignored))
    return case


def _geometry_of(scan: Scan, spacing: Spacing | None, where: str) -> Geometry:
    x, y, z = scan.data.shape
    try:
        return Geometry.of((x, y, z), scan.affine, spacing)
    except ValueError as error:
        raise InputError(
            f"{where}: {scan.name} has no usable orientation ({error}); repair its header."
        ) from error


def _check_same_grid(first: Geometry, other: Geometry, name: str, named: str, where: str) -> None:
    if first.canonical_shape != other.canonical_shape:
        raise InputError(
            f"{where}: {named} has shape {other.source_shape}, but {name} has "
            f"{first.source_shape}; co-register the files of a case to one grid."
        )
    corners = np.array([[*c, 1] for c in np.ndindex(2, 2, 2)]) * [*first.canonical_shape, 1]
    distance = np.abs((first.canonical_affine - other.canonical_affine) @ corners.T).max()
    if distance > 0.1 * min(first.source_spacing):
        raise InputError(
            f"{where}: {named} and {name} have affines that differ by up to {distance:.3g} mm; "
            "co-register the files of a case to one grid, or correct the header."
        )


def _normalised(
    scan: Scan, geometry: Geometry, dtype: np.dtype[Any], where: str
) -> tuple[Box, npt.NDArray[Any]]:
    """Box of the non-zero voxels in the grid, and their z-scores there."""
    values = geometry.canonical_view(scan.values())
    if geometry.resampled:
        values = geometry.to_grid(values, order=1)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InputError(
            f"{where}: {scan.name} holds NaN or infinite voxels; replace them, background by 0."
        )
    mask = values != 0
    if not mask.any():
        raise InputError(f"{where}: {scan.name} is 0 everywhere; leave the file out or replace it.")
    box = _bounds(mask)
    inside, values = mask[box.slices], values[box.slices].astype(np.float32)
    brain = values[inside]
    mean, deviation = float(brain.mean(dtype=np.float64)), float(brain.std(dtype=np.float64))
    if deviation == 0:
        raise InputError(
            f"{where}: {scan.name} has the same value {mean:g} in all its non-zero voxels; leave "
            "the file out or replace it."
        )
    return box, np.where(inside, (values - mean) / deviation, 0).astype(dtype)


def _bounds(mask: npt.NDArray[np.bool_]) -> Box:
    lo, hi = [], []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        lo.append(int(hit[0]))
        hi.append(int(hit[-1]) + 1)
    return Box((lo[0], lo[1], lo[2]), (hi[0], hi[1], hi[2]))


def _coding(
    task: Task, codes: Mapping[str, int] | None, ignored: Sequence[int]
) -> npt.NDArray[np.uint8]:
    """Table from a number in the label file to a class index; 255 is no class."""
    used = codes or {name: i + 1 for i, name in enumerate(task.labels)}
    unnamed = [n for n in task.labels if n not in used] + [n for n in used if n not in task.labels]
    numbers = [*used.values(), *ignored]
    if unnamed or len({0, *numbers}) != len(numbers) + 1 or not all(0 < n < 256 for n in numbers):
        raise InputError(
            f"label codes {dict(used)} with ignored {list(ignored)} must give each of "
            f"{list(task.labels)} its own number from 1 to 255; correct the layout."
        )
    table = np.full(256, 255, dtype=np.uint8)
    table[[0, *ignored]] = 0
    for index, name in enumerate(task.labels):
        table[used[name]] = index + 1
    return table


def _add_label(
    case: CanonicalCase,
    reader: ScanReader,
    label: Source,
    reference: str,
    table: npt.NDArray[np.uint8],
) -> None:
    scan = reader.read(label, "label")
    geometry, where = case.geometry, reader.where
    own = _geometry_of(scan, None, where)
    _check_same_grid(geometry, own, reference, scan.name, where)
    numbers = scan.values()
    small = numbers.astype(np.uint8)
    if not (small == numbers).all() or (table[small] == 255).any():
        found = np.unique(numbers)
        odd = [v for v in found.tolist() if v != int(v) or not 0 <= v < 256 or table[int(v)] == 255]
        known = np.flatnonzero(table != 255).tolist()
        raise InputError(
            f"{where}: {scan.name} holds the label values {odd[:5]}, but the layout knows {known}; "
            "name the right layout, or add the values to its codes or ignored codes."
        )
    classes = own.canonical_view(table[small])
    box = geometry.box()
    on_grid = geometry.to_grid(classes, order=0) if geometry.resampled else classes
    case.label = np.ascontiguousarray(on_grid[box.slices])
    tight = _bounds(classes > 0) if classes.any() else Box((0, 0, 0), (0, 0, 0))
    if geometry.resampled or not box.contains(tight):
        case.label_native = np.ascontiguousarray(classes[tight.slices])
        case.label_box = tight
