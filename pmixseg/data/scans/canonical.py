"""Bring the scans of a case into the form of a network's input, for ``prepare`` and ``segment``.

RAS orientation, optional resampling, z-score of each modality inside its own non-zero voxels,
background exactly 0, crop to the brain. What becomes of one modality depends on no other, so that
testing a combination equals segmenting that combination's files alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pmixseg.data.formats.nifti import ScanReader, Source
from pmixseg.data.scans.boxes import Box
from pmixseg.data.scans.geometry import BOX_MULTIPLE, Geometry, Spacing
from pmixseg.data.scans.volumes import (
    Coding,
    LabelMap,
    Place,
    Signal,
    label_map,
    place_of,
    same_grid,
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

STORE_DTYPE: Final = "float16"
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
        label_beyond: labelled voxels of the grid that lie outside the box of the scans.
        synthetic: a file says that it is of a phantom.
        predicted: a file says that it is a result of this package.
        extent: sides of the box of all non-zero voxels in mm.
        geometry: the grids, and the way back.
        digests: modality or ``label`` -> SHA-256 of its file's bytes.
        ignored: number in the label file -> voxels of it that became background.
        oriented: whether any of the scans says how it lies; otherwise the case was taken as LAS.
        doubts: phrases of :func:`~pmixseg.data.scans.brains.not_a_brain` on single scans.
        statistics: modality -> mean and deviation of its non-zero voxels, which lead from z-scores
            back to intensities.
    """

    image: npt.NDArray[Any]
    acquired: tuple[bool, ...]
    label: npt.NDArray[np.uint8] | None
    label_native: npt.NDArray[np.uint8] | None
    label_box: Box | None
    geometry: Geometry
    digests: Mapping[str, str]
    ignored: Mapping[int, int] = field(default_factory=dict)
    oriented: bool = True
    doubts: tuple[str, ...] = ()
    statistics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    label_beyond: int = 0
    extent: tuple[float, ...] = ()
    synthetic: bool = False
    predicted: bool = False


def canonicalise(
    images: Mapping[str, Source],
    label: Source | None,
    task: Task,
    coding: Coding | Mapping[str, int] | None = None,
    spacing: Spacing | None = None,
    *,
    dtype: npt.DTypeLike = STORE_DTYPE,
    where: str = "case",
) -> CanonicalCase:
    """Bring one case into the form that stores hold and networks read.

    Args:
        images: modality name -> file, (4-D file, channel) or nibabel image; any subset of the
            task's modalities, at least one.
        label: the label map, or ``None``.
        task: modalities and labels.
        coding: what the label file's numbers mean, or label name -> number (``None``: class
            index).
        spacing: voxel size in mm to resample to, per canonical axis; linear for images, nearest
            for labels. ``None`` keeps the source's.
        dtype: ``float16`` or ``float32``.
        where: how messages name the case.

    Raises:
        InputError: a damaged file, files that do not lie on one grid, voxels of a size that no scan
            has, a volume without signal or with NaN, a label value outside the coding, or too
            little memory for the case.
    """
    unknown = sorted(set(images) - set(task.modalities))
    if unknown or not images:
        raise InputError(
            f"{where}: {unknown or 'no image'} given, but task '{task.name}' has the modalities "
            f"{list(task.modalities)}; give at least one of these."
        )
    numbers = coding if isinstance(coding, Coding) else Coding.of(task, coding)
    try:
        files = CaseFiles(task, ScanReader(where), lambda: numbers, spacing)
        for name in task.modalities:
            if name in images:
                files.add(name, images[name])
        if label is not None:
            files.add("label", label)
        return files.together(dtype)
    except MemoryError as error:
        raise InputError(
            f"{where}: there is not enough memory for it; use fewer workers, or a larger spacing."
        ) from error


