"""Split a cohort into training, validation and test cases.

A :class:`SplitPlan` makes a :class:`~pmixseg.data.Split`, three lists of case ids, from a cohort:
from files, from JSON, by k-fold or by fractions. What is drawn here is stratified by grade, keeps
the time points of a patient together, and depends on the seed and on names alone: not on the order
of the cases, nor on the version of a library.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pmixseg.data.cohorts.problems import listed
from pmixseg.data.keys import make_key
from pmixseg.data.parts import PARTS, Split, SplittableCase, deal, leave_none_empty
from pmixseg.describe import NOT_NEGATIVE, Described, Ranges
from pmixseg.errors import InputError, count_of, explained

Missing = Literal["refuse", "skip"]
"""What to do about cases that a split file names and the cohort lacks."""


class SplitPlan(Described, ABC):
    """Split a cohort into training, validation and test cases."""

    @abstractmethod
    def split(self, cases: Sequence[SplittableCase]) -> Split:
        """Split the cohort.

        Raises:
            InputError: the plan and the cohort do not fit.
        """


class SplitFiles(SplitPlan):
    """Split by one text file per part, with one case id per line.

    A ``#`` at the start of a line or behind a blank begins a comment, except in a line that is, as
    a whole, the name of a case.

    Args:
        train: file of the training cases; the other parts may be left out, too.
        val: file of the validation cases.
        test: file of the test cases.
        missing: ``skip`` goes on with the cases that are there, and records how many are not.
    """

    def __init__(
        self,
        train: str | Path | None = None,
        val: str | Path | None = None,
        test: str | Path | None = None,
        missing: Missing = "refuse",
    ) -> None:
        self.paths = {"train": train, "val": val, "test": test}
        self.missing = missing

    def split(self, cases: Sequence[SplittableCase]) -> Split:
        """Split the cases by the files of names.

        Raises:
            InputError: no file, an unreadable one, or it names cases that the cohort lacks.
        """
        if not any(self.paths.values()):
            raise InputError(
                "the split SplitFiles has no file of case names; give --data.split.train FILE (and "
                "val, test), or --data.split Fractions to split at random."
            )
        known = {case.case_id for case in cases}
        parts = {
            part: tuple(_lines(Path(path), known))
            for part, path in self.paths.items()
            if path is not None
        }
        where = ", ".join(str(p) for p in self.paths.values() if p)
        return _known(_split(parts, where), cases, where, self.missing)


class SplitLists(SplitPlan):
    """Split by lists of case ids, such as those that a checkpoint holds of its training.

    Args:
        train: ids of the training cases.
        val: ids of the validation cases.
        test: ids of the test cases.
        source: where the lists are from, for errors.
        lacking: ids that an earlier split named and its cohort lacked; they are recorded.
    """

    def __init__(
        self,
        train: Sequence[str | Path] = (),
        val: Sequence[str | Path] = (),
        test: Sequence[str | Path] = (),
        source: str = "the configuration",
        lacking: Sequence[str] = (),
    ) -> None:
        # Folders of a store, as a glob gives them, name their cases.
        one, two, three = (
            tuple(c.name if isinstance(c, Path) else c for c in part) for part in (train, val, test)
        )
        self.lists = Split(one, two, three, tuple(lacking))
        self.source = source

    def split(self, cases: Sequence[SplittableCase]) -> Split:
        """Split the cases by the lists of case ids.

        Raises:
            InputError: the lists name cases that the cohort lacks.
        """
        cohort = {case.case_id for case in cases}
        every = {*self.lists.train, *self.lists.val, *self.lists.test}
        if not every & cohort:
            raise InputError(
                f"the cohort has none of the {count_of(len(every), 'case')} of the split in "
                f"{self.source}; for a cohort that no training has seen use "
                "WholeCohort (--data.split)."
            )
        return _known(self.lists, cases, self.source)


class SplitJson(SplitPlan):
    """Split by a JSON file: ``{"train": [...], "val": [...], "test": [...]}``, or a list of folds.

    nnU-Net's ``splits_final.json`` is such a list.

    Args:
        path: the file.
        fold: which entry, where the file holds a list.
        missing: ``skip`` goes on with the cases that are there, and records how many are not.
    """

    ranges = Ranges(fold=NOT_NEGATIVE)

    def __init__(self, path: str | Path, fold: int = 0, missing: Missing = "refuse") -> None:
        self.path, self.fold, self.missing = Path(path), fold, missing

    def split(self, cases: Sequence[SplittableCase]) -> Split:
        """Split the cases by the JSON file.

        Raises:
            InputError: unreadable file, another structure, or it names cases that the cohort lacks.
        """
        text = _text(self.path)
        with explained(f"split file {self.path} is not JSON", "correct it"):
            raw = json.loads(text, object_pairs_hook=self._once)
        # A list of folds, or one split.
        if isinstance(raw, list):
            if not 0 <= self.fold < len(raw):
                raise InputError(
                    f"split file {self.path} has {count_of(len(raw), 'fold')}, numbered from 0; "
                    f"{self.fold} is not among them."
                )
            raw = raw[self.fold]
        elif self.fold != 0:
            raise InputError(
                f"split file {self.path} holds one split and no list of folds, so there is no fold "
                f"{self.fold}; leave the fold out, or use a file with folds."
            )
        return _known(_split(self._parts(raw), str(self.path)), cases, str(self.path), self.missing)

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Return an object of the file, no key twice; JSON itself would silently keep the last."""
        if len({key for key, _ in pairs}) < len(pairs):
            keys = ", ".join(key for key, _ in pairs)
            raise InputError(
                f"split file {self.path} names a part twice ({keys}); join its lists, or remove "
                "one."
            )
        return dict(pairs)

    def _parts(self, raw: Any) -> dict[str, tuple[str, ...]]:
        names = list(PARTS)
        if (
            not isinstance(raw, dict)
            or not set(raw) <= set(names)
            or not all(
                isinstance(v, list) and all(isinstance(c, str) for c in v) for v in raw.values()
            )
        ):
            raise InputError(
                f"split file {self.path} must hold lists of case ids under {names}; correct it."
            )
        return {part: tuple(ids) for part, ids in raw.items()}


