"""Preparing a cohort: every case through the canonicalisation once, into a store."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pmixseg.data.cohorts.layouts import Case
from pmixseg.data.scans.canonical import BOX_MULTIPLE, NORMALISATION, STORE_DTYPE, canonicalise
from pmixseg.data.scans.geometry import Spacing
from pmixseg.data.scans.nifti import ScanReader
from pmixseg.data.store.stored import (
    CASES,
    FORMAT,
    STORE_JSON,
    origin_of,
    read_meta,
    remove_case,
    write_case,
    write_origin,
)
from pmixseg.errors import InputError
from pmixseg.files import inside, whole
from pmixseg.task import Task

_STALE_SECONDS = 3600
"""A temporary folder untouched for this long belongs to a process that was killed."""

_Outcome = Literal["prepared", "kept"] | InputError


@dataclass
class PrepareReport:
    """What became of every case.

    Args:
        store: the store's folder.
        prepared: cases written by this call.
        kept: cases whose stored copy was up to date.
        failed: case -> the sentence that says why; a failed case is not in the store.
        unlabelled: cases in the store without a label.
        gone: cases that were prepared into the store before, are not among these, and whose
            source is where it was no longer; they are still split and trained on.
        elsewhere: the same, but their source is still there: another cohort's, as a rule.
        pruned: cases that were gone and have been removed from the store.
        seconds: wall time.
    """

    store: Path
    prepared: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unlabelled: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    pruned: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> str:
        """One line per fact, the failures last."""
        lines = [
            f"{self.store}: {len(self.prepared)} cases prepared, {len(self.kept)} up to date, "
            f"{len(self.failed)} failed, in {self.seconds:.1f} s"
        ]
        if self.unlabelled:
            lines.append(f"without a label: {', '.join(self.unlabelled)}")
        if self.pruned:
            lines.append(f"removed, for their sources are gone: {', '.join(self.pruned)}")
        if self.gone:
            lines.append(
                f"still in the store and used, though their sources are gone: "
                f"{', '.join(self.gone)}; remove them with --prune (prepare(..., prune=True))"
            )
        if self.elsewhere:
            lines.append(
                f"also in the store, from other folders or under another layout: "
                f"{', '.join(self.elsewhere)}"
            )
        return "\n".join([*lines, *(f"failed: {sentence}" for sentence in self.failed.values())])


def prepare(
    cases: Sequence[Case],
    out: Path | str,
    task: Task,
    *,
    spacing: Spacing | None = None,
    dtype: str = STORE_DTYPE,
    workers: int = 0,
    prune: bool = False,
    progress: bool = True,
) -> PrepareReport:
    """Prepare cases into a store; what is there and up to date is kept.

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
        prune: remove cases from the store that this call was not given and whose sources are gone;
            a cohort on a disk that is not mounted is gone, too.
        progress: show a progress bar with the time left.

    Raises:
        InputError: the folder cannot be written or is not a store, the disk is full, a parameter
            is out of range, or two cases share a name.
    """
    start = time.monotonic()
    out = Path(out)
    parameters = _parameters(task, spacing, dtype)
    _check_names(cases)
    report = PrepareReport(out)
    try:
        _open_store(out, task, parameters)
        work = partial(_prepare_case, out / CASES, task, parameters)
        for case, outcome in _watched(_outcomes(cases, work, workers), len(cases), progress):
            if isinstance(outcome, InputError):
                report.failed[case.case_id] = str(outcome)
                continue
            (report.prepared if outcome == "prepared" else report.kept).append(case.case_id)
            if case.label is None:
                report.unlabelled.append(case.case_id)
        _reconcile(report, {c.case_id for c in cases}, parameters, prune)
    except OSError as error:
        raise _cannot_write(out, error) from error
    except BrokenProcessPool as error:
        raise InputError(
            f"{out}: a worker process was killed, most likely for lack of memory; prepare again "
            "with fewer workers, what is done is kept."
        ) from error
    for names in (report.prepared, report.kept, report.unlabelled):
        names.sort()
    report.failed = dict(sorted(report.failed.items()))
    report.seconds = time.monotonic() - start
    return report


def _parameters(task: Task, spacing: Spacing | None, dtype: str) -> dict[str, Any]:
    """What every case of the store depends on beside its sources."""
    if dtype not in ("float16", "float32"):
        raise InputError(f"dtype '{dtype}' is not stored; use float16 or float32.")
    if spacing is not None and (
        len(spacing) != 3 or not all(0 < s < float("inf") for s in spacing)
    ):
        raise InputError(f"spacing {spacing} must be three positive numbers of mm; correct it.")
    return {
        "modalities": list(task.modalities),
        "labels": list(task.labels),
        "spacing": [float(s) for s in spacing] if spacing is not None else None,
        "dtype": dtype,
        "normalisation": NORMALISATION,
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
    for name in names:
        inside(Path(), name, "case")
        if name.startswith("."):
            raise InputError(
                f"case '{name}' cannot name a folder of a store; use a layout whose case names do "
                "not begin with '.'."
            )


def _open_store(out: Path, task: Task, parameters: dict[str, Any]) -> None:
    """Make the folder and its description, and clear what killed processes left behind."""
    foreign = out.is_dir() and not (out / STORE_JSON).exists()
    if foreign and any(not f.name.startswith(".") for f in out.iterdir()):
        raise InputError(f"{out} holds files and is no store; name a new folder for the store.")
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {"format": FORMAT, "task": task.to_dict(), "parameters": parameters}, indent=1
    )
    with whole(out / STORE_JSON) as part:
        part.write_text(text, encoding="utf-8")
    (out / CASES).mkdir(exist_ok=True)
    for left in (out / CASES).glob(".*"):
        try:
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        except FileNotFoundError:
            continue  # another process is writing this one


def _prepare_case(folder: Path, task: Task, parameters: dict[str, Any], case: Case) -> _Outcome:
    """Bring one case up to date; a bad one is an outcome, a bad disk is an exception."""
    own = folder / case.case_id
    where = f"case '{case.case_id}'"
    try:
        if case.problem is not None:
            raise InputError(case.problem)
        meta = {
            "case_id": case.case_id,
            "patient": case.patient or case.case_id,
            "grade": case.grade,
            "layout": case.layout,
            "modalities": list(task.modalities),
            "codes": dict(case.codes),
            "ignored": list(case.ignored),
            "parameters": parameters,
        }
        stored = read_meta(own)
        if stored is not None and all(stored.get(k) == v for k, v in meta.items()):
            reader = ScanReader(where)
            roles = {**case.images, **({"label": case.label} if case.label else {})}
            digests = {role: reader.digest(source) for role, source in roles.items()}
            if stored["sources"] == _sources(case, digests):
                if origin_of(own) != _origin(case):  # the cohort was moved
                    write_origin(own, _origin(case))
                return "kept"
        ready = canonicalise(
            case.images,
            case.label,
            task,
            case.codes,
            None if parameters["spacing"] is None else tuple(parameters["spacing"]),
            ignored=case.ignored,
            dtype=parameters["dtype"],
            where=where,
        )
    except InputError as error:
        # A copy of what the sources were before they broke must not stay in use.
        shutil.rmtree(own, ignore_errors=True)
        return error
    write_case(own, ready, {**meta, "sources": _sources(case, ready.digests)}, _origin(case))
    return "prepared"


def _origin(case: Case) -> str:
    """Where one of the case's scans lies, to tell later whether it is still there."""
    source = next(iter(case.images.values()))
    return str((source[0] if isinstance(source, tuple) else source).absolute())


