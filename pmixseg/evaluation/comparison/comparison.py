"""The result of a comparison of two methods: its figures, as text and as JSON."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table

from pmixseg.errors import count_of
from pmixseg.evaluation.comparison.paired_tests import LEVEL, Interval, PairedTest
from pmixseg.evaluation.records.measures import DICE, MEASURES

SHOWN_VIOLATIONS = 10


@dataclass(frozen=True)
class Comparison:
    """What the records say about method A against method B. Differences are A minus B.

    Args:
        runs_a: names of the runs of A.
        runs_b: names of the runs of B, each matched with the one of A at the same place.
        cases: cases that every run has.
        mean_a: primary endpoint of A, mean over runs and cases.
        mean_b: of B.
        by_pair: difference of the primary endpoint per pair of runs.
        primary: paired t-test of the primary endpoint.
        bootstrap: interval of the same difference, drawing runs and cases anew.
        wins: cases where A is better, where B is, and where they are equal (means over runs).
        measure: what the exploratory table compares.
        exploratory: one row per region and combination: ``difference``, ``low``, ``high`` (95 %),
            ``cases``, ``wins``, ``losses`` (means over runs), ``p``, ``p_holm``. Interval and p are
            those of the paired t over runs; with one run a side there is no p, and the interval is
            a bootstrap over cases.
        violations_a: combinations in which A gets worse by seeing more, see
            :func:`pmixseg.evaluation.comparison.monotonicity.violations`.
        violations_b: the same for B.
        notes: sentences that belong beside the numbers.
    """

    runs_a: tuple[str, ...]
    runs_b: tuple[str, ...]
    cases: tuple[str, ...]
    mean_a: float
    mean_b: float
    by_pair: tuple[float, ...]
    primary: PairedTest
    bootstrap: Interval
    wins: tuple[int, int, int]
    measure: str
    exploratory: pd.DataFrame
    violations_a: pd.DataFrame
    violations_b: pd.DataFrame
    notes: tuple[str, ...]

    @property
    def of_methods(self) -> bool:
        """Whether methods are compared, not two checkpoints."""
        return self.primary.pairs > 1

    def to_text(self, width: int = 110) -> str:
        """Write headline, primary endpoint, notes and tables, for a terminal or a log."""
        stream = io.StringIO()
        console = Console(
            file=stream, width=width, color_system=None, highlight=False, markup=False
        )
        test = self.primary
        # What is compared, the primary endpoint, remarks, then what only explores.
        kind = "Two methods" if self.of_methods else "Two checkpoints, not two methods"
        console.print(f"{kind}: A = {', '.join(self.runs_a)}; B = {', '.join(self.runs_b)}")
        pairs = count_of(test.pairs, "pair of runs", "pairs of runs")
        console.print(f"{pairs}, {count_of(len(self.cases), 'case')} in all of them\n")
        console.print("PRIMARY: mean Dice (%) per case over all combinations and regions")
        console.print(f"  A {DICE.scale * self.mean_a:.2f}   B {DICE.scale * self.mean_b:.2f}")
        console.print(f"  {self.conclusion()}")
        drawn = "runs and cases" if self.of_methods else "cases"
        console.print(f"  bootstrap over {drawn}: {_range(self.bootstrap)}")
        better, worse, equal = self.wins
        console.print(f"  A better in {count_of(better, 'case')}, B in {worse}, equal in {equal}\n")
        for note in self.notes:
            console.print(f"! {note}")
        console.print(_exploratory(self))
        for name, table in (("A", self.violations_a), ("B", self.violations_b)):
            console.print(_violations(name, table))
        return stream.getvalue()

    def conclusion(self) -> str:
        """Return one sentence on the primary endpoint that claims no more than the test shows."""
        test = self.primary
        size = f"A - B = {_signed(test.difference)} points of Dice"
        if math.isnan(test.p):
            return f"{size}; no test of the methods is possible."
        measured = f"{size} (95 % interval {_range(test.interval)}, p = {test.p:.3g}, paired t)"
        if test.p < LEVEL:
            return f"{measured}: {'A' if test.difference > 0 else 'B'} is better."
        return f"{measured}: no difference shown."

    def to_dict(self) -> dict[str, Any]:
        """Return primitives for JSON; numbers that are not defined are None."""
        test = self.primary
        return {
            "compares": "methods" if self.of_methods else "checkpoints",
            "runs_a": list(self.runs_a),
            "runs_b": list(self.runs_b),
            "cases": list(self.cases),
            "primary": {
                "endpoint": "mean Dice per case over all combinations and regions",
                "mean_a": self.mean_a,
                "mean_b": self.mean_b,
                "difference": test.difference,
                "by_pair": list(self.by_pair),
                "interval": [_defined(v) for v in test.interval],
                "t": _defined(test.t),
                "p": _defined(test.p),
                "pairs": test.pairs,
                "detectable": _defined(test.detectable),
                "bootstrap": [_defined(v) for v in self.bootstrap],
                "wins": dict(zip(("a", "b", "equal"), self.wins, strict=True)),
                "verdict": self.conclusion(),
            },
            "exploratory": {"measure": self.measure, "rows": _rows(self.exploratory)},
            "violations": {"a": _rows(self.violations_a), "b": _rows(self.violations_b)},
            "notes": list(self.notes),
        }


def _signed(value: float, scale: float = DICE.scale) -> str:
    return f"{value * scale:+.{2 if scale > 1 else 4}f}"


def _range(interval: Interval, scale: float = DICE.scale) -> str:
    if math.isnan(interval[0]):
        return "not defined"
    return " to ".join(_signed(end, scale) for end in interval)


def _probability(p: float) -> str:
    return "–" if math.isnan(p) else f"{p:.2g}"


def _exploratory(comparison: Comparison) -> Table:
    measure = MEASURES.get(comparison.measure)
    what = f"{measure.title} ({measure.unit})" if measure else comparison.measure
    scale = measure.scale if measure else 1.0
    table = Table(
        box=HORIZONTALS,
        padding=0,  # the table fits 80 characters
        show_edge=False,
        title=f"\nEXPLORATORY: {what} per region and combination, A - B",
        caption=(
            "p: paired t over runs; Holm: corrected for all rows. "
            if comparison.of_methods
            else "Intervals over cases, of these two networks alone; one run a side has no test. "
        )
        + "They generate hypotheses and prove none.",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("region", "combination"):
        table.add_column(name, overflow="fold")
    for name in ("A - B", "95 % interval", "cases", "won", "lost", "p", "Holm"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in comparison.exploratory.itertuples(index=False):
        table.add_row(
            str(row.region),
            str(row.combination),
            _signed(row.difference, scale),
            _range((row.low, row.high), scale),
            str(row.cases),
            str(row.wins),
            str(row.losses),
            _probability(row.p),
            _probability(row.p_holm) + ("*" if row.p_holm < LEVEL else ""),
        )
    return table


def _violations(name: str, table: pd.DataFrame) -> str:
    if table.empty:
        return f"{name}: no modality hurts when it is added."
    count = count_of(len(table), "time")
    lines = [f"{name}: {count} a modality hurts when it is added (points of mean Dice):"]
    for row in table.head(SHOWN_VIOLATIONS).itertuples(index=False):
        clear = "" if row.clear else ", may be chance"
        lines.append(
            f"  {row.region}: {row.added} added to {row.combination}: {_signed(row.change)} "
            f"({_range((row.low, row.high))}; {row.hurt} of {count_of(row.cases, 'case')}{clear})"
        )
    if len(table) > SHOWN_VIOLATIONS:
        lines.append(f"  and {len(table) - SHOWN_VIOLATIONS} smaller ones")
    return "\n".join(lines)


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): _defined(v) for k, v in row.items()} for row in table.to_dict("records")]
