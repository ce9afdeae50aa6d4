"""Average the table of combinations by the number of sequences shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pandas as pd
from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text

from pmixseg.evaluation.records.measures import DICE, Measure
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.records.tables import Line, Tabulation, best_of, tabulate
from pmixseg.task import Task

MOST_COLUMNS = 15
"""Combinations that still make a readable table: those of four sequences. Five make 31."""


@dataclass(frozen=True)
class BySize:
    """Means over all combinations of one size.

    Args:
        measure: what is printed.
        task: names and order of regions.
        sizes: number of combinations of each size, 1 to M.
        lines: as in :class:`~pmixseg.evaluation.records.tables.Tabulation`, with a value per size;
            the mean is still the one over combinations.
    """

    measure: Measure
    task: Task
    sizes: tuple[int, ...]
    lines: tuple[Line, ...]

    def by_region(self) -> list[tuple[str, list[Line]]]:
        """Lines of each region."""
        return [(r, list(lines)) for r, lines in groupby(self.lines, lambda line: line.region)]

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
        several = len({line.run for line in self.lines}) > 1
        table = Table(
            title=f"{self.measure.title} ({self.measure.unit}) by number of sequences shown",
            box=HORIZONTALS,
        )
        table.add_column("shown\ncombinations")
        for size, count in enumerate(self.sizes, 1):
            table.add_column(f"{size}\n{count}", justify="right")
        table.add_column("mean\n" + str(sum(self.sizes)), justify="right")
        digits = min(self.measure.digits, 1)
        for line in self.lines:
            region = self.task.show(line.region)
            cells = [
                Text(self.measure.show(value, digits), style="bold" if best else "")
                for value, best in zip((*line.values, line.mean), line.best, strict=True)
            ]
            table.add_row(f"{region} {line.run}" if several else region, *cells)
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
    return BySize(table.measure, table.task, counts, tuple(lines))


def result_table(
    records: Records | Sequence[Records], measure: Measure = DICE, width: int | None = None
) -> Table:
    """For a terminal: every combination where these are 15 or fewer, else grouped by size.

    Args:
        records: one run, or several to be compared.
        measure: what to print.
        width: characters of the terminal.

    Raises:
        InputError: see :func:`~pmixseg.evaluation.records.tables.tabulate`.
    """
    table = tabulate([records] if isinstance(records, Records) else records, measure)
    if len(table.combinations) > MOST_COLUMNS:
        return group_by_size(table).rich()
    return table.rich(width)


def _mean(values: np.ndarray) -> float:
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else float("nan")
