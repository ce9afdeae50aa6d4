"""Preprocess a cohort of raw scans into one that ``prepare`` reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pmixseg.data.cohorts.cases import Case, file_of
from pmixseg.data.cohorts.presets import LAYOUTS
from pmixseg.data.cohorts.problems import ignored_lines
from pmixseg.data.formats.nifti import ScanReader
from pmixseg.data.formats.outputs import code_table
from pmixseg.data.scans.volumes import label_map, place_of
from pmixseg.errors import InputError, stops_all
from pmixseg.preprocess.itk import image_of
from pmixseg.preprocess.pipeline import Preprocessed, preprocess_scans
from pmixseg.preprocess.registration import resampled
from pmixseg.task import BRATS, Task
from pmixseg.workers import results


@dataclass(frozen=True)
class Done:
    """What became of one case.

    Args:
        name: of the case.
        notes: sentences about what is doubtful.
        problem: why it was left out; ``None`` where it was written.
    """

    name: str
    notes: tuple[str, ...] = ()
    problem: str | None = None


def preprocess_cohort(
    cases: Sequence[Case],
    out: str | Path,
    *,
    brain: str = "atlas",
    atlas: str | Path | None = None,
    workers: int = 1,
    task: Task = BRATS,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Done]:
    """Preprocess every case; one that fails is reported, and the others go on.

    A folder per case is written to ``out``, in the layout of BraTS 2021 and with its numbers of
    NCR, ED and ET; labels of other names keep their numbers. For brain and atlas see
    :func:`~pmixseg.preprocess.preprocess_scans`. With 0 workers this process does the work;
    ``progress`` gets (cases done, cases in all).

    Raises:
        InputError: the disk is full, or a worker was killed, most likely for lack of memory.
    """
    out, atlas = Path(out), None if atlas is None else Path(atlas)
    one = partial(preprocess_case, out=out, brain=brain, atlas=atlas, task=task)
    outcomes = results(one, cases, workers, where=out, preload=[__name__])
    for count, (_, done) in enumerate(outcomes, 1):
        yield done
        if progress is not None:
            progress(count, len(cases))


def preprocess_case(
    case: Case, out: Path, brain: str, atlas: Path | None, task: Task = BRATS
) -> Done:
    """Preprocess one case and write it, its label map with it."""
    try:
        if case.problem is not None:
            raise InputError(case.problem)
        if shared := [file[0] for file in case.images.values() if isinstance(file, tuple)]:
            raise InputError(
                f"case '{case.case_id}': {shared[0]} holds several sequences on one grid; such "
                "scans are registered already, so prepare them without preprocessing."
            )
        images = {m: file_of(source) for m, source in case.images.items()}
        done = preprocess_scans(images, case.case_id, brain=brain, atlas=atlas)
        label, notes = (None, ()) if case.label is None else _label_in_atlas(case, done, task)
        done.save(out, label)
    except InputError as error:
        if stops_all(error):
            raise
        made = (file.parent for file in out.glob("*/*_preprocess.json"))
        earlier = [home for home in made if home.name == case.case_id]
        stays = "".join(f" What an earlier run made of it stays in {home}." for home in earlier)
        return Done(case.case_id, problem=f"{error}{stays}")
    return Done(case.case_id, (*done.notes, *notes))


def _label_in_atlas(case: Case, done: Preprocessed, task: Task) -> tuple[Any, tuple[str, ...]]:
    """Move the label map as the scan on whose grid it was drawn; return it, and notes on it.

    The numbers of its own layout are not known to who reads the result, so they become those of
    BraTS 2021, which the result's layout has.
    """
    where, coding = f"case '{case.case_id}'", case.coding(task)
    reader = ScanReader(where)
    scan = reader.read(str(case.label), "label")
    geometry = place_of(scan, None, where).geometry
    seen = label_map(scan, geometry, coding, where)
    notes = [f"of {case.label}, {line}" for line in ignored_lines({case.case_id: seen.ignored})]
    if seen.partly or reader.predicted:
        why = "nobody annotated these voxels" if seen.partly else "its label is a result of pmixseg"
        return None, (*notes, f"{why}, so it is left without a label")
    # The numbers of BraTS 2021 where the task has its labels, or else those of the file.
    written = LAYOUTS["brats2021"].codes
    table = code_table(written if set(written) == set(task.labels) else coding.numbers, task, where)
    numbers = np.zeros(geometry.source_shape, np.int16)
    geometry.canonical_view(numbers)[seen.box.slices] = table[seen.classes]
    label = image_of(numbers, scan.affine)
    # Moved as the scan that it was drawn on.
    drawn = [m for m, scan in done.sources.items() if _same_grid(label, scan)]
    if not drawn:
        raise InputError(
            f"{where}: the label map {case.label} lies on the grid of none of its scans; resample "
            "it to the scan that it was drawn on."
        )
    nearest = done.centre if done.centre in drawn else drawn[0]
    return resampled(label, done.mask, done.transforms[nearest], labels=True), tuple(notes)


def _same_grid(a: Any, b: Any) -> bool:
    pairs = ((a.GetOrigin(), b.GetOrigin()), (a.GetSpacing(), b.GetSpacing()))
    near = all(np.allclose(x, y, atol=1e-2) for x, y in pairs)
    turned = np.allclose(a.GetDirection(), b.GetDirection(), atol=1e-3)
    return a.GetSize() == b.GetSize() and near and turned