@dataclass
class CaseFiles:
    """The files of a case, read one after the other; the place of the first is that of all.

    Args:
        task: modalities and labels.
        reader: which reads them.
        coding: gives what the label file's numbers mean.
        spacing: voxel size in mm to resample to.
        noted: context in which a file is compared with the first; it may let a fault pass.
    """

    task: Task
    reader: ScanReader
    coding: Callable[[], Coding]
    spacing: Spacing | None = None
    noted: Callable[[], AbstractContextManager[None]] = nullcontext
    reference: Place | None = field(default=None, init=False)
    signals: dict[str, Signal] = field(default_factory=dict, init=False)
    labels: LabelMap | None = field(default=None, init=False)
    oriented: bool = field(default=False, init=False)

    def add(self, role: str, source: Source) -> None:
        """Read the scan of a modality, or the ``label``."""
        where, is_label = self.reader.where, role == "label"
        scan = self.reader.read(source, role)
        place = place_of(scan, None if is_label else self.spacing, where)
        geometry, self.reference = place.geometry, self.reference or place
        with self.noted():
            geometry = same_grid(self.reference, place, where)
        if is_label:
            self.labels = label_map(scan, geometry, self.coding(), where)
        else:
            self.oriented |= scan.oriented
            self.signals[role] = signal_of(scan, geometry, where, role)

    def together(self, dtype: npt.DTypeLike = STORE_DTYPE) -> CanonicalCase:
        """Put what was read on one box; there is at least one scan."""
        assert self.reference is not None
        case = join(self.signals, self.reference.geometry, self.task, dtype)
        case.digests, case.oriented = self.reader.digests, self.oriented
        case.synthetic, case.predicted = self.reader.synthetic, self.reader.predicted
        if self.labels is not None:
            case.ignored = self.labels.ignored
            if not self.labels.partly:  # to train on, or be scored by, half a label is wrong
                _add_label(case, self.labels)
        return case


def join(
    signals: Mapping[str, Signal], geometry: Geometry, task: Task, dtype: npt.DTypeLike
) -> CanonicalCase:
    """Put the modalities of a case on the union of their boxes.

    ``signals`` are the non-zero parts by modality, all on the grid of ``geometry``; the case has no
    label yet.
    """
    tight = functools.reduce(Box.union, (s.box for s in signals.values()))
    boxes = {n: s.box.grow(BOX_MULTIPLE, geometry.grid_shape) for n, s in signals.items()}
    geometry = replace(geometry, boxes=boxes)
    box = geometry.box()
    image = np.zeros((task.num_modalities, *box.shape), dtype=dtype)
    for name, signal in signals.items():
        inner = signal.box.relative_to(box)
        signal.write_zscores(image[(task.modalities.index(name), *inner.slices)])
    return CanonicalCase(
        image=image,
        acquired=tuple(n in signals for n in task.modalities),
        label=None,
        label_native=None,
        label_box=None,
        geometry=geometry,
        digests={},
        doubts=tuple(s.doubt for s in signals.values() if s.doubt),
        statistics={name: (s.mean, s.deviation) for name, s in signals.items()},
        extent=tuple(n * z for n, z in zip(tight.shape, geometry.grid_spacing, strict=True)),
    )


def _add_label(case: CanonicalCase, seen: LabelMap) -> None:
    """Put a label map on the grid of a case, which is changed in place."""
    geometry, box = case.geometry, case.geometry.box()
    inside = box.contains(seen.box) or seen.classes.size == 0
    if inside and not geometry.resampled:
        case.label = np.zeros(box.shape, dtype=np.uint8)
        case.label[seen.box.relative_to(box).slices] = seen.classes
        return
    full = np.zeros(geometry.canonical_shape, dtype=np.uint8)
    full[seen.box.slices] = seen.classes
    on_grid = geometry.to_grid(full, order=0) if geometry.resampled else full
    case.label = np.ascontiguousarray(on_grid[box.slices])
    case.label_beyond = int(np.count_nonzero(on_grid)) - int(np.count_nonzero(case.label))
    case.label_native, case.label_box = np.ascontiguousarray(seen.classes), seen.box