class KFold(SplitPlan):
    """Split for k-fold cross-validation: fold k tests, a share of the rest validates.

    Args:
        fold: which fold tests, from 0.
        folds: how many.
        val_fraction: share of the other folds' cases that validates.
        seed: which deal.

    Raises:
        InputError: no such fold, or a fraction outside [0, 1).
    """

    def __init__(
        self, fold: int = 0, folds: int = 5, val_fraction: float = 0.1, seed: int = 0
    ) -> None:
        if not 0 <= fold < folds or folds < 2 or not 0 <= val_fraction < 1:
            raise InputError(
                f"KFold: fold {fold} of {folds} with val_fraction {val_fraction} is impossible; "
                "folds count from 0, there are at least 2, and the fraction is below 1."
            )
        self.fold, self.folds, self.val_fraction, self.seed = fold, folds, val_fraction, seed

    def split(self, cases: Sequence[SplittableCase]) -> Split:
        """Split the cases into folds, and hold one out.

        Raises:
            InputError: a part that should hold cases gets none.
        """
        dealt = deal(cases, [1.0 / self.folds] * self.folds, self.seed)
        rest = [c for k, part in enumerate(dealt) if k != self.fold for c in part]
        share = [1 - self.val_fraction, self.val_fraction]
        train, val = deal(rest, share, make_key(self.seed, None, self.fold))
        needed = {"train": True, "val": self.val_fraction > 0, "test": True}
        training = {"train": train, "val": val}
        leave_none_empty(training, needed)
        parts = {**training, "test": dealt[self.fold]}
        return _filled(parts, needed, f"KFold with {self.folds} folds")


