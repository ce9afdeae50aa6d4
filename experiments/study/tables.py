"""Tables of a study: arms and scores of an entry, how numbers are written, the gap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.study.results import StudyResults
from pmixseg.errors import InputError
from pmixseg.evaluation.gap.guards import low_guards

Entry = Mapping[str, Any]
Array = NDArray[np.float64]

DIGITS = {"ratio": 3, "numerator": 3, "variance": 3, "whitened": 3, "decodability": 3, "rank": 1}
"""Decimals of a measure; two where none is named."""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def percent(value: float, signed: bool = False) -> str:
    """Dice in points."""
    return f"{100 * value:+.2f}" if signed else f"{100 * value:.1f}"


def interval(ends: tuple[float, float]) -> str:
    """Both ends in points; a dash where there is none."""
    if np.isnan(ends).any():
        return "–"
    return f"{percent(ends[0], True)} to {percent(ends[1], True)}"


def figure(value: float) -> str:
    """Three digits, or all of a whole number."""
    if np.isnan(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spell(measure: str, value: float) -> str:
    """A measure with the decimals that it deserves."""
    if np.isnan(value):
        return "–"
    short = next((d for part, d in DIGITS.items() if part in measure), 2)
    return f"{value:.{short}f}"


def arm_names(results: StudyResults, entry: Entry) -> list[str]:
    """Arms of a table."""
    named = entry.get("arms")
    return list(named or results.group(entry["group"])["arm"].unique())


def scored(results: StudyResults, entry: Entry, arm: str, blocks: list[str]) -> list[pd.DataFrame]:
    """Records of an arm that count for the table's endpoint, a table per block."""
    tables = results.tables(entry["group"], arm, blocks)
    if "shown" not in entry:
        return tables
    return [t[[entry["shown"] in str(c).split("+") for c in t["combination"]]] for t in tables]


def endpoint(results: StudyResults, entry: Entry, arm: str, blocks: list[str]) -> Array:
    """Mean Dice over combinations and regions, ``[blocks, cases]``.

    Raises:
        InputError: the trainings were not scored on the same cases.
    """
    by_case = [
        t.groupby("case", sort=False, observed=True)["dice"].mean().rename(i)
        for i, t in enumerate(scored(results, entry, arm, blocks))
    ]
    joined = pd.concat(by_case, axis=1)
    if joined.isna().any(axis=None):
        raise InputError(
            f"arm '{arm}' of group '{entry['group']}': its trainings were scored on different "
            "cases; name blocks that can be compared."
        )
    return joined.to_numpy(dtype=np.float64).T


def measured(rows: pd.DataFrame, prefix: str, measure: str) -> list[str]:
    """Columns of a measure, finest level first."""
    ending = f"/{measure}"
    return sorted(c for c in rows if c.startswith(f"{prefix}/level") and c.endswith(ending))


def gap(results: StudyResults, entry: Entry) -> str:
    """Measures of the latents after training (and, where known, before), mean over blocks.

    ``references`` names for an arm the one without alignment; the table then counts the blocks in
    which a guard is lost against that arm (docs/method/theory.md).
    """
    names = arm_names(results, entry)
    rows = []
    chosen = list(entry.get("measures") or ())
    references = entry.get("references") or {}
    for name in names:
        own = results.arm(entry["group"], name)
        # Students that see one sequence have a row each; a measure between sequences is missing.
        levels = list(
            dict.fromkeys(
                c.split("/")[1] for c in own if c.startswith("gap/level") and own[c].notna().any()
            )
        )
        for level in sorted(levels):
            known = [c.split("/", 2)[2] for c in own if c.startswith(f"gap/{level}/")]
            chosen = chosen or known
            cells = []
            for measure in chosen:
                after = own.get(f"gap/{level}/{measure}", pd.Series(dtype=float)).mean()
                before = own.get(f"gap_before/{level}/{measure}", pd.Series(dtype=float)).mean()
                was = f"{before:.2f} → " if measure == "ratio" and not np.isnan(before) else ""
                cells.append(was + spell(measure, float(after)))
            if references:
                cells.append(collapses(results, entry["group"], name, references, level))
            rows.append([name, level.removeprefix("level"), *cells])
    more = ["collapsed"] if references else []
    return markdown(["trained", "level", *(m.replace("_", " ") for m in chosen), *more], rows)


def collapses(
    results: StudyResults, group: str, arm: str, references: Mapping[str, str], level: str
) -> str:
    """In how many blocks a guard is too low, of those that the arm and its reference share."""
    if arm not in references:
        return "–"
    own = results.arm(group, arm).set_index("block")
    other = results.arm(group, references[arm]).set_index("block")
    shared = [block for block in own.index if block in other.index]
    guards = {f"gap/{level}/{name}": name for name in ("rank_within", "decodability")}
    known = [column for column in guards if column in own and column in other]

    def values(rows: pd.DataFrame, block: str) -> dict[str, float]:
        return {guards[column]: float(rows.loc[block, column]) for column in known}

    low = [bool(low_guards(values(own, block), values(other, block))) for block in shared]
    return f"{sum(low)} of {len(shared)}"
