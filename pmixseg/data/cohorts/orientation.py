"""Cases that lost their orientation, in a cohort whose other cases have theirs."""

from __future__ import annotations

from collections.abc import Iterable

from pmixseg.data.cohorts.cases import Case
from pmixseg.data.scans.nifti import ScanReader


def odd_ones_out(cases: Iterable[Case]) -> frozenset[str]:
    """Find cases none of whose scans says how it lies, where other cases of the cohort do.

    Some converters set ``qform_code`` and ``sform_code`` to 0. A reader then guesses, and beside
    cases that need no guess such a case may be mirrored or turned. Headers alone are read.

    Args:
        cases: the cohort.

    Returns:
        Names of these cases; empty where all cases say it, or none does.
    """
    oriented = {case.case_id: _is_oriented(case) for case in cases if case.problem is None}
    silent = frozenset(name for name, known in oriented.items() if known is False)
    return silent if True in oriented.values() else frozenset()


def _is_oriented(case: Case) -> bool | None:
    """``None`` where no header can be read; who reads the voxels says so."""
    reader = ScanReader(f"case '{case.case_id}'")
    known = [frame.oriented for s in case.images.values() if (frame := reader.frame(s))]
    return any(known) if known else None