class Fractions(SplitPlan):
    """Split at random by shares of the cohort.

    A part with a share above 0 gets at least one patient where there are enough of them.

    Args:
        train: share of the training cases; the three sum to 1.
        val: share of the validation cases.
        test: share of the test cases; ``None``: what the other two leave.
        seed: which deal.

    Example:
        >>> Fractions(train=0.5, val=0.2).shares
        {'train': 0.5, 'val': 0.2, 'test': 0.3}

    Raises:
        InputError: negative shares, or another sum.
    """

    def __init__(
        self, train: float = 0.7, val: float = 0.1, test: float | None = None, seed: int = 0
    ) -> None:
        rest = round(1 - train - val, 9) if test is None else test
        self.shares = {"train": train, "val": val, "test": rest}
        self.seed = seed
        if min(self.shares.values()) < 0 or abs(sum(self.shares.values()) - 1) > 1e-6:
            raise InputError(
                f"Fractions: {self.shares} must be shares >= 0 that sum to 1; correct them."
            )

    def split(self, cases: Sequence[SplittableCase]) -> Split:
        """Split the cases at random by shares, patients kept together.

        Raises:
            InputError: there are fewer patients than parts with a share above 0.
        """
        dealt = deal(cases, list(self.shares.values()), self.seed)
        needed = {part: share > 0 for part, share in self.shares.items()}
        parts = dict(zip(self.shares, dealt, strict=True))
        leave_none_empty(parts, needed)
        return _filled(parts, needed, "Fractions")


class WholeCohort(SplitPlan):
    """Put every case into one part, to test on a cohort that no training has seen."""

    def __init__(self, part: Literal["train", "val", "test"] = "test") -> None:
        self.part = part

    def split(self, cases: Sequence[SplittableCase]) -> Split:
        """Put every case into the one part."""
        return Split(**{self.part: tuple(sorted(case.case_id for case in cases))})


def divided_patients(split: Split, cases: Iterable[SplittableCase]) -> list[str]:
    """Return patients with cases in more than one part, as a split file may have them."""
    parts: dict[str, set[str]] = defaultdict(set)
    part_of = {case: part for part in PARTS for case in getattr(split, part)}
    for case in cases:
        if case.case_id in part_of:
            parts[case.patient].add(part_of[case.case_id])
    return sorted(patient for patient, several in parts.items() if len(several) > 1)


def _filled(parts: dict[str, list[SplittableCase]], needed: dict[str, bool], where: str) -> Split:
    empty = [part for part, cases in parts.items() if needed[part] and not cases]
    if empty:
        total = sum(len(cases) for cases in parts.values())
        raise InputError(
            f"{where}: {count_of(total, 'case leaves', 'cases leave')} {' and '.join(empty)} "
            "without any; use other shares or more cases."
        )
    return Split(**{part: tuple(c.case_id for c in cases) for part, cases in parts.items()})


def _known(
    split: Split, cases: Sequence[SplittableCase], where: str, missing: Missing = "refuse"
) -> Split:
    cohort = {case.case_id for case in cases}
    named = [*split.train, *split.val, *split.test]
    lacking = sorted(c for c in named if c not in cohort)
    if not lacking:
        return split
    used = {part: tuple(c for c in getattr(split, part) if c in cohort) for part in PARTS}
    emptied = [part for part in PARTS if getattr(split, part) and not used[part]]
    if missing == "skip" and not emptied:
        return Split(**used, lacking=tuple(lacking))
    if missing == "skip":
        raise InputError(
            f"the split in {where}: the cohort has none of the cases of {' and '.join(emptied)}; "
            "name the store of this split, or another split."
        )
    raise InputError(
        f"the split in {where} names {len(lacking)} of {count_of(len(named), 'case')} that the "
        f"cohort lacks: {listed(lacking)}; add them, take them out of the split, or go on without "
        "them (missing: skip; --data.split.missing)."
    )


def _split(parts: dict[str, tuple[str, ...]], where: str) -> Split:
    """Return a split that a file holds; errors name the file."""
    try:
        return Split(**parts)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _lines(path: Path, known: Collection[str]) -> list[str]:
    lines = (line.strip() for line in _text(path).split("\n"))
    names = (line if line in known else re.split(r"(?:^|\s)#", line)[0].strip() for line in lines)
    return [name for name in names if name]


def _text(path: Path) -> str:
    with explained(f"split file {path} cannot be read", "correct it"):
        return path.read_text(encoding="utf-8-sig")
