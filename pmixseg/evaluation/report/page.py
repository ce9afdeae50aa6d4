"""One self-contained page from the folders of runs, and its tables and figures as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from pmixseg.argument_checks import checked
from pmixseg.data.formats.colours import class_colours
from pmixseg.errors import writing
from pmixseg.evaluation.gap.changes import GapChange, read_gap_changes
from pmixseg.evaluation.records.curves import UNIFORM, Chart, read_curves
from pmixseg.evaluation.records.examples import Example, examples_of
from pmixseg.evaluation.records.grouped import MOST_COLUMNS, group_by_size
from pmixseg.evaluation.records.measures import BRIER, DICE, ECE, HD95
from pmixseg.evaluation.records.published import recognised_split, references
from pmixseg.evaluation.records.records import Records, mean_over_cases
from pmixseg.evaluation.records.spreadsheets import quote_formulas
from pmixseg.evaluation.records.tables import Tabulation, check_together, run_name, tabulate
from pmixseg.evaluation.report.figures import (
    COLOURS,
    as_svg,
    box_plots,
    by_count,
    courses,
    heat_map,
    overlaid,
    save_png,
    themed,
)
from pmixseg.evaluation.report.pictures import (
    CONFUSED,
    INVENTED,
    MISSED,
    case_figure,
    panels,
    viewer_case,
)
from pmixseg.evaluation.report.summary import (
    additions,
    calibration_summaries,
    measured,
    region_summaries,
    remarks,
    temperatures,
    worst_cases,
)
from pmixseg.files import file_hash, whole, write_text
from pmixseg.task import Task
from pmixseg.version import __version__

WORST = ("lowest", "second lowest")
"""Worst cases with pictures; the middle and the best one stand beside them."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds for a report.

    Without a file in it, ``charts``, ``examples`` and ``gaps`` are empty.
    """

    folder: Path
    records: Records
    charts: list[Chart]
    examples: dict[str, Path]
    gaps: list[GapChange] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the run."""
        return run_name(self.records)

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run folder."""
        records = Records.read(folder)
        home = folder if folder.is_dir() else folder.parent
        tested = (records.sidecar.checkpoint or {}).get("file", "")
        gaps = read_gap_changes(home, best=tested == "best.ckpt")
        return cls(home, records, read_curves(home), examples_of(home), gaps)

    def other_weights(self) -> list[str]:
        """Remark where the run holds other weights than were tested, as after a new training."""
        tested = self.records.sidecar.checkpoint or {}
        path = self.folder / "checkpoints" / tested.get("file", "")
        if not path.is_file() or file_hash(path) == tested.get("sha256"):
            return []
        return [
            f"{self.name}: the scores are of another {path.name} than that which lies in the run, "
            "as where it was trained again after its test; test it again."
        ]

    def learned_weights(self) -> list[str]:
        """Say whether the weights of an anchor, where it learned some, left uniform."""
        levels = [chart.curves.values() for chart in self.charts if chart.title[:6] == "anchor"]
        apart = [abs(w.iloc[-1] - 1 / len(all_)) for all_ in levels if len(all_) > 1 for w in all_]
        if not apart:
            return []
        left = max(apart) >= UNIFORM
        how = (
            f"left uniform, by up to {max(apart):.2g}"
            if left
            else f"stayed uniform (within {UNIFORM:g})"
        )
        return [f"{self.name}: the anchor's learned weights {how}."]

    @property
    def mean_dice(self) -> float:
        """Mean Dice in percent, each case's combinations and regions first."""
        return 100 * mean_over_cases(self.records.table)


@checked
def write_report(runs: Sequence[Path | str], out: Path | str, images: bool = True) -> Path:
    """Write a report of one run, or of several side by side.

    The page needs no network and no other file. Beside it, ``<name>_files/`` holds the tables as
    CSV and LaTeX and the figures as PNG and SVG. Runs are folders with ``records.csv``, or tables
    of records; ``out`` is an ``.html`` file, or a folder, which gets ``report.html``. The page's
    path is returned.
    """
    out = Path(out)
    out = out if out.suffix in (".html", ".htm") else out / "report.html"
    read_runs = [Run.read(Path(folder)) for folder in runs]
    check_together([run.records for run in read_runs])
    assets = out.with_name(f"{out.stem}_files")
    with writing(assets):
        assets.mkdir(parents=True, exist_ok=True)
        page = _page(read_runs, assets, images)
    return write_text(out, page)


