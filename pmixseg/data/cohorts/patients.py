"""Read the patient from a case name, so that visits of one patient stay in one part of a split."""

from __future__ import annotations

import re

from pmixseg.errors import InputError, explained

_VISIT = (
    r"(?:(?:ses|session|run|visit|time|timepoint|tp|scan|fu|followup|week|month|day|year|[vt])"
    r"[-_]?\d+(?:[-_.]\d\d?|d)?"  # LUMIERE's week-000-1, and UCSF-PDGM's FU003d
    r"|\d+[-_]?(?:mo?|months?|wks?|weeks?|days?|yrs?|years?)|baseline|followup|nadir|recurrence"
    r"|progression|(?:pre|post)[-_]?(?:op|rt|surgery|chemo)"
    r"|(?:19|20)\d\d-?(?:0\d|1[0-2])-?[0-3]\d)"
)
_KNOWN = (
    re.compile(r"(BraTS-[A-Za-z]+-\d+)-\d{3}"),
    re.compile(r"((?:Brats1[78]|BraTS19)_.+)_\d+"),
    re.compile(r"(UPENN-GBM-\d+)_\d{2}"),
    re.compile(r"(sub-[^_]+)_ses-[^_]+(?:_.*)?"),
    # With a number of the patient's own, or else "my_scan_1" and "my_scan_2" would be of one.
    re.compile(rf"(sub-[^_]+?|.*?\d.*?)[-_.]+{_VISIT}(?:[-_.]{_VISIT})*", re.IGNORECASE),
)
"""Names of public cohorts, and of visits as people write them; the group is the patient."""


def patient_of(case_id: str, pattern: str = "") -> str:
    """Return whose scan a case is.

    The first group of ``pattern``, which the whole name must match, is the patient; by default
    names of public cohorts and of visits are known. A case that no pattern fits is a patient of its
    own.

    Example:
        >>> patient_of("BraTS-GLI-00005-101"), patient_of("p7_ses-02"), patient_of("BRATS_001")
        ('BraTS-GLI-00005', 'p7', 'BRATS_001')
    """
    for expression in [re.compile(pattern)] if pattern else _KNOWN:
        if hit := expression.fullmatch(case_id):
            return str(hit.group(1) if expression.groups else hit.group())
    return case_id


def check_pattern(pattern: str, where: str) -> None:
    """Refuse a pattern that names no patient: no regular expression, or one without a group."""
    with explained(f"{where}: patient '{pattern}' is no regular expression", "correct it"):
        groups = re.compile(pattern).groups
    if groups == 0:
        raise InputError(
            f"{where}: patient '{pattern}' needs a group in brackets around what names the "
            r"patient, such as (.+)-\d+."
        )
