"""Assign patients to the parts of a split at random, balanced by grade."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

from pmixseg.data.keys import make_key, number_of


class SplittableCase(Protocol):
    """What a plan may look at; a case of a layout and a stored case both have it."""

    @property
    def case_id(self) -> str:
        """Name of the case."""
        ...

    @property
    def grade(self) -> str | None:
        """HGG or LGG, where known."""
        ...

    @property
    def patient(self) -> str:
        """Whose scan it is."""
        ...


def deal(
    cases: Iterable[SplittableCase], shares: Sequence[float], seed: int
) -> list[list[SplittableCase]]:
    """Deal patients to parts, grade by grade, in an order that the seed shuffles.

    Each patient goes to the part that is furthest behind its share, in the grade and in all.

    Args:
        cases: the cohort; all cases of a patient go together, under the patient's first grade.
        shares: share of each part, summing to 1.
        seed: which order.

    Returns:
        The cases of each part, sorted by id.
    """
    # All scans of a patient, under the first grade that one of them has.
    patients: dict[str, list[SplittableCase]] = defaultdict(list)
    for case in sorted(cases, key=lambda c: c.case_id):
        patients[case.patient].append(case)
    grades: dict[str, list[str]] = defaultdict(list)
    for patient, scans in patients.items():
        grades[next((s.grade for s in scans if s.grade), "")].append(patient)

    parts: list[list[SplittableCase]] = [[] for _ in shares]
    everyone = 0
    for grade in sorted(grades):
        of_grade = [0] * len(shares)
        order = sorted(grades[grade], key=lambda p: (make_key(seed, None, number_of(p)), p))
        for patient in order:
            scans = patients[patient]
            graded = sum(of_grade) + len(scans)
            everyone += len(scans)
            behind = [
                share * (graded + everyone) - count - len(part) if share > 0 else float("-inf")
                for share, count, part in zip(shares, of_grade, parts, strict=True)
            ]
            chosen = behind.index(max(behind))
            parts[chosen].extend(scans)
            of_grade[chosen] += len(scans)
    return [sorted(part, key=lambda c: c.case_id) for part in parts]


def leave_none_empty(parts: dict[str, list[SplittableCase]], needed: dict[str, bool]) -> None:
    """Give every empty part that is needed the last patient of the largest part, if it has two."""
    for part in (name for name, cases in parts.items() if needed[name] and not cases):
        largest = max(parts.values(), key=lambda cases: len({c.patient for c in cases}))
        last = largest[-1].patient if largest else None
        others = [case for case in largest if case.patient != last]
        if others:
            parts[part] = [case for case in largest if case.patient == last]
            largest[:] = others
