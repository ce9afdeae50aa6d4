"""Average the table of combinations by the number of sequences shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from rich.box import HORIZONTALS
from rich.table import Table

from pmixseg.evaluation.records.measures import DICE, Measure
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.records.tables import Line, Lines, Tabulation, best_of, tabulate

MOST_COLUMNS = 15
"""Combinations that still make a readable table: those of four sequences. Five make 31."""


@dataclass(frozen=True)
class BySize(Lines):
    """Means over all combinations of one size; the mean is still the one over combinations.

    Args:
        sizes: number of combinations of each size, 1 to M.
    """

    sizes: tuple[int, ...]

    def frame(self) -> pd.DataFrame:
        """Return one row per region and run; columns ``1`` to ``M``, and ``mean``."""
        numbers = [str(n) for n in range(1, len(self.sizes) + 1)]
        return pd.DataFrame(
            {
                "region": line.region,
                "run": line.run,
                **dict(zip(numbers, line.values, strict=True)),
                "mean": line.mean,
            }
            for line in self.lines
        )

    def rich(self) -> Table:
        """For a terminal: a column per number of sequences shown."""
        table = Table(title=f"{self.title} by number of sequences shown", box=HORIZONTALS)
        table.add_column("shown\ncombinations")
        for size, count in enumerate(self.sizes, 1):
            table.add_column(f"{size}\n{count}", justify="right")
        table.add_column("mean\n" + str(sum(self.sizes)), justify="right")
        for line in self.lines:
            table.add_row(self.label(line), *self.cells(line))
        return table


def group_by_size(table: Tabulation) -> BySize:
    """Average a table's columns over combinations of equal size."""
    lengths = np.array([len(c) for c in table.combinations])
    sizes = range(1, int(lengths.max()) + 1)
    lines: list[Line] = []
    for region, members in table.by_region():
        comparable = np.array(table.comparable[region])
        rows = [
            [*(_mean(np.array(line.values)[lengths == n]) for n in sizes), line.mean]
            for line in members
        ]
        same = [bool(comparable[lengths == n].all()) for n in sizes]
        marks = best_of(rows, [*same, all(same)], table.measure)
        for line, row, best in zip(members, rows, marks, strict=True):
            cases = tuple(
                min(c for c, k in zip(line.cases, lengths, strict=True) if k == n) for n in sizes
            )
            lines.append(Line(line.run, region, tuple(row[:-1]), line.mean, cases, best))
    counts = tuple(int((lengths == n).sum()) for n in sizes)
    return BySize(table.measure, table.task, tuple(lines), counts)


def result_table(
    records: Records | Sequence[Records], measure: Measure = DICE, width: int | None = None
) -> Table:
    """For a terminal: every combination where these are 15 or fewer, else grouped by size.

    Args:
        records: one run, or several to be compared.
        measure: what to print.
        width: characters of the terminal.
    """
    table = tabulate([records] if isinstance(records, Records) else records, measure)
    if len(table.combinations) > MOST_COLUMNS:
        return group_by_size(table).rich()
    return table.rich(width)


def _mean(values: np.ndarray) -> float:
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else float("nan")