def html_table(table: Tabulation) -> str:
    """Return the combination table as an HTML ``<table>``, in the markup of the report."""
    macro = _environment().get_template("tables.html.j2").module
    markup: str = macro.combinations(table)  # type: ignore[attr-defined]  # a Jinja macro
    return str(markup)


def _page(runs: list[Run], assets: Path, images: bool) -> str:
    """Write the figures, tables and pictures beside the page, and return the page."""
    records = [run.records for run in runs]
    task = records[0].task
    dice = tabulate(records, DICE)
    hd95 = tabulate(records, HD95) if measured(records, "hd95") else None
    pictures = _pictures(runs) if images else []
    charts = _write_figures(assets, _figures(runs, dice, hd95))
    _write_tables(assets, [t for t in (dice, hd95) if t is not None], records)
    for k, shown in enumerate(pictures):
        save_png(case_figure(shown.examples, task), assets / f"case_{k + 1}.png")
    # The template gets values alone; it computes nothing.
    loader = _environment()
    return loader.get_template("report.html.j2").render(
        task=task,
        runs=runs,
        several=len(runs) > 1,
        images=images,
        written=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
        version=__version__,
        files=assets.name,
        style=_source(loader, "report.css"),
        script=_source(loader, "viewer.js"),
        figures=charts,
        training=_training(runs, charts),
        **_results(records, dice, hd95),
        **_provenance(runs),
        **_shown_cases(pictures, task),
    )


def _results(
    records: Sequence[Records], dice: Tabulation, hd95: Tabulation | None
) -> dict[str, Any]:
    """Return the numbers of the page: tables, summaries, calibration, the worst cases."""
    several = len(records) > 1
    on_one_split = len(set(map(recognised_split, records))) == 1
    return {
        "dice": dice,
        "hd95": hd95,
        "group": group_by_size,
        "most_columns": MOST_COLUMNS,
        "colours": dict(zip(map(run_name, records), COLOURS * len(records), strict=False)),
        "summaries": region_summaries(records),
        "calibration": calibration_summaries(records),
        "temperatures": [temperatures(one) for one in records],
        "worst": [case for one in records for case in worst_cases(one, 3 if several else 5)],
        "additions": [additions(one) for one in records] if dice.task.num_modalities > 1 else [],
        "ranks": _ranks(dice, hd95) if several else [],
        "references": references(records[0]) if on_one_split else [],
        "penalty": _penalty(records),
    }


