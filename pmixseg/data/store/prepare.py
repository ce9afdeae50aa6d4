"""Prepare a cohort into a store: read, check and normalise every case once."""

from __future__ import annotations

import errno
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pmixseg.argument_checks import checked
from pmixseg.data.cohorts.inspection import odd_ones_out
from pmixseg.data.cohorts.layouts import Case
from pmixseg.data.cohorts.problems import doubled_line
from pmixseg.data.cohorts.shares import Share
from pmixseg.data.scans.canonical import BOX_MULTIPLE, NORMALISATION, STORE_DTYPE
from pmixseg.data.scans.geometry import Spacing, check_spacing
from pmixseg.data.scans.normalisation import check_normalisation
from pmixseg.data.store.one_case import Outcome, StoreSettings, prepare_case
from pmixseg.data.store.report import PrepareReport
from pmixseg.data.store.stored import (
    CASES,
    FORMAT,
    STORE_JSON,
    origin_of,
    read_meta,
    remove_case,
    scan_hashes,
    seal,
)
from pmixseg.errors import InputError
from pmixseg.files import write_text
from pmixseg.task import Task
from pmixseg.workers import results

_STALE_SECONDS = 3600
"""A temporary folder untouched for this long belongs to a process that was killed."""


@checked
def prepare(
    cases: Sequence[Case],
    out: Path | str,
    task: Task,
    *,
    spacing: Spacing | None = None,
    dtype: Literal["float16", "float32"] = STORE_DTYPE,
    workers: int = 0,
    prune: bool = False,
    force: bool = False,
    progress: bool = True,
    share: Share | None = None,
    normalisation: str = NORMALISATION,
) -> PrepareReport:
    """Prepare cases into a store; keep what is there and up to date.

    A case is done again when a source file, its layout or a parameter has changed. Any number of
    processes may prepare the same store at once. One bad case stops no other; an interrupt leaves
    complete cases only, and the next call goes on from there. A store may be filled by several
    calls, from several cohorts: cases of it that this call was not given are named in the report.

    Args:
        cases: from :func:`~pmixseg.data.cohorts.layouts.find_cases`.
        out: the store's folder, made if need be.
        task: modalities in channel order, labels in class order.
        spacing: voxel size in mm to resample to, per canonical axis; ``None`` keeps each case's.
        dtype: ``float16`` or ``float32``, the number type of the stored images.
        workers: processes beside this one; 0 does the work here.
        force: keep cases that look implausible (see
            :func:`~pmixseg.data.scans.plausibility.judge`) instead of leaving them out; they stay
            in the store, as long as their files are the same.
        prune: remove cases from the store that this call was not given and whose sources are gone;
            a cohort on a disk that is not mounted is gone, too.
        progress: show a progress bar with the time left.
        share: prepare only these cases; give the whole cohort all the same, for a case is judged
            beside the others. A store that all shares were prepared into is the same as one made
            at once.
        normalisation: of intensities; see :mod:`pmixseg.data.scans.normalisation`.

    Raises:
        InputError: the folder cannot be written or is not a store, the disk is full, a parameter
            is out of range, two cases share a name, or a worker was killed.
    """
    start = time.monotonic()
    out = Path(out)
    parameters = _parameters(task, spacing, dtype, normalisation)
    _check_names(cases)
    report = PrepareReport(out)
    try:
        _open_store(out, task, parameters)
        settings = StoreSettings(out / CASES, task, parameters, force, odd_ones_out(cases))
        work = partial(prepare_case, settings)
        mine = cases if share is None else share.of(cases, lambda case: case.case_id)
        outcomes = results(work, mine, workers, where=out, preload=[prepare_case.__module__])
        done = _watched(outcomes, len(mine), progress)
        for case, outcome in sorted(done, key=lambda one: one[0].case_id):
            _enter(report, case, outcome)
        _reconcile(report, {c.case_id for c in cases}, parameters, prune)
    except OSError as error:
        raise _cannot_write(out, error) from error
    report.seconds = time.monotonic() - start
    return report


