"""The usual table of papers, regions by combinations: for terminals, LaTeX and spreadsheets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import pandas as pd
from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text

from pmixseg.errors import InputError
from pmixseg.evaluation.records.measures import DICE, Measure
from pmixseg.evaluation.records.records import Records, mean_over_cases
from pmixseg.task import Combination, Task, format_combination

SHOWN, HIDDEN = "●", "○"

OWN_MEANS = "mean: of each case's own mean, for some cases lack a sequence or a value"
"""What stands below a table whose means are not those of its columns."""


@dataclass(frozen=True)
class Line:
    """One line of a table: a run's means in one region.

    Args:
        run: name of the run.
        region: name of the region.
        values: scaled mean over cases per combination; NaN where no case has it.
        mean: the "average" column of the papers, by :func:`mean_over_cases`: the mean of ``values``
            where every case has every combination.
        cases: number of cases that have a value, per combination.
        best: per combination, and last for the mean, whether no other run is better.
    """

    run: str
    region: str
    values: tuple[float, ...]
    mean: float
    cases: tuple[int, ...]
    best: tuple[bool, ...]


@dataclass(frozen=True)
class Lines:
    """Means of one measure over cases: a line for each region and run.

    Args:
        measure: what is printed.
        task: names and order of modalities and regions.
        lines: grouped by region, runs in the given order.
    """

    measure: Measure
    task: Task
    lines: tuple[Line, ...]

    @property
    def runs(self) -> list[str]:
        """Names of the runs, in order."""
        return list(dict.fromkeys(line.run for line in self.lines))

    @property
    def title(self) -> str:
        """Measure and unit."""
        return f"{self.measure.title} ({self.measure.unit})"

    @property
    def sizes_of_means(self) -> str:
        """Over how many cases the means are: ``12``, or ``6 to 12``."""
        sizes = sorted({n for line in self.lines for n in line.cases if n})
        return " to ".join(map(str, dict.fromkeys((*sizes[:1], *sizes[-1:]))))

    def by_region(self) -> list[tuple[str, list[Line]]]:
        """Group the lines by region."""
        return [(r, list(lines)) for r, lines in groupby(self.lines, lambda line: line.region)]

    def label(self, line: Line) -> str:
        """Name a line in a terminal: its region, and its run where there are several."""
        region = self.task.show(line.region)
        return f"{region} {line.run}" if len(self.runs) > 1 else region

    def cells(self, line: Line) -> list[Text]:
        """Write the values of a line and their mean for a terminal, the best in bold."""
        digits = min(self.measure.digits, 1)
        return [
            Text(self.measure.show(value, digits), style="bold" if best else "")
            for value, best in zip((*line.values, line.mean), line.best, strict=True)
        ]


@dataclass(frozen=True)
class Tabulation(Lines):
    """A table with a column per combination.

    Args:
        combinations: the columns.
        comparable: per region, the columns in which runs are ranked and the best marked: all have
            values of the same cases there, and the measure has a better direction.
    """

    combinations: tuple[Combination, ...]
    comparable: dict[str, tuple[bool, ...]]

    def ranks(self) -> pd.DataFrame:
        """Rank the runs (1 is best, ties share): means over comparable columns, per region.

        Rows are runs; columns are regions, ``all`` and ``columns`` (how many were ranked).
        """
        parts: dict[str, pd.DataFrame] = {}
        for region, lines in self.by_region():
            values = pd.DataFrame({line.run: line.values for line in lines})
            use = pd.Series(self.comparable[region]) & values.notna().all(axis=1)
            parts[region] = values[use].map(self.measure.loss).rank(axis=1)
        means = pd.DataFrame({region: part.mean() for region, part in parts.items()})
        everything = pd.concat(list(parts.values()))
        means["all"] = everything.mean()
        means["columns"] = len(everything)
        return means.loc[self.runs]

    def frame(self) -> pd.DataFrame:
        """Return a row per region and run; columns are combinations, ``mean`` and ``cases``."""
        names = [format_combination(c) for c in self.combinations]
        return pd.DataFrame(
            {
                "region": line.region,
                "run": line.run,
                **dict(zip(names, line.values, strict=True)),
                "mean": line.mean,
                "cases": min((n for n in line.cases if n), default=0),
            }
            for line in self.lines
        )

    def rich(self, width: int | None = None) -> Table:
        """Return a table for a terminal: combinations as columns if they fit, else as rows."""
        names = [self.task.show(n) for n in (*self.task.modalities, *self.task.regions)]
        labels = max(map(len, (*names, *map(self.label, self.lines))))
        needed = labels + (len(self.combinations) + 1) * 6 + 2
        # What the last column is, where some cases lack a combination.
        uneven = any(len({*line.cases} - {0}) > 1 for line in self.lines)
        caption = OWN_MEANS if uneven else None
        table = Table(
            title=self.title, caption=caption, box=HORIZONTALS, padding=0, header_style=""
        )
        if width is None or width >= needed:
            self._fill_wide(table)
        else:
            self._fill_long(table)
        return table

    def _fill_wide(self, table: Table) -> None:
        table.add_column("\n".join(self.task.show(m) for m in self.task.modalities), no_wrap=True)
        for combination in self.combinations:
            table.add_column("\n".join(dots(combination, self.task)), justify="right", min_width=5)
        table.add_column("\n" * (self.task.num_modalities - 1) + "mean", justify="right")
        for _, lines in self.by_region():
            for line in lines:
                table.add_row(self.label(line), *self.cells(line))
            if len(self.runs) > 1:
                table.add_section()

    def _fill_long(self, table: Table) -> None:
        for modality in self.task.modalities:
            table.add_column(self.task.show(modality), justify="center")
        for line in self.lines:
            name = self.label(line).replace(" ", "\n", 1)
            table.add_column(name, justify="right", overflow="fold")
        columns = [self.cells(line) for line in self.lines]
        for i, combination in enumerate(self.combinations):
            if any(line.cases[i] for line in self.lines):  # a dedicated student has few
                table.add_row(*dots(combination, self.task), *(c[i] for c in columns))
        table.add_section()
        blank = [""] * (self.task.num_modalities - 1)
        table.add_row("mean", *blank, *(c[-1] for c in columns))

    def latex(self, comment: str = "") -> str:
        r"""Return a ``tabular`` (booktabs and amssymb) for LaTeX's ``\input``, below a comment."""
        several, count = len(self.runs) > 1, len(self.combinations)
        # The head: a row of dots per modality.
        rows = [
            " & ".join(
                [*[""] * several, _escape(self.task.show(m))]
                + [r"$\bullet$" if m in c else r"$\circ$" for c in self.combinations]
                + ["Mean" if m == self.task.modalities[-1] else ""]
            )
            for m in self.task.modalities
        ]
        # A block per region, with a row per run; regions of a single run stand together.
        blocks = [self._latex_rows(region, lines) for region, lines in self.by_region()]
        blocks = [rows, *(blocks if several else [list(chain.from_iterable(blocks))])]
        body = "\n\\midrule\n".join("\n".join(f"{row} \\\\" for row in b) for b in blocks)
        header = "".join(f"% {line}\n" for line in (self.title, *comment.splitlines()))
        labels = "ll" if several else "l"
        return (
            f"{header}\\begin{{tabular}}{{{labels}*{{{count}}}{{c}}c}}\n\\toprule\n"
            f"{body}\n\\bottomrule\n\\end{{tabular}}\n"
        )

    def _latex_rows(self, region: str, lines: Sequence[Line]) -> list[str]:
        rows = []
        for i, line in enumerate(lines):
            label = _escape(self.task.show(region)) if i == 0 else ""
            names = [label, _escape(line.run)] if len(self.runs) > 1 else [label]
            values = [
                rf"\textbf{{{self.measure.show(v)}}}" if best else self.measure.show(v)
                for v, best in zip((*line.values, line.mean), line.best, strict=True)
            ]
            rows.append(" & ".join([*names, *values]).replace("–", "--"))
        return rows