def _provenance(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the page says about the data: split, phantoms, cases that were trained on."""
    records = [run.records for run in runs]
    return {
        "split": recognised_split(records[0]),
        "remarks": remarks(records)
        + [r for run in runs for r in (*run.other_weights(), *run.learned_weights())],
        "phantom": [one.sidecar.phantom for one in records],
        "synthetic": all(one.sidecar.phantom for one in records),
        "known": [(run_name(one), n) for one in records if (n := len(one.sidecar.seen))],
        "cases": sorted({str(case) for one in records for case in one.table["case"]}),
    }


def _shown_cases(pictures: list[PicturedCase], task: Task) -> dict[str, Any]:
    """Return the pictures of cases, what the viewer reads, and the legend of both."""
    return {
        "pictures": [(p.case, p.note, p.ratio, panels(p.examples, task)) for p in pictures],
        "viewer": {
            "cases": [viewer_case(p.examples) for p in pictures],
            "names": {m: task.show(m) for m in task.modalities},
            "colours": class_colours(len(task.labels)),
            "errors": [MISSED, INVENTED, CONFUSED],
        },
        "legend": list(zip(task.labels, class_colours(len(task.labels)), strict=True)),
        "errors": [
            ("missed", MISSED),
            ("predicted, not there", INVENTED),
            ("another class", CONFUSED),
        ],
    }


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pmixseg.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "signed": _signed,
        "codes": _codes,
        "sort_regions": _sort_regions,
    }
    return environment


def _source(environment: Environment, name: str) -> Markup:
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def _signed(value: float) -> str:
    return "–" if value != value else f"{value:+.1f}".replace("-", "−")


def _codes(text: str) -> Markup:
    """Return words between backticks as code."""
    parts = [Markup.escape(part) for part in text.split("`")]
    return Markup("").join(
        Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts)
    )


def _sort_regions(groups: Any, task: Task) -> list[Any]:
    return sorted(groups, key=lambda group: list(task.regions).index(group[0]))


def _penalty(records: Sequence[Records]) -> str:
    """Return the HD95 of a missed region, in words."""
    values = {one.sidecar.conventions.get("hd95_one_empty_mm", "own value") for one in records}
    if len(values) > 1:
        return "own value"
    value = values.pop()
    return f"{value:g} mm" if isinstance(value, int | float) else str(value or "not a number")


def _training(runs: list[Run], charts: dict[str, Markup]) -> list[tuple[str, Markup]]:
    """Return captions and curves of the trainings."""
    captions = {"training": "Training loss and validation Dice of all runs."}
    captions |= {f"training_{k + 1}": f"Course of {run.name}." for k, run in enumerate(runs)}
    return [(text, charts[name]) for name, text in captions.items() if name in charts]


def _figures(runs: list[Run], dice: Tabulation, hd95: Tabulation | None) -> dict[str, Figure]:
    records = [run.records for run in runs]
    figures = {"heat_dice": heat_map(dice), "cases_dice": box_plots(records)}
    if dice.task.num_modalities > 1:
        figures["sequences_dice"] = by_count(dice)
    if hd95 is not None:
        figures["heat_hd95"] = heat_map(hd95)
    together = overlaid({run.name: run.charts for run in runs})
    if len(runs) > 1 and together:
        figures["training"] = courses(together)
    for k, run in enumerate(runs):
        if run.charts:
            figures[f"training_{k + 1}"] = courses(run.charts)
    return figures


class PicturedCase(NamedTuple):
    """A case that is shown, its small copy of each run, and where its Dice stands."""

    case: str
    note: str
    examples: dict[str, Example]

    @property
    def ratio(self) -> float:
        """Width of its plane over its height, in mm."""
        one = next(iter(self.examples.values()))
        _, columns, rows = one.slice_image.shape
        return float(columns * one.slice_spacing[0] / (rows * one.slice_spacing[1]))


def _pictures(runs: list[Run]) -> list[PicturedCase]:
    """Choose the worst cases, the middle and the best of those with pictures in every run."""
    holders = [run for run in runs if run.examples]
    if not holders:
        return []
    shared = set.intersection(*(set(run.examples) for run in holders))
    table = pd.concat([run.records.table for run in holders])
    dice = table[table["case"].isin(shared)].groupby("case")["dice"].mean().sort_values()
    count = len(dice)
    places = dict(enumerate(WORST[:count]))
    if count > len(WORST):
        places = {**places, count // 2: "middle", count - 1: "highest"}
    pictured = []
    for k, place in sorted(places.items()):
        name = str(dice.index[k])
        note = f"mean Dice {100 * dice.iloc[k]:.1f}, the {place} of {count} cases with pictures"
        examples = {run.name: Example.load(run.examples[name]) for run in holders}
        pictured.append(PicturedCase(name, note, examples))
    return pictured


def _ranks(dice: Tabulation, hd95: Tabulation | None) -> list[tuple[str, pd.DataFrame]]:
    tables = [t for t in (dice, hd95) if t is not None]
    ranked = [(t.measure.title, t.ranks()) for t in tables]
    return [(title, frame) for title, frame in ranked if frame["columns"].max() > 0]


def _write_figures(assets: Path, figures: dict[str, Figure]) -> dict[str, Markup]:
    """Save each figure as SVG and PNG, and return what the page shows of it."""
    shown = {}
    for name, figure in figures.items():
        svg = as_svg(figure)
        write_text(assets / f"{name}.svg", svg)
        save_png(figure, assets / f"{name}.png")
        shown[name] = themed(svg)
    return shown


def _write_tables(assets: Path, tables: list[Tabulation], records: list[Records]) -> None:
    rules = [f"{k}: {v}" for k, v in records[0].sidecar.conventions.items()]
    others = [tabulate(records, m) for m in (ECE, BRIER) if measured(records, m.name)]
    for table in (*tables, *others):
        stem = f"table_{table.measure.name}"
        with whole(assets / f"{stem}.csv") as part:
            quote_formulas(table.frame()).to_csv(part, index=False)
        comment = "\n".join([f"cases: {table.sizes_of_means}", *rules])
        write_text(assets / f"{stem}.tex", table.latex(comment))
    summaries = [vars(s) for s in region_summaries(records)]
    with whole(assets / "summary.csv") as part:
        quote_formulas(pd.DataFrame(summaries)).to_csv(part, index=False)