def _reconcile(
    report: PrepareReport, given: set[str], parameters: dict[str, Any], prune: bool
) -> None:
    """Find cases of the store that were not given, and remove those whose sources are gone."""
    for folder in sorted((report.store / CASES).iterdir()):
        meta = None if folder.name in given else read_meta(folder)
        if meta is None or meta["parameters"] != parameters:
            continue  # not listed by Store.open, so nobody trains on it
        origin = origin_of(folder)
        if origin is not None and Path(origin).exists():
            report.elsewhere.append(folder.name)
        elif prune:
            remove_case(folder)
            report.pruned.append(folder.name)
        else:
            report.gone.append(folder.name)


def _sources(case: Case, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for role, source in {**case.images, "label": case.label}.items():
        if source is not None:
            path, channel = source if isinstance(source, tuple) else (source, None)
            found[role] = {"file": path.name, "channel": channel, "sha256": digests[role]}
    return found


def _outcomes(
    cases: Sequence[Case], work: Callable[[Case], _Outcome], workers: int
) -> Iterator[tuple[Case, _Outcome]]:
    if workers <= 0:
        for case in cases:
            yield case, work(case)
        return
    pool = ProcessPoolExecutor(workers, _context(), initializer=_start_worker)
    try:
        futures: dict[Future[_Outcome], Case] = {pool.submit(work, case): case for case in cases}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        # After an interrupt the cases in hand are finished, a second or so each, and no more begun.
        pool.shutdown(wait=True, cancel_futures=True)


def _context() -> BaseContext:
    """Not a plain fork: this process may hold threads (torch, the progress bar) that it breaks."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not once a worker
    return context


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and one core to each worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _watched(
    outcomes: Iterator[tuple[Case, _Outcome]], total: int, show: bool
) -> Iterator[tuple[Case, _Outcome]]:
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