def tabulate(runs: Sequence[Records], measure: Measure = DICE) -> Tabulation:
    """Tabulate means over cases of one measure, for one run or several side by side.

    Names of runs must differ and tasks be equal. Cases in which the measure is NaN are left out.

    Raises:
        InputError: no run, runs of different tasks or with one name, or a column that is missing.
    """
    check_together(runs)
    task = runs[0].task
    combinations = tuple(task.combinations())
    names = [format_combination(c) for c in combinations]
    # Per run and region: the mean of every combination, and the cases that it is over.
    means: dict[tuple[str, str], list[float]] = {}
    cases: dict[tuple[str, str], list[frozenset[str]]] = {}
    for one in runs:
        if measure.name not in one.table:
            raise InputError(
                f"run '{run_name(one)}' has no column '{measure.name}'; test it again with that "
                "measure."
            )
        for region in task.regions:
            part = one.table[one.table["region"] == region].dropna(subset=measure.name)
            by = part.groupby("combination")
            key = (region, run_name(one))
            columns = by[measure.name].mean().reindex(names)
            means[key] = [
                measure.scale * v for v in (*columns, mean_over_cases(part, measure.name))
            ]
            ids = {str(name): frozenset(group["case"]) for name, group in by}
            cases[key] = [ids.get(n, frozenset()) for n in names]
    lines: list[Line] = []
    comparable: dict[str, tuple[bool, ...]] = {}
    for region in task.regions:
        keys = [(region, run_name(one)) for one in runs]
        columns_of_runs = zip(*(cases[k] for k in keys), strict=True)
        same = [measure.direction is not None and len(set(c)) == 1 for c in columns_of_runs]
        comparable[region] = tuple(same)
        marks = best_of([means[k] for k in keys], [*same, all(same)], measure)
        for key, best in zip(keys, marks, strict=True):
            *values, mean = means[key]
            sizes = tuple(len(ids) for ids in cases[key])
            lines.append(Line(key[1], region, tuple(values), mean, sizes, best))
    return Tabulation(measure, task, tuple(lines), combinations, comparable)


