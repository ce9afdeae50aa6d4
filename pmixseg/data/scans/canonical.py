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

from pmixseg.data.scans.geometry import BOX_MULTIPLE, Box, Geometry, Spacing
from pmixseg.data.scans.nifti import ScanReader, Source
from pmixseg.data.scans.volumes import (
    Signal,
    check_same_grid,
    class_table,
    classes_of,
    geometry_of,
    signal_of,
)
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
    table = class_table(task, codes, ignored)
    geometry: Geometry | None = None
    reference = ""
    signals: dict[str, Signal] = {}
    for name in task.modalities:
        if name not in images:
            continue
        scan = reader.read(images[name], name)
        own = geometry_of(scan, spacing, where)
        if geometry is None:
            geometry, reference = own, scan.name
        check_same_grid(geometry, own, reference, scan.name, where)
        signals[name] = signal_of(scan, own, where)
    assert geometry is not None  # there is at least one image
    boxes = {n: s.box.grow(BOX_MULTIPLE, geometry.grid_shape) for n, s in signals.items()}
    geometry = replace(geometry, boxes=boxes)
    case = CanonicalCase(
        image=_joined(signals, geometry.box(), task, dtype),
        acquired=tuple(n in signals for n in task.modalities),
        label=None,
        label_native=None,
        label_box=None,
        geometry=geometry,
        digests=reader.digests,
    )
    if label is not None:
        scan = reader.read(label, "label")
        own = geometry_of(scan, None, where)
        check_same_grid(geometry, own, reference, scan.name, where)
        _add_label(case, *classes_of(scan, own, table, where))
    return case


def _joined(
    signals: Mapping[str, Signal], box: Box, task: Task, dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """z-scores of all modalities on the union of their boxes."""
    image = np.zeros((task.num_modalities, *box.shape), dtype=dtype)
    for index, name in enumerate(task.modalities):
        if name in signals:
            inner = signals[name].box.relative_to(box)
            signals[name].write_zscores(image[(index, *inner.slices)])
    return image


def _add_label(case: CanonicalCase, tight: Box, classes: npt.NDArray[np.uint8]) -> None:
    geometry, box = case.geometry, case.geometry.box()
    inside = box.contains(tight) or classes.size == 0
    if inside and not geometry.resampled:
        case.label = np.zeros(box.shape, dtype=np.uint8)
        case.label[tight.relative_to(box).slices] = classes
        return
    full = np.zeros(geometry.canonical_shape, dtype=np.uint8)
    full[tight.slices] = classes
    on_grid = geometry.to_grid(full, order=0) if geometry.resampled else full
    case.label = np.ascontiguousarray(on_grid[box.slices])
    case.label_native, case.label_box = np.ascontiguousarray(classes), tight
