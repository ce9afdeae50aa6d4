"""Prepare one case of a cohort into a store, or say why it is left out."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pmixseg.data.cohorts.cases import Case, check_name
from pmixseg.data.formats.nifti import ScanReader
from pmixseg.data.scans.canonical import CanonicalCase, canonicalise
from pmixseg.data.scans.normalisation import computed_dtype, normalised
from pmixseg.data.scans.plausibility import Verdict, judge
from pmixseg.data.store.stored import is_whole, origin_of, read_meta, write_case, write_origin
from pmixseg.errors import InputError, count_of
from pmixseg.task import Task


@dataclass(frozen=True)
class StoreSettings:
    """What all cases of a store are prepared with.

    Args:
        cases: the store's folder of cases.
        task: modalities in channel order, labels in class order.
        parameters: what every case depends on besides its sources; primitives.
        force: keep cases that the judge finds implausible.
        odd: cases without an orientation among others that have theirs.
    """

    cases: Path
    task: Task
    parameters: Mapping[str, Any]
    force: bool = False
    odd: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Outcome:
    """A case that is in the store.

    Args:
        state: whether it was written now, or was up to date.
        notes: sentences about it.
        ignored: number in the label file that became background -> voxels of it.
        labelled: its label is in the store.
    """

    state: Literal["prepared", "kept"]
    notes: tuple[str, ...] = ()
    ignored: dict[int, int] = field(default_factory=dict)
    labelled: bool = True


def prepare_case(settings: StoreSettings, case: Case) -> Outcome | InputError:
    """Bring one case up to date; a bad one is an outcome, a bad disk is an exception.

    A case that was kept by force stays, as long as its files are the same.
    """
    own = settings.cases / case.case_id
    where = f"case '{case.case_id}'"
    try:
        if case.problem is not None:
            raise InputError(case.problem)
        check_name(case.case_id)
        meta = _asked(settings, case)
        current = _current(own, case, meta, where)
        if current is not None:
            return current
        ready = _canonical(settings, case, where)
        verdict = judge(ready, settings.task, odd_one_out=case.case_id in settings.odd)
        if verdict.findings and not settings.force:
            raise InputError(verdict.refusal(where))
        notes = [*_replaced(own, case, where), *verdict.notes(where)]
    except InputError as error:
        # A copy of what the sources were before they broke must not stay in use.
        shutil.rmtree(own, ignore_errors=True)
        return error
    ready = normalised(ready, settings.parameters["normalisation"], settings.parameters["dtype"])
    made = {
        "findings": list(verdict.findings),
        "oriented": verdict.oriented,
        "synthetic": ready.synthetic,
        "remarks": list(verdict.remarks),
        "ignored_voxels": {str(number): n for number, n in ready.ignored.items()},
        "sources": _sources(case, ready.digests),
    }
    try:
        write_case(own, ready, {**meta, **made}, _origin(case))
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ):
            raise
        return InputError(f"{where}: its name cannot name a folder ({error.strerror}); rename it.")
    return _outcome("prepared", case, notes, dict(ready.ignored))


def _replaced(own: Path, case: Case, where: str) -> list[str]:
    """Say that another case of that name leaves the store: two cohorts may number theirs alike."""
    before = origin_of(own)
    files = {str(path.absolute()) for path in case.files}
    if before is None or before in files or not Path(before).exists():
        return []
    return [
        f"{where}: it replaces the case of that name that was prepared from {Path(before).parent}, "
        "where it still is; prepare cohorts that share names into stores of their own."
    ]


def _outcome(
    state: Literal["prepared", "kept"], case: Case, notes: list[str], ignored: dict[int, int]
) -> Outcome:
    """Say what became of a case, and whether its label could be used."""
    voxels = sum(ignored.get(number, 0) for number in case.unannotated)
    if voxels:
        notes.append(
            f"case '{case.case_id}': nobody annotated {count_of(voxels, 'voxel')} of its label map "
            "(label 'ignore'), so it is kept without a label"
        )
    return Outcome(state, tuple(notes), ignored, case.label is not None and not voxels)


def _asked(settings: StoreSettings, case: Case) -> dict[str, Any]:
    """Return the settings that an up-to-date stored copy was made with."""
    return {
        "case_id": case.case_id,
        "patient": case.patient or case.case_id,
        "grade": case.grade,
        "layout": case.layout,
        "modalities": list(settings.task.modalities),
        "codes": dict(case.codes),
        "ignored": list(case.ignored),
        "doubtful": list(case.doubtful),
        "witness": case.witness,
        "also": {str(number): label for number, label in case.also.items()},
        "odd_one_out": case.case_id in settings.odd,
        "parameters": dict(settings.parameters),
        # Only where there are some: stores that know no such key stay up to date.
        **({"unannotated": list(case.unannotated)} if case.unannotated else {}),
    }


def _current(own: Path, case: Case, meta: Mapping[str, Any], where: str) -> Outcome | None:
    """Return the stored copy, if it is whole and made of the same files in the same way."""
    stored = read_meta(own)
    if stored is None or any(stored.get(k) != v for k, v in meta.items()):
        return None
    reader = ScanReader(where)
    roles = {**case.images, **({"label": case.label} if case.label else {})}
    digests = {role: reader.digest(source) for role, source in roles.items()}
    if stored["sources"] != _sources(case, digests) or not is_whole(own, stored):
        return None
    if origin_of(own) != _origin(case):  # the cohort was moved
        write_origin(own, _origin(case))
    remarks = tuple(stored.get("remarks", ()))  # stores of before have none
    verdict = Verdict(tuple(stored["findings"]), stored["oriented"], remarks)
    ignored = {int(number): n for number, n in stored["ignored_voxels"].items()}
    return _outcome("kept", case, verdict.notes(where), ignored)


def _canonical(settings: StoreSettings, case: Case, where: str) -> CanonicalCase:
    spacing = settings.parameters["spacing"]
    return canonicalise(
        case.images,
        case.label,
        settings.task,
        case.coding(settings.task),
        None if spacing is None else tuple(spacing),
        dtype=computed_dtype(settings.parameters["normalisation"], settings.parameters["dtype"]),
        where=where,
    )


def _origin(case: Case) -> str:
    """Say where one of the case's scans lies, to tell later whether it is still there."""
    return str(case.files[0].absolute())


def _sources(case: Case, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    sources: dict[str, dict[str, Any]] = {}
    for role, source in {**case.images, "label": case.label}.items():
        if source is not None:
            path, channel = source if isinstance(source, tuple) else (source, None)
            sources[role] = {"file": path.name, "channel": channel, "sha256": digests[role]}
    return sources
