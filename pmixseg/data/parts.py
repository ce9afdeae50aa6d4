"""The parts of a cohort: their cases, their hashes, and how patients are divided among them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from pmixseg.data.keys import make_key, number_of
from pmixseg.errors import InputError, count_of

if TYPE_CHECKING:  # which only cases in hand have imported
    from pmixseg.data.cohorts.cases import Case
    from pmixseg.data.store.stored import StoredCase

PUBLISHED = {
    ("d7026e1360bb60bb", "994e6cb358f1b6d1", "c1f15e644e377caf"): "BraTS 2018 split 1 (199/29/57)",
    ("6963c1eaa36db378", "c0bdaa61e01d1e2d", "5f73831414ae06f7"): "BraTS 2018 split 2 (199/29/57)",
    ("8e934ea4ced264fa", "14f05f1ab069f1f8", "43899d5b257b7603"): "BraTS 2018 split 3 (199/29/57)",
}
"""Hashes (train, val, test) of the splits of U-HVED that RFNet, mmFormer, M3AE and others use."""


PARTS = ("train", "val", "test")


def hash_cases(cases: Iterable[str]) -> str:
    """Return the first 16 hexadecimal digits of SHA-256 over the sorted ids, joined by newlines.

    Example:
        >>> hash_cases(["b", "a"]) == hash_cases(["a", "b"])
        True
    """
    return hashlib.sha256("\n".join(sorted(cases)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Split:
    """Hold the case ids of the three parts of a cohort.

    Args:
        train: cases to train on.
        val: cases to validate on.
        test: cases to test on.
        lacking: cases that a split file names and the cohort lacks, left out because the user
            said so.

    Raises:
        InputError: a case is named twice, in one part or in two.
    """

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for part in PARTS:
            for case in getattr(self, part):
                if case in seen:
                    both = f"in {seen[case]} and again in {part}"
                    place = f"twice in {part}" if seen[case] == part else both
                    raise InputError(f"split: case '{case}' is {place}; name it once.")
                seen[case] = part

    @property
    def hashes(self) -> tuple[str, str, str]:
        """:func:`hash_cases` of train, val and test."""
        return hash_cases(self.train), hash_cases(self.val), hash_cases(self.test)

    @property
    def hash(self) -> str:
        """One hash of the three, independent of the order within a part."""
        return hashlib.sha256("\n".join(self.hashes).encode()).hexdigest()[:16]

    @property
    def published(self) -> str | None:
        """Name of the published split that this is, if it is one."""
        return PUBLISHED.get(self.hashes)

    @property
    def name(self) -> str:
        """The published name, or the hash; and how many cases of it were left out."""
        name = self.published or self.hash
        return f"{name}, {count_of(len(self.lacking), 'case')} lacking" if self.lacking else name


SplittableCase: TypeAlias = "Case | StoredCase"
"""A plan may look at its ``case_id``, its ``patient`` and its ``grade`` (HGG, LGG or ``None``)."""


def deal(
    cases: Iterable[SplittableCase], shares: Sequence[float], seed: int
) -> list[list[SplittableCase]]:
    """Deal patients to parts, grade by grade, in an order that the seed shuffles.

    Each patient goes to the part that is furthest behind its share, in the grade and in all. Shares
    sum to 1. All cases of a patient go together, under the patient's first grade; the cases of each
    part are sorted by id.
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