def run_name(records: Records) -> str:
    """Name of the run that the rows belong to."""
    return str(records.table["run"].iloc[0])


def dots(combination: Iterable[str], task: Task) -> list[str]:
    """Return one ● or ○ per modality of the task.

    Example:
        >>> from pmixseg.task import BRATS
        >>> "".join(dots(("t1ce", "t2"), BRATS))
        '○●○●'
    """
    chosen = set(combination)
    return [SHOWN if m in chosen else HIDDEN for m in task.modalities]


def check_together(runs: Sequence[Records]) -> None:
    """Refuse runs that no table holds: none, an empty one, two tasks, truths, or equal names."""
    if not runs or any(one.table.empty for one in runs):
        raise InputError("there is no record to tabulate; test a run first.")
    first = runs[0].task
    for one in runs[1:]:
        if one.task.to_dict() != first.to_dict():
            raise InputError(
                f"run '{run_name(one)}' has task '{one.task.name}' and run '{run_name(runs[0])}' "
                f"'{first.name}' (or other regions); report them separately."
            )
    names = [run_name(one) for one in runs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise InputError(f"two runs are named {twice}; rename the folder of one.")
    refuse_other_truth([one.table for one in runs])


def refuse_other_truth(tables: Sequence[pd.DataFrame]) -> None:
    """Refuse tables in which one name stands for other label maps, as far as their volumes tell."""
    key, truth = ["case", "region"], "truth_volume_ml"
    volumes = [one[[*key, truth]] for one in tables if {*key, truth} <= {*one}]
    if not volumes:
        return
    every = pd.concat(volumes)
    every[truth] = pd.to_numeric(every[truth], errors="coerce")
    ends = every.groupby(key, sort=False)[truth].agg(["min", "max"])
    differ = ends[ends["max"] - ends["min"] > 1e-3 * ends["max"]]
    if len(differ):
        (case, region), (low, high) = differ.index[0], differ.iloc[0]
        raise InputError(
            f"case '{case}' has {low:g} ml of {region} in one table and {high:g} ml in another, so "
            "they were scored on other label maps or other patients; test the runs on one cohort."
        )


def best_of(
    rows: list[list[float]], comparable: list[bool], measure: Measure
) -> list[tuple[bool, ...]]:
    """Say per row and column whether it is the best of several rows, as printed."""
    marks = [[False] * len(comparable) for _ in rows]
    if len(rows) > 1:
        for j, use in enumerate(comparable):
            losses = [measure.loss(round(row[j], measure.digits)) for row in rows]
            valid = [v for v in losses if not math.isnan(v)]
            if use and len(valid) > 1:
                for mark, loss in zip(marks, losses, strict=True):
                    mark[j] = loss == min(valid)
    return [tuple(mark) for mark in marks]


def _escape(text: str) -> str:
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}"}
    special |= {"^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    return "".join(special.get(c, c) for c in text)
