"""Withhold modalities of a case for a whole run: imbalanced and structured missingness.

What a mask withholds counts as never acquired, for teacher and student alike. The protocols stand
in docs/method/missingness.md.
"""

from __future__ import annotations

import csv
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pmixseg.data.keys import make_key, number_of, uniform
from pmixseg.data.missing import bernoulli_not_empty, check_rates, rate_row
from pmixseg.data.store.stored import StoredCase
from pmixseg.describe import Described
from pmixseg.errors import InputError, explained
from pmixseg.task import parse_combination, presence

Flags = tuple[bool, ...]
"""One flag per modality, in task order."""


class CaseMasks(Described, ABC):
    """Choose which modalities of each case may be used."""

    @abstractmethod
    def allowed(self, cases: Sequence[StoredCase], modalities: Sequence[str]) -> dict[str, Flags]:
        """Return what may be used of each case: never empty, and within what it acquired.

        Args:
            cases: all cases of the cohort.
            modalities: the M names.

        Raises:
            InputError: the rule does not fit the cohort.
        """


class MaskFile(CaseMasks):
    """Withhold modalities by a CSV or JSON file; cases that it does not list keep everything.

    CSV: a column ``data_name``, ``case_id`` or ``case``, and either ``mask``, a list of M truth
    values in task order (the files of PASSION, whose order FLAIR, T1ce, T1, T2 is that of
    ``BRATS``), or ``combination`` (``flair+t1``). JSON: ``{case: "flair+t1"}`` or
    ``{case: ["flair", "t1"]}``.

    Args:
        path: the file; ``.json``, anything else is read as CSV.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def allowed(self, cases: Sequence[StoredCase], modalities: Sequence[str]) -> dict[str, Flags]:
        """Return the modalities that a case may have.

        Raises:
            InputError: unreadable file, unknown case or modality, or a case left with nothing.
        """
        listed = self._read(modalities)
        unknown = sorted(set(listed) - {case.case_id for case in cases})
        if unknown:
            raise InputError(
                f"mask file {self.path} names cases that the cohort lacks: {', '.join(unknown)}; "
                "remove them or add the cases."
            )
        allowed = {}
        for case in cases:
            mask = listed.get(case.case_id, case.acquired)
            allowed[case.case_id] = tuple(m and a for m, a in zip(mask, case.acquired, strict=True))
            if not any(allowed[case.case_id]):
                raise InputError(
                    f"mask file {self.path} leaves case '{case.case_id}' without any acquired "
                    "modality; allow one or take the case out of the split."
                )
        return allowed

    def _read(self, modalities: Sequence[str]) -> dict[str, Flags]:
        with explained(f"mask file {self.path} cannot be read", "correct it"):
            text = self.path.read_text(encoding="utf-8-sig")
        rows = self._json(text) if self.path.suffix == ".json" else self._csv(text)
        masks: dict[str, Flags] = {}
        for case, value in rows:
            if case in masks:
                raise InputError(
                    f"mask file {self.path} names case '{case}' twice; keep one of its lines."
                )
            masks[case] = self._flags(case, value, modalities)
        return masks

    def _json(self, text: str) -> list[tuple[str, Any]]:
        with explained(f"mask file {self.path} is not JSON", "correct it"):
            raw = json.loads(text, object_pairs_hook=tuple)  # also a case that is named twice
        if not isinstance(raw, tuple):
            raise InputError(
                f"mask file {self.path} must map cases to combinations; it holds a "
                f"{type(raw).__name__}."
            )
        return list(raw)

    def _csv(self, text: str) -> list[tuple[str, Any]]:
        with explained(f"mask file {self.path} is not CSV", "correct it"):
            rows = list(csv.DictReader(text.splitlines()))
        columns = rows[0].keys() if rows else ()
        name = next((c for c in ("data_name", "case_id", "case") if c in columns), None)
        mask = next((c for c in ("mask", "combination") if c in columns), None)
        if name is None or mask is None:
            raise InputError(
                f"mask file {self.path} has the columns {list(columns)}; it needs 'case_id' (or "
                "'data_name') and 'mask' or 'combination'."
            )
        for number, row in enumerate(rows, start=1):
            if row[name] is None or row[mask] is None:
                raise InputError(
                    f"mask file {self.path}: row {number} lacks its '{name}' or '{mask}'; complete "
                    "it."
                )
        return [(row[name].strip(), row[mask]) for row in rows]

    def _flags(self, case: str, value: Any, modalities: Sequence[str]) -> Flags:
        # A list in text: of flags, or of names.
        if isinstance(value, str) and value.strip().startswith("["):
            words = [w.strip().strip("'\"") for w in value.strip(" []").split(",")]
            truth = {"true": True, "1": True, "false": False, "0": False}
            if all(w.lower() in truth for w in words):
                if len(words) != len(modalities):
                    raise InputError(
                        f"mask file {self.path}, case '{case}': {len(words)} flags for the "
                        f"{len(modalities)} modalities {list(modalities)}; correct the mask."
                    )
                return tuple(truth[w.lower()] for w in words)
            value = words
        if not isinstance(value, str | list) or not all(isinstance(w, str) for w in value):
            raise InputError(
                f"mask file {self.path}, case '{case}': {value!r} is no combination; write names "
                "joined by '+', or a list of names."
            )
        try:
            return presence(parse_combination(value, modalities), modalities)
        except InputError as error:
            raise InputError(f"mask file {self.path}, case '{case}': {error}") from error


class RandomMasks(CaseMasks):
    """Withhold each modality from each case at the modality's own rate, once and for all.

    The imbalanced rates of PASSION (2, 4, 6 and 8 of 10 for T1, T1ce, FLAIR and T2), drawn here
    instead of read from a file; never all of a case's modalities.

    Args:
        rates: probability in [0, 1) that a modality is missing, one or one per name.
        seed: which draw.
    """

    def __init__(self, rates: float | dict[str, float], seed: int = 0) -> None:
        check_rates(rates, "RandomMasks")
        self.rates, self.seed = rates, seed

    def allowed(self, cases: Sequence[StoredCase], modalities: Sequence[str]) -> dict[str, Flags]:
        """Return the modalities that a case may have."""
        row = rate_row(self.rates, modalities, "RandomMasks")
        return _draw(cases, row.expand(len(cases), -1), self.seed)


class SiteMasks(CaseMasks):
    """Withhold modalities at rates that depend on where a case was scanned.

    Args:
        pattern: regular expression searched in the case id; its first group is the site, like
            ``Brats18_([A-Z]+)`` for CBICA, TCIA and so on.
        rates: site -> rates as in :class:`RandomMasks`. Sites left out lose nothing.
        seed: which draw.
    """

    def __init__(
        self, pattern: str, rates: Mapping[str, float | dict[str, float]], seed: int = 0
    ) -> None:
        for site, value in rates.items():
            check_rates(value, f"SiteMasks, site {site}")
        with explained(f"SiteMasks: the pattern '{pattern}' is wrong", "correct it"):
            self.pattern = re.compile(pattern)
        if not self.pattern.groups:
            raise InputError(
                f"SiteMasks: the pattern '{pattern}' has no group; put the site in parentheses."
            )
        self.rates, self.seed = rates, seed

    def allowed(self, cases: Sequence[StoredCase], modalities: Sequence[str]) -> dict[str, Flags]:
        """Return the modalities that a case may have.

        Raises:
            InputError: rates for a site that no case has.
        """
        sites = [m.group(1) if (m := self.pattern.search(c.case_id)) else None for c in cases]
        unknown = [site for site in self.rates if site not in sites]
        if unknown:
            raise InputError(
                f"SiteMasks: no case is from {unknown}; the cohort's sites are "
                f"{sorted({s for s in sites if s})}."
            )
        rows = [rate_row(self.rates.get(s or "", 0.0), modalities, "SiteMasks") for s in sites]
        return _draw(cases, torch.stack(rows), self.seed)


class CovariateMasks(CaseMasks):
    """Withhold modalities by a number of each case, such as its size: missing not at random.

    P(modality m is missing) = sigmoid(logit(rate_m) + slope_m · z), where z is the covariate,
    standardised over the cohort (0 where a case has none). The covariate is the tumour's size in
    voxels of the store (log, from the label), or any column of a file, such as a quality score.

    Args:
        rates: rate in (0, 1) of each modality that can be missing, at z = 0.
        slopes: change of the log odds per standard deviation, for some of these modalities.
        file: CSV with ``case_id`` and ``column``; without it, the tumour's size.
        column: the covariate's column in ``file``.
        seed: which draw.
    """

    def __init__(
        self,
        rates: dict[str, float],
        slopes: dict[str, float],
        file: str | Path | None = None,
        column: str = "quality",
        seed: int = 0,
    ) -> None:
        check_rates(rates, "CovariateMasks")
        without = [name for name in slopes if not rates.get(name)]
        if without:
            raise InputError(
                f"CovariateMasks: {without} have a slope but no rate above 0; give them one."
            )
        self.rates, self.slopes, self.seed = rates, slopes, seed
        self.file, self.column = Path(file) if file else None, column

    def allowed(self, cases: Sequence[StoredCase], modalities: Sequence[str]) -> dict[str, Flags]:
        """Return the modalities that a case may have.

        Raises:
            InputError: the file lacks the column or holds something that is not a number.
        """
        if self.file is not None:
            raw = self._column(cases, self.file)
        else:  # the logarithm of the tumour's size
            sizes = [np.nan if c.label is None else np.count_nonzero(c.label) for c in cases]
            raw = np.log1p(np.array(sizes, dtype=np.float64))
        finite = np.isfinite(raw)
        spread = raw[finite].std() if finite.any() else 0.0
        z = np.where(finite, raw - (raw[finite].mean() if finite.any() else 0.0), 0.0)
        z = z / spread if spread > 0 else np.zeros_like(z)
        row = rate_row(self.rates, modalities, "CovariateMasks")
        slope = torch.tensor([self.slopes.get(m, 0.0) for m in modalities], dtype=torch.float64)
        odds = torch.logit(row) + torch.from_numpy(z)[:, None] * slope
        return _draw(cases, torch.sigmoid(odds), self.seed)

    def _column(self, cases: Sequence[StoredCase], file: Path) -> Float[np.ndarray, " n"]:
        try:
            with file.open(newline="", encoding="utf-8-sig") as handle:
                values = {
                    r["case_id"]: float(r[self.column] or "nan") for r in csv.DictReader(handle)
                }
        except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
            raise InputError(
                f"CovariateMasks: {file} must be a CSV with 'case_id' and a number in "
                f"'{self.column}' ({type(error).__name__}: {error})."
            ) from error
        return np.array([values.get(case.case_id, np.nan) for case in cases])


def _draw(cases: Sequence[StoredCase], rates: Float[Tensor, "n m"], seed: int) -> dict[str, Flags]:
    """Draw by case id, so that adding a case changes no other's mask."""
    numbers = [number_of(case.case_id) for case in cases]
    keys = torch.tensor([make_key(seed, None, n) for n in numbers], dtype=torch.int64)
    acquired = torch.tensor([case.acquired for case in cases], dtype=torch.bool)
    shown = bernoulli_not_empty(uniform(keys, "mask", rates.shape[1]), rates, acquired)
    return {case.case_id: tuple(row) for case, row in zip(cases, shown.tolist(), strict=True)}
