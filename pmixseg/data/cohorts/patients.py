"""Whose scan a case is, from its name; visits of one patient must not be told apart by a split."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pmixseg.data.cohorts.problems import listed
from pmixseg.errors import InputError

if TYPE_CHECKING:
    from pmixseg.data.cohorts.cases import Case

_VISIT = (
    r"(?:(?:ses|session|visit|time|timepoint|tp|scan|fu|followup|week|month|day|year|v|t)[-_]?\d+"
    r"|baseline|followup|pre-?op|post-?op|(?:19|20)\d\d-?(?:0\d|1[0-2])-?[0-3]\d)"
)
_KNOWN = (
    re.compile(r"(BraTS-[A-Za-z]+-\d+)-\d{3}"),
    re.compile(r"((?:Brats1[78]|BraTS19)_.+)_\d+"),
    re.compile(r"(UPENN-GBM-\d+)_\d{2}"),
    # With a number of the patient's own, or else "my_scan_1" and "my_scan_2" would be of one.
    re.compile(rf"(sub-[^_]+?|.*?\d.*?)[-_.]+{_VISIT}(?:[-_.]{_VISIT})*", re.IGNORECASE),
)
"""Names of public cohorts, and of visits as people write them; the group is the patient."""

_NUMBERED = re.compile(r"(.*\d.*?)[-_.](?:[A-Za-z]?\d{1,3})")
"""A name with a number of its own before its last number, which may be that of a visit."""

ONE_SCAN_EACH = frozenset({"brats2020", "brats2021", "brats-goat"})
"""Layouts of cohorts that have one scan of a patient, or do not tell."""

_NAMED_FREELY = "brats"
"""The layout of names of one's own; a remark is made only if they look like visits."""


def patient_of(case_id: str, pattern: str = "") -> str:
    """Whose scan a case is.

    Args:
        case_id: name of the case.
        pattern: regular expression that the whole name must match; its first group is the patient.
            By default, the names of public cohorts and of visits.

    Returns:
        The name of the case where no pattern fits: a patient of its own.

    Example:
        >>> patient_of("BraTS-GLI-00005-101"), patient_of("p7_ses-02"), patient_of("BRATS_001")
        ('BraTS-GLI-00005', 'p7', 'BRATS_001')
    """
    for expression in [re.compile(pattern)] if pattern else _KNOWN:
        if hit := expression.fullmatch(case_id):
            return str(hit.group(1) if expression.groups else hit.group())
    return case_id


def check_pattern(pattern: str, where: str) -> None:
    """Refuse a pattern that names no patient.

    Raises:
        InputError: no regular expression, or one without a group.
    """
    try:
        groups = re.compile(pattern).groups
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(
            f"{where}: patient '{pattern}' is no regular expression ({error}); correct it."
        ) from error
    if groups == 0:
        raise InputError(
            f"{where}: patient '{pattern}' needs a group in brackets around what names the "
            r"patient, such as (.+)-\d+."
        )


def remark_on_patients(cases: Sequence[Case], told: bool) -> tuple[str, ...]:
    """Say where visits of one patient may be taken for patients of their own.

    Args:
        cases: the cohort.
        told: its layout says itself who the patient is.
    """
    own = [c for c in cases if c.patient in ("", c.case_id) and c.layout not in ONE_SCAN_EACH]
    if told or not own:
        return ()
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for case in own:
        if hit := _NUMBERED.fullmatch(case.case_id):
            alike[hit.group(1)].append(case.case_id)
    visits = [names for names in alike.values() if len(names) > 1]
    suspect = visits[0] if visits and len(alike) > 1 else []
    if not suspect and all(c.layout == _NAMED_FREELY for c in own):
        return ()
    such = f" {listed(suspect)} may be visits of one." if suspect else ""
    return (
        f"patients are not recognised by the names of {len(own)} cases: each counts as a patient "
        f"of its own, and visits of one patient may come into training and test.{such} If there "
        r"are any, name the patient in a layout file (patient: '(.+)_\d+').",
    )
