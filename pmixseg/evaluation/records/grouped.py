"""Average the table of combinations by the number of sequences shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich.box import HORIZONTALS
from rich.table import Table

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

    def rich(self) -> Table:
        """Return a table for a terminal: a column per number of sequences shown."""
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

    def by_size(values: Sequence[Any]) -> Any:
        return pd.Series(values).groupby(lengths)

    lines: list[Line] = []
    for region, members in table.by_region():
        rows = [[*by_size(line.values).mean(), line.mean] for line in members]
        # The best is marked where all runs have the same cases in every combination of a size.
        same = by_size(table.comparable[region]).all().tolist()
        marks = best_of(rows, [*same, all(same)], table.measure)
        for line, row, best in zip(members, rows, marks, strict=True):
            cases = tuple(by_size(line.cases).min())
            lines.append(Line(line.run, region, tuple(row[:-1]), line.mean, cases, best))
    return BySize(table.measure, table.task, tuple(lines), tuple(by_size(lengths.tolist()).size()))


def result_table(records: Records, width: int | None = None) -> Table:
    """Tabulate Dice for a terminal: every combination where these are 15 or fewer, else by size.

    ``width`` counts the characters of the terminal.
    """
    table = tabulate([records])
    if len(table.combinations) > MOST_COLUMNS:
        return group_by_size(table).rich()
    return table.rich(width)
