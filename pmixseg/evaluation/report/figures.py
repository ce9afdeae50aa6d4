"""Figures of a report, as files for a paper and as SVG that follows a page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pmixseg.evaluation.gap.latents import LatentSample
from pmixseg.evaluation.records.curves import Chart
from pmixseg.evaluation.records.grouped import group_by_size
from pmixseg.evaluation.records.measures import DICE
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.records.tables import Tabulation, check_together, run_name
from pmixseg.files import whole
from pmixseg.task import Combination, Task, format_combination

INK, MUTED, GRID, PAPER = "#1a1a1c", "#6b6b70", "#dcdce1", "#fdfdfe"
"""Colours of text, secondary text, rules and ground; a page replaces them by its own."""

THEMED = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--rule)", PAPER: "var(--paper)"}

COLOURS = ("#3a7ebf", "#d5702a", "#2b9a78", "#b0568f", "#8a7a2e", "#7a7f88")
"""One per run or curve; distinct for people with colour blindness, and on light and dark."""

SCALE = LinearSegmentedColormap.from_list(
    "ink", ["#f3ead6", "#d9c58f", "#8fb08c", "#3f8a8c", "#1f5a7a", "#16324f"]
)
"""Low to high, of steadily falling lightness."""

SHOWN_VOXELS = 400
"""Voxels per modality in a scatter plot."""

STYLE: Mapping[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.dpi": 100,
    "svg.fonttype": "none",
    "svg.hashsalt": "pmixseg",
}

MOST_POINTS = 200
"""Cases drawn per box, at random where there are more: a page stays small for any cohort."""


@contextmanager
def drawing() -> Iterator[None]:
    """Give figures made inside the journal style; fonts that are absent are passed over."""
    installed = {font.name for font in fontManager.ttflist}
    fonts = [name for name in STYLE["font.sans-serif"] if name in installed]
    with mpl.rc_context({**STYLE, "font.sans-serif": fonts or ["DejaVu Sans"]}):
        yield


def heat_map(table: Tabulation) -> Figure:
    """Draw means of every region (and run) on every combination, the value in each cell."""
    several = len(table.runs) > 1
    values = np.array([line.values for line in table.lines])
    names = [
        f"{table.task.show(line.region)}  {line.run}" if several else table.task.show(line.region)
        for line in table.lines
    ]
    with drawing():
        rows, columns = values.shape
        dots = 0.19 * table.task.num_modalities
        figure = Figure(figsize=(9.2, 0.34 * rows + dots + 0.35), layout="constrained")
        grid = figure.add_gridspec(2, 1, height_ratios=[0.34 * rows, dots], hspace=0.02)
        axes = figure.add_subplot(grid[0])
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(values),
            cmap=SCALE if table.measure.higher else SCALE.reversed(),
            norm=Normalize(0, 100) if table.measure == DICE else _log_scale(values),
            linewidth=1.2,
            edgecolor=PAPER,
        )
        # Dark digits on light cells: the luminance of the cell decides.
        for i, j in np.ndindex(rows, columns):
            text = table.measure.show(float(values[i, j]), 0 if table.measure == DICE else 1)
            if np.isnan(values[i, j]):
                axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=MUTED)
                continue
            r, g, b, _ = mesh.cmap(mesh.norm(values[i, j]))
            light = 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.45
            colour = "#101418" if light else "#ffffff"
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=colour, size=8.5)
        axes.set_yticks(np.arange(rows) + 0.5, names)
        axes.set_xticks([])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        # A line between regions.
        if several:
            for i in range(len(table.runs), rows, len(table.runs)):
                axes.axhline(i, color=PAPER, lw=4)
        _dot_matrix(figure.add_subplot(grid[1]), table.combinations, table.task, 0.5)
        return figure


def box_plots(runs: Sequence[Records]) -> Figure:
    """Draw Dice over cases: a box per combination and run, region by region, cases as points.

    Boxes span the quartiles, whiskers the points within 1.5 times that range.
    """
    check_together(runs)
    task = runs[0].task
    combinations = task.combinations()
    names = [format_combination(c) for c in combinations]
    with drawing():
        dots = 0.19 * task.num_modalities
        count = len(task.regions)
        figure = Figure(figsize=(9.2, 1.65 * count + dots + 0.4), layout="constrained")
        grid = figure.add_gridspec(count + 1, 1, height_ratios=[*[1.65] * count, dots])
        width = 0.78 / len(runs)
        shift = np.random.default_rng(0)  # points beside each other, the same in every report
        axes = None
        for i, region in enumerate(task.regions):
            axes = figure.add_subplot(grid[i], sharex=axes)
            for k, one in enumerate(runs):
                part = one.table[one.table["region"] == region]
                by = {str(c): g["dice"].dropna() for c, g in part.groupby("combination")}
                data = [by.get(n, pd.Series(dtype=float)).to_numpy() * DICE.scale for n in names]
                at = np.arange(len(names)) + (k - (len(runs) - 1) / 2) * width
                colour = COLOURS[k % len(COLOURS)]
                axes.boxplot(
                    data, positions=at, widths=width * 0.8, showfliers=False, manage_ticks=False,
                    patch_artist=True, boxprops={"facecolor": colour + "33", "edgecolor": colour},
                    medianprops={"color": colour, "lw": 1.6},
                    whiskerprops={"color": colour}, capprops={"visible": False},
                )  # fmt: skip
                for x, cases in zip(at, data, strict=True):
                    many = len(cases) > MOST_POINTS
                    points = shift.choice(cases, MOST_POINTS, replace=False) if many else cases
                    spread = shift.uniform(-0.22, 0.22, len(points)) * width
                    axes.plot(x + spread, points, ".", ms=3.2, mew=0, color=colour, alpha=0.75)
            axes.set_title(task.show(region))
            axes.set_ylabel(f"{DICE.title} ({DICE.unit})")
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            axes.tick_params(axis="x", length=0, labelbottom=False)
            axes.set_ylim(-3, 103)
        if len(runs) > 1:
            _legend(figure, [run_name(one) for one in runs])
        _dot_matrix(figure.add_subplot(grid[count], sharex=axes), combinations, task, 0.0)
        return figure


def by_count(tables: Tabulation) -> Figure:
    """Draw the mean over combinations of a size: what another sequence is worth."""
    task, sizes = tables.task, [len(c) for c in tables.combinations]
    means = {(line.run, line.region): line.values for line in group_by_size(tables).lines}
    counts = np.arange(1, task.num_modalities + 1)
    with drawing():
        count = len(task.regions)
        figure = Figure(figsize=(min(3.0 * count, 9.2), 2.5), layout="constrained")
        all_axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
        # A plot per region: the mean of each size, and every combination as a point.
        for axes, (region, lines) in zip(all_axes, tables.by_region(), strict=True):
            for k, line in enumerate(lines):
                colour, mean = COLOURS[k % len(COLOURS)], means[line.run, region]
                axes.plot(counts, mean, "-o", color=colour, ms=4, label=line.run)
                axes.plot(sizes, line.values, ".", color=colour, ms=4, mew=0, alpha=0.45)
            axes.set_title(task.show(region))
            axes.set_xticks(counts)
            axes.set_xlim(0.7, task.num_modalities + 0.3)
            axes.grid(axis="y")
        all_axes[0].set_ylabel(tables.title)
        all_axes[count // 2].set_xlabel("sequences shown")
        if len(tables.runs) > 1:
            _legend(figure, tables.runs)
        return figure


def courses(charts: Sequence[Chart]) -> Figure:
    """Draw curves of a training, one small plot per chart, three in a row.

    Charts of single points are left out, where any has a course to show.
    """
    charts = [c for c in charts if any(len(v) > 1 for v in c.curves.values())] or charts
    with drawing():
        across = min(len(charts), 3)
        down = -(-len(charts) // across)
        figure = Figure(figsize=(9.2 if across > 1 else 5, 2.6 * down), layout="constrained")
        plots = figure.subplots(down, across, squeeze=False).ravel()
        # One plot per chart; what is left of the last row stays empty.
        for axes, chart in zip(plots, charts, strict=False):
            for k, (name, curve) in enumerate(chart.curves.items()):
                axes.plot(
                    curve.index,
                    curve.to_numpy(),
                    color=COLOURS[k % len(COLOURS)],
                    linestyle="-" if k < len(COLOURS) else "--",
                    linewidth=1.4,
                    marker="o" if len(curve) < 3 else "",
                    markersize=3,
                    label=name,
                )
            axes.set_title(chart.title.replace("_", " "))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axes.set_xlabel(next(iter(chart.curves.values())).index.name or "")
            axes.grid(axis="y")
            if len(chart.curves) > 1:
                axes.legend(ncols=1 + (len(chart.curves) > 5), handlelength=1.2)
        for axes in plots[len(charts) :]:
            axes.set_visible(False)
        return figure


def overlaid(histories: Mapping[str, Sequence[Chart]]) -> list[Chart]:
    """Draw training loss and validation Dice of several runs, a curve per run."""
    panels = (("train", "loss", "train/loss"), ("val/dice", "mean", "val/dice"))
    charts = []
    for title, name, shown in panels:
        curves = {
            run: chart.curves[name]
            for run, own in histories.items()
            for chart in own
            if chart.title == title and name in chart.curves
        }
        if curves:
            charts.append(Chart(shown, curves))
    return charts


def as_svg(figure: Figure) -> str:
    """Return the figure as an SVG document on a transparent ground.

    What is drawn from it later keeps its layout, which is the slow part.
    """
    buffer = io.StringIO()
    with drawing():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    figure.set_layout_engine("none")
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> Path:
    """Write a PNG of 200 dpi on white ground, complete or not at all."""
    with drawing(), whole(path) as part:
        figure.savefig(part, dpi=200, facecolor="white", metadata={"Software": None})
    return path


def themed(svg: str) -> Markup:
    """Return an SVG of :func:`as_svg` to be put inline.

    It has no fixed size, its text the page's font, and its colours are CSS variables: ``--ink``,
    ``--muted``, ``--rule`` and ``--paper``.
    """
    text = svg[svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    for size in ("height", "width"):
        text = re.sub(rf'<svg ([^>]*?){size}="[^"]*"', r"<svg \1", text, count=1)
    # Group ids repeat from figure to figure; only ids of reused shapes and clips are referred to.
    text = re.sub(r'<g id="[a-zA-Z]+\w*_\d+"', "<g", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    for fixed, variable in THEMED.items():
        text = text.replace(fixed, variable)
    return Markup(text)


def _dot_matrix(axes: Any, combinations: Sequence[Combination], task: Task, offset: float) -> None:
    """Draw a row of filled and open circles per modality, under the columns of the axes above."""
    for i, modality in enumerate(task.modalities):
        shown = np.array([modality in c for c in combinations])
        x = np.arange(len(combinations)) + offset
        row = np.full(len(x), i)
        axes.plot(x[shown], row[shown], "o", ms=5.5, mew=0.9, mfc=INK, mec=INK)
        axes.plot(x[~shown], row[~shown], "o", ms=5.5, mew=0.9, mfc="none", mec=MUTED, alpha=0.6)
    axes.set_yticks(range(task.num_modalities), [task.show(m) for m in task.modalities])
    axes.set_ylim(task.num_modalities - 0.4, -0.6)
    axes.set_xlim(offset - 0.5, offset + len(combinations) - 0.5)
    axes.tick_params(length=0, labelbottom=False)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)


def _log_scale(values: NDArray[np.float64]) -> Normalize:
    """Choose a logarithmic scale for mm: penalties of hundreds must not flatten 2 to 20."""
    low = max(float(np.nanmin(values)), 0.5)
    return LogNorm(low, max(float(np.nanmax(values)), low * 1.01), clip=True)


def _legend(figure: Figure, names: Sequence[str]) -> None:
    handles = [
        Line2D([], [], marker="s", ls="", ms=7, mew=0, color=COLOURS[k % len(COLOURS)])
        for k in range(len(names))
    ]
    figure.legend(handles, names, loc="outside upper left", ncols=min(len(names), 4))


def projection_figure(
    samples: Mapping[int, LatentSample], names: Sequence[str], title: str
) -> Figure:
    """Return the first two principal channels of all modalities together, a panel per level."""
    figure = Figure(figsize=(3.2 * max(len(samples), 1), 3.4), layout="constrained")
    figure.suptitle(title)
    for axes, (level, sample) in zip(
        figure.subplots(1, max(len(samples), 1), squeeze=False)[0], samples.items(), strict=False
    ):
        pooled = sample.vectors.flatten(0, 1)
        middle = pooled.mean(0)
        # Singular vectors have no sign of their own; the largest entry is made positive.
        _, _, directions = torch.linalg.svd(pooled - middle, full_matrices=False)
        plane = directions[:2].T
        plane = plane * plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()
        for m, name in enumerate(names):
            dots = ((sample.vectors[:SHOWN_VOXELS, m] - middle) @ plane).numpy()
            second = dots[:, 1] if dots.shape[1] > 1 else dots[:, 0] * 0
            colour = COLOURS[m % len(COLOURS)]
            axes.scatter(dots[:, 0], second, s=4, color=colour, label=name, linewidths=0)
        gap = sample.gap()
        axes.set_title(
            f"level {level}: gap {gap.ratio:.2g}\nvariance {gap.variance:.2g}, "
            f"rank {gap.rank_within:.1f}",
            fontsize=9,
        )
        axes.set_xticks([])
        axes.set_yticks([])
    if samples:
        figure.axes[0].legend(fontsize=8, markerscale=2)
    return figure
