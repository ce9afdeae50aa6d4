"""Segment raw scans of one patient: preprocess, segment in atlas space, bring back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pmixseg.argument_checks import check_fields, checked
from pmixseg.data.formats.colours import write_tables
from pmixseg.data.formats.nifti import ScanReader
from pmixseg.data.formats.outputs import volume_names, write_labels
from pmixseg.errors import InputError, stops_all
from pmixseg.evaluation.prediction.scans import Progress, SegmentSettings
from pmixseg.inference.outputs import CaseResult, Outputs
from pmixseg.inference.segment import common_name
from pmixseg.modules import SegmentationModule
from pmixseg.preprocess import preprocess_scans
from pmixseg.preprocess.itk import sitk

ATLAS_FOLDER = "atlas"
"""Folder, beside the result, of everything in atlas space."""


@dataclass(frozen=True)
class RawSettings:
    """How raw scans are preprocessed.

    Args:
        brain: ``atlas``, a mask file on the grid of the centre scan, or a program by name.
        atlas: a template of one's own, without skull.
        centre: modality that the others are registered to; default T1ce, then T1, T2, FLAIR.
        onto: modality whose grid the result has; default the centre.
    """

    brain: str = "atlas"
    atlas: Path | None = None
    centre: str | None = None
    onto: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@checked
def segment_raw(
    module: SegmentationModule,
    images: Mapping[str, Path],
    outputs: Outputs,
    settings: SegmentSettings | None = None,
    raw: RawSettings | None = None,
    *,
    codes: Mapping[str, int] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> CaseResult:
    """Segment scans as they come from the scanner: with skull, each on a grid of its own.

    Beside ``<name>_seg.nii.gz`` on the grid of an original scan, a folder ``atlas`` is written: the
    scans in atlas space, the brain mask, every transform, and the segmentation there.

    Images are any subset of the model's modalities. The name is by default what the files' names
    have in common, the codes are class indices. ``progress`` gets (windows done, windows in all).

    Raises:
        InputError: see :func:`~pmixseg.preprocess.preprocess_scans` and
            :meth:`~pmixseg.SegmentationModule.segment`.
    """
    raw = raw or RawSettings()
    called = name or common_name(images)
    outputs.check(called, list(images.values()), of_cohort=False)
    onto = raw.onto or None
    if onto is not None and onto not in images:
        raise InputError(f"case '{called}': the reference {onto} is not among {sorted(images)}.")
    # To atlas space, and segmented there.
    ready = preprocess_scans(images, called, brain=raw.brain, atlas=raw.atlas, centre=raw.centre)
    files = ready.save(outputs.folder / ATLAS_FOLDER)
    try:
        result = module.segment(files, settings, codes=codes, name=called, progress=progress)
    except InputError as error:
        if stops_all(error) or not ready.notes:
            raise
        raise InputError(" ".join((str(error), "Before that:", *ready.notes))) from error
    home = outputs.folder / ATLAS_FOLDER / called
    there = replace(outputs, folder=home, png=False)
    replaced, files_in_atlas = there.of_others(result), there.write(result, files)
    # Back onto the grid of a scan as it came.
    target = onto or ready.centre
    back = ready.back(result.classes, target)
    classes = sitk.GetArrayFromImage(back).T.astype(np.uint8)
    grid = ScanReader(called).frame(images[target])
    assert grid is not None  # it was read above
    affine = grid.affine.tolist()
    path = outputs.folder / volume_names(called, outputs.plain, outputs.compress)["seg"]
    written = {
        "seg": write_labels(path, classes, affine, result.codes, module.task, grid.unit),
        **write_tables(outputs.folder / f"{called}_seg", result.codes, module.task),
        "json": files_in_atlas["json"],
    }
    if outputs.png:
        facts = (called, module.task, result.volumes)
        written["png"] = outputs.draw(images, classes, grid.affine, *facts)
    notes = (
        f"case '{called}': the scans were registered to {ready.centre} and to atlas space; the "
        f"segmentation lies on the grid of {target}, volumes are those in atlas space.",
        *(f"case '{called}': {note}" for note in ready.notes),
        *replaced,
        *result.warnings,
    )
    return CaseResult(
        called, result.combination, result.volumes, written, notes, codes=result.codes
    )
