"""The figures of the report: values, courses, colours, and a size that does not grow."""

import numpy as np
import pandas as pd
import pytest

from pmixseg.evaluation.records.curves import Chart
from pmixseg.evaluation.records.measures import HD95
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.records.tables import tabulate
from pmixseg.evaluation.report.figures import (
    MOST_POINTS,
    as_svg,
    box_plots,
    by_count,
    courses,
    heat_map,
    themed,
)
from tests.evaluation.made_up import ABOUT


def test_single_points_are_no_course():
    line, point = pd.Series([1.0, 0.5, 0.4], [0, 1, 2]), pd.Series([0.7], [2])
    charts = [Chart("train_loss", {"loss": line}), Chart("val", {"mean": point})]
    (axes,) = [a for a in courses(charts).axes if a.get_visible()]
    assert axes.get_title(loc="left") == "train loss"
    assert all(tick == int(tick) for tick in axes.get_xticks())
    assert len(courses(charts[1:]).axes) == 1  # better than nothing


def test_figures_hold_the_values_of_the_table(records):
    table = tabulate([records])
    svg = as_svg(heat_map(table))
    for line in table.lines:
        for value in line.values:
            assert f">{value:.0f}</text>" in svg
    assert "T1ce" in as_svg(heat_map(tabulate([records], HD95)))
    lines = by_count(table).axes[0].lines
    values = np.array(table.lines[0].values)
    assert lines[0].get_ydata() == pytest.approx(
        [values[:4].mean(), values[4:10].mean(), values[10:14].mean(), values[14]]
    )


def test_svg_takes_the_colours_of_the_page(records):
    text = themed(as_svg(heat_map(tabulate([records]))))
    assert text.startswith("<svg")
    assert "var(--ink)" in text
    assert "#1a1a1c" not in text
    assert "DejaVu" not in text
    head = text[: text.index(">")]
    assert "viewBox" in head
    assert "width=" not in head


def test_a_box_plot_stays_small_for_any_cohort():
    rows = [
        {"case": f"c{i}", "combination": "flair", "region": "WT", "dice": i / 400, "hd95": 1.0}
        for i in range(400)
    ]
    records = Records.from_rows(rows, "r", ABOUT)
    drawn = [len(line.get_ydata()) for line in box_plots([records]).axes[0].lines]
    assert max(drawn) == MOST_POINTS == 200
    small = Records.from_rows(rows[:5], "r", ABOUT)
    assert max(len(line.get_ydata()) for line in box_plots([small]).axes[0].lines) == 5