def _parameters(
    task: Task, spacing: Spacing | None, dtype: str, normalisation: str
) -> dict[str, Any]:
    """Return what every case of the store depends on besides its sources."""
    check_normalisation(normalisation)
    try:
        check_spacing(spacing or (), f"voxels of spacing {spacing}")
    except ValueError as error:
        raise InputError(f"{error}; correct the spacing.") from error
    return {
        "modalities": list(task.modalities),
        "labels": list(task.labels),
        "spacing": [float(s) for s in spacing] if spacing is not None else None,
        "dtype": dtype,
        "normalisation": normalisation,
        "box_multiple": BOX_MULTIPLE,
    }


def _check_names(cases: Sequence[Case]) -> None:
    names = Counter(c.case_id for c in cases)
    twice = sorted(n for n, count in names.items() if count > 1)
    if twice or not cases:
        raise InputError(
            f"{'two cases are called ' + repr(twice[0]) if twice else 'there is no case'}; "
            "correct the layout or the folder."
        )


def _enter(report: PrepareReport, case: Case, outcome: Outcome | InputError) -> None:
    name = case.case_id
    if isinstance(outcome, InputError):
        report.failed[name] = str(outcome)
        return
    (report.prepared if outcome.state == "prepared" else report.kept).append(name)
    if outcome.notes:
        report.notes[name] = outcome.notes
    if outcome.ignored:
        report.ignored[name] = outcome.ignored
    if not outcome.labelled:
        report.unlabelled.append(name)


def _open_store(out: Path, task: Task, parameters: dict[str, Any]) -> None:
    """Make the folder and its description, and clear what killed processes left behind."""
    # In this order: another process may be making the store at this moment.
    filled = out.is_dir() and any(not f.name.startswith(".") for f in out.iterdir())
    if filled and not (out / STORE_JSON).exists():
        raise InputError(f"{out} holds files and is no store; name a new folder for the store.")
    out.mkdir(parents=True, exist_ok=True)
    text = seal({"format": FORMAT, "task": task.to_dict(), "parameters": parameters})
    write_text(out / STORE_JSON, text)
    (out / CASES).mkdir(exist_ok=True)
    for left in (out / CASES).glob(".*"):
        try:
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        except FileNotFoundError:
            continue  # another process is writing this one


def _reconcile(
    report: PrepareReport, names: set[str], parameters: dict[str, Any], prune: bool
) -> None:
    """Find cases of the store that were not given, and remove those whose sources are gone.

    Of what stays, cases that share a scan are found.
    """
    scans: dict[str, tuple[str, ...]] = {}
    for folder in sorted((report.store / CASES).iterdir()):
        # Hidden folders are cases that other processes are writing.
        meta = None if folder.name[0] == "." else read_meta(folder)
        if meta is None:
            continue
        if meta["parameters"] != parameters:  # Store.open lists none, and no one trains on it
            if folder.name not in names:  # else another share of the cohort does it again
                report.otherwise.append(folder.name)
            continue
        origin = origin_of(folder)
        gone = folder.name not in names and (origin is None or not Path(origin).exists())
        if gone and prune:
            remove_case(folder)
            report.pruned.append(folder.name)
            continue
        if folder.name not in names:
            (report.gone if gone else report.elsewhere).append(folder.name)
        scans[folder.name] = scan_hashes(meta)
    report.cohort += doubled_line(scans)


def _watched(
    outcomes: Iterator[tuple[Case, Outcome | InputError]], total: int, show: bool
) -> Iterator[tuple[Case, Outcome | InputError]]:
    columns = (
        TextColumn("preparing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        row = bar.add_task("", total=total)
        for case, outcome in outcomes:
            bar.update(row, advance=1, description=case.case_id)
            yield case, outcome


def _cannot_write(out: Path, error: OSError) -> InputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(
            f"{out}: the disk is full; free space or name a store on another disk, then prepare "
            "again: the cases that are done are kept, and no half case was left."
        )
    return InputError(
        f"{out}: the store cannot be written ({error.strerror or error}); check the path and its "
        "permissions."
    )
