"""Tables of records: as in the papers, grouped by facts of the cases, beside published numbers."""

import io
import math
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from pmixseg.data.parts import PUBLISHED, hash_cases
from pmixseg.errors import InputError
from pmixseg.evaluation.comparison.compare import compare
from pmixseg.evaluation.records import published
from pmixseg.evaluation.records.grouped import group_by_size, result_table
from pmixseg.evaluation.records.measures import DICE, HD95, MEASURES, direction_of
from pmixseg.evaluation.records.published import (
    SOURCES,
    published_dice,
    recognised_split,
    references,
)
from pmixseg.evaluation.records.records import Records, mean_over_cases
from pmixseg.evaluation.records.sidecar import Sidecar
from pmixseg.evaluation.records.tables import dots, tabulate
from pmixseg.evaluation.report.page import Run, write_report
from pmixseg.evaluation.report.summary import region_summaries
from pmixseg.evaluation.scores.conventions import Conventions
from pmixseg.evaluation.scores.metrics import CaseMetrics
from pmixseg.inference.publish import results_of
from pmixseg.task import BRATS, Task, format_combination
from tests.evaluation.made_up import made_up_rows, plain_report

TWO = Task("two", ("a", "b"), ("x", "y"), {"R": ("x", "y"), "S": ("y",)}, {"a": "A_1"})


def records(rows, run="r", task=TWO):
    names = ("case", "combination", "region", "dice", "hd95")
    return Records.from_rows(
        [dict(zip(names, row, strict=True)) for row in rows], run, Sidecar(task)
    )


FIRST = [
    ("1", "a", "R", 0.5, 10.0),
    ("2", "a", "R", 0.7, 20.0),
    ("1", "b", "R", 0.2, math.nan),
    ("1", "a+b", "R", 0.8, 1.0),
    ("2", "a+b", "R", 0.9, 3.0),
    ("1", "a", "S", 0.1, 5.0),
]


def test_means_by_hand():
    table = tabulate([records(FIRST)])
    r, s = table.lines
    assert r.values == pytest.approx((60, 20, 85))
    assert r.cases == (2, 1, 2)
    assert r.mean == pytest.approx(65)  # of 50 and 80, the cases' own means: not of columns or rows
    assert s.values[0] == pytest.approx(10)
    assert math.isnan(s.values[1])
    assert s.mean == pytest.approx(10)
    hd95 = tabulate([records(FIRST)], HD95).lines[0]
    assert hd95.values[0] == 15
    assert math.isnan(hd95.values[1])
    assert hd95.values[2] == 2


def test_every_mean_of_a_run_is_one_number(tmp_path):
    """One complete case at 0.9, one that has FLAIR alone at 0.1: their own means count alike."""
    rows = [
        {"case": case, "combination": format_combination(c), "region": region, "dice": dice}
        for case, dice, modalities in (("whole", 0.9, BRATS.modalities), ("part", 0.1, ("flair",)))
        for c in BRATS.combinations()
        if set(c) <= set(modalities)
        for region in BRATS.regions
    ]
    run = Records.from_rows(rows, "r", Sidecar(BRATS))
    assert mean_over_cases(run.table) == pytest.approx(0.5)
    assert [line.mean for line in tabulate([run]).lines] == pytest.approx([50] * 3)
    assert [line.dice for line in region_summaries([run])] == pytest.approx([50] * 3)
    assert Run(tmp_path, run, [], {}).mean_dice == pytest.approx(50)
    other = Records.from_rows(rows, "s", Sidecar(BRATS))
    assert compare([run.table], [other.table]).mean_a == pytest.approx(0.5)
    every = [r for r in results_of(run, BRATS) if r.combination == "mean of all"]
    assert [r.mean for r in every] == pytest.approx([50] * 3)


def test_a_terminal_shows_circles_in_task_order(records):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123  # a sink
    console.print(tabulate([records]).rich())
    lines = [re.sub(r"\s+", " ", x).strip() for x in console.export_text().splitlines()]
    assert lines[0] == "Dice (%)"
    assert lines[2] == "FLAIR ● ○ ○ ○ ● ● ● ○ ○ ○ ● ● ● ○ ●"
    assert lines[3] == "T1ce ○ ● ○ ○ ● ○ ○ ● ● ○ ● ● ○ ● ●"
    assert lines[5].endswith("● mean")
    mean = records.table[records.table["region"] == "WT"].groupby("case")["dice"].mean()
    assert lines[7].split()[0] == "WT"
    assert float(lines[7].split()[-1]) == pytest.approx(100 * mean.mean(), abs=0.051)
    assert "each case's own mean" in lines[-1]  # one case lacks a sequence
    assert len(lines[7].split()) == 17


@pytest.mark.parametrize("several", [False, True])
def test_a_narrow_terminal_gets_combinations_as_rows(rows, several):
    runs = [Records.from_rows(rows, n, Sidecar(BRATS)) for n in ("one", "two")[: 1 + several]]
    for width in (60, 80, 104, 130):
        with open("/dev/null", "w") as sink:  # noqa: PTH123  # a sink
            console = Console(width=width, record=True, file=sink)
            console.print(tabulate(runs).rich(width))
        text = console.export_text()
        assert "…" not in text
        assert max(len(line.rstrip()) for line in text.splitlines()) <= width
        assert len(re.findall("[●○]", text)) == 60


def test_combinations_that_no_case_has_take_no_row():
    table = tabulate([records([("1", "a", "R", 0.5, 1.0), ("2", "a", "R", 0.7, 1.0)])]).rich(1)
    assert (table.caption, len(table.rows)) == (None, 2)  # of "a" and of the mean


def test_a_table_in_latex_is_as_written_here():
    text = tabulate([records(FIRST)]).latex("percentile: pooled")
    assert text == (
        "% Dice (%)\n"
        "% percentile: pooled\n"
        "\\begin{tabular}{l*{3}{c}c}\n"
        "\\toprule\n"
        "A\\_1 & $\\bullet$ & $\\circ$ & $\\bullet$ &  \\\\\n"
        "b & $\\circ$ & $\\bullet$ & $\\bullet$ & Mean \\\\\n"
        "\\midrule\n"
        "R & 60.00 & 20.00 & 85.00 & 65.00 \\\\\n"
        "S & 10.00 & -- & -- & 10.00 \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
    )


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_a_table_in_latex_compiles(tmp_path, rows):
    runs = [Records.from_rows(rows, n, Sidecar(BRATS)) for n in ("a_b", "50% & {x}~^\\")]
    body = tabulate(runs).latex()
    (tmp_path / "t.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs,amssymb}\\begin{document}\n"
        f"{body}\\end{{document}}"
    )
    command = ["pdflatex", "-halt-on-error", "t.tex"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)


def better(rows, gain):
    return [(*row[:3], row[3] + gain, row[4]) for row in rows]


def test_the_best_is_marked_and_ranked_by_measure():
    runs = [records(FIRST, "low"), records(better(FIRST, 0.05), "high")]
    dice = tabulate(runs)
    low, high = dice.by_region()[0][1]
    assert low.best == (False, False, False, False)
    assert high.best == (True, True, True, True)
    ranks = dice.ranks()
    assert ranks.loc["low", "all"] == 2
    assert ranks.loc["high", "all"] == 1
    assert ranks.loc["high", "columns"] == 4  # three of R, one of S
    hd95 = tabulate(runs, HD95)
    assert hd95.ranks()["all"].tolist() == [1.5, 1.5]
    assert hd95.lines[0].best[0] and hd95.lines[1].best[0]  # equal as printed
    nearer = records([(*row[:4], row[4] - 1) for row in FIRST], "nearer")
    assert tabulate([runs[0], nearer], HD95).ranks()["all"].tolist() == [2.0, 1.0]


def test_one_run_has_no_best():
    assert not any(any(line.best) for line in tabulate([records(FIRST)]).lines)
    assert "textbf" not in tabulate([records(FIRST)]).latex()


def test_other_cases_are_not_ranked():
    other = [("3" if row[0] == "2" else row[0], *row[1:]) for row in better(FIRST, 0.1)]
    table = tabulate([records(FIRST, "one"), records(other, "two")])
    assert table.comparable == {"R": (False, True, False), "S": (True, True, True)}
    r_two = table.by_region()[0][1][1]
    assert r_two.best == (False, True, False, False)
    assert table.ranks()["columns"].tolist() == [2, 2]


def runs_of(measure, *columns):
    """Runs whose cases have these values of a measure on one sequence; None: no number."""
    keys = {"combination": "a", "region": "R", "dice": 0.5}
    rows = [[{"case": str(i)} | keys | {measure: v} for i, v in enumerate(c)] for c in columns]
    return [Records.from_rows(r, f"run{i}", Sidecar(TWO)) for i, r in enumerate(rows)]


@pytest.mark.parametrize(
    ("measure", "values", "best", "ranked"),
    [
        ("volume_error_ml", ((-30, -30), (0.5, 0.5)), (False, True), [2, 1]),
        ("volume_error_ml", ((-0.4, -0.4), (0.4, 0.4)), (True, True), [1.5, 1.5]),
        ("volume_ml", ((30, 30), (40, 40)), (False, False), None),
        ("precision", ((0.9, None), (0.9, 0.9)), (False, False), None),
        ("precision", ((0.8, None), (0.9, None)), (False, True), [2, 1]),
    ],
)
def test_a_winner_is_nearest_to_the_ideal_on_the_same_values(measure, values, best, ranked):
    table = tabulate(runs_of(measure, *values), MEASURES[measure])
    assert tuple(line.best[0] for line in table.lines[:2]) == best
    assert group_by_size(table).lines[0].best[-1] == best[0]
    ranks = table.ranks()
    assert ranks["columns"].tolist() == [0 if ranked is None else 1] * 2
    assert ranked is None or ranks["all"].tolist() == ranked


def test_frame_is_the_table():
    frame = tabulate([records(FIRST)]).frame()
    assert list(frame.columns) == ["region", "run", "a", "b", "a+b", "mean", "cases"]
    pd.testing.assert_series_equal(
        frame["mean"], pd.Series([65.0, 10.0], name="mean"), check_exact=False
    )
    assert frame["cases"].tolist() == [1, 1]


def test_runs_that_do_not_belong_together():
    with pytest.raises(InputError, match="two runs are named"):
        tabulate([records(FIRST), records(FIRST)])
    other = Task("two", ("a", "b"), ("x", "y"), {"R": ("x",), "S": ("y",)})
    with pytest.raises(InputError, match="report them separately"):
        tabulate([records(FIRST), records(FIRST, "q", other)])
    with pytest.raises(InputError, match="no record"):
        tabulate([])
    missing = records(FIRST)
    del missing.table["hd95"]
    with pytest.raises(InputError, match="no column 'hd95'"):
        tabulate([missing], HD95)


def test_numbers_are_rounded_as_printed():
    assert DICE.show(12.345) == "12.35" or DICE.show(12.345) == "12.34"
    assert DICE.show(float("nan")) == "–"
    assert HD95.show(373.12866) == "373.1"
    assert dots(("t2",), BRATS) == ["○", "○", "○", "●"]


FIVE = Task("five", ("a", "b", "c", "d", "e"), ("x",), {"lesion": ("x",)})


def records_of(name, **options):
    rows = made_up_rows(task=FIVE, **options)
    return Records.from_rows(rows, name, Sidecar(FIVE, phantom=True))


def printed(table):
    stream = io.StringIO()
    Console(file=stream, width=200).print(table)
    return stream.getvalue()


def test_values_are_means_over_combinations_of_a_size():
    table = tabulate([records_of("one")])
    assert len(table.combinations) == 31
    grouped = group_by_size(table)
    assert grouped.sizes == (5, 10, 10, 5, 1)
    (line,) = grouped.lines
    values = table.lines[0].values
    assert line.values[0] == pytest.approx(sum(values[:5]) / 5)
    assert line.values[2] == pytest.approx(sum(values[15:25]) / 10)
    assert line.values[4] == values[30]
    assert line.mean == table.lines[0].mean


def test_the_best_run_is_marked_per_size():
    grouped = group_by_size(tabulate([records_of("low"), records_of("high", gain=0.05)]))
    low, high = grouped.lines
    assert all(high.best) and not any(low.best)


def test_terminal_and_report_group_from_31_on_and_not_before(tmp_path, records):
    text = printed(result_table(records_of("one")))
    assert "by number of sequences shown" in text
    assert "●" not in text
    assert "●" in printed(result_table(records, width=200))
    assert BRATS.num_modalities == 4
    run = tmp_path / "run"
    records_of("run").write(run / "records.csv")
    page = write_report([run], tmp_path / "out").read_text()
    assert page.count('class="sizes"') >= 1
    assert "<summary>All 31 combinations</summary>" in page
    small = tmp_path / "small"
    records.write(small / "records.csv")
    assert 'class="sizes"' not in plain_report([small], tmp_path / "out2").read_text()


SPLIT = "BraTS 2018 split 1 (199/29/57)"


@pytest.fixture
def on_split(monkeypatch, rows):
    """Records whose cases are taken for the published split's."""
    cases = {row["case"] for row in rows}
    hashes = ("train", "val", hash_cases(cases))
    monkeypatch.setattr(published, "PUBLISHED", {**PUBLISHED, hashes: SPLIT})

    def made(chosen=rows, task=BRATS, **about):
        sidecar = replace(Sidecar(task, split=SPLIT, part="test", phantom=False), **about)
        return Records.from_rows(chosen, "r", sidecar)

    return made


def test_every_row_has_a_source():
    table = published_dice()
    assert len(table) == 1488
    assert {tuple(x) for x in table[["table_source", "dataset"]].drop_duplicates().values} == set(
        SOURCES
    )
    named = {name for source in SOURCES.values() for name in source.splits}
    assert named <= set(PUBLISHED.values())


def test_rows_are_in_the_order_of_the_task(on_split):
    published = references(on_split())
    assert len(published) == 5 * 3
    rfnet = next(r for r in published if (r.method, r.region) == ("RFNet", "WT"))
    # FLAIR, T1ce, T1, T2, then pairs: as printed in the public table.
    assert rfnet.values[:5] == (86.46, 74.93, 74.68, 84.30, 89.17)
    assert rfnet.values[-1] == 90.26
    assert rfnet.stated == 85.67
    assert rfnet.mean == pytest.approx(85.67, abs=0.01)
    assert {r.source for r in published} == {SOURCES["DeMoSeg", "BraTS2018"]}


def test_stated_means_that_are_not_the_mean_of_their_row(on_split):
    odd = {(r.method, r.region) for r in references(on_split()) if abs(r.stated - r.mean) > 0.05}
    assert odd == {("MAVP", "TC")}  # docs/method/published.md: re-averages to 76.09


def test_no_reference_stands_beside_another_split_or_task(on_split, rows):
    assert recognised_split(on_split()) == SPLIT
    assert references(on_split(phantom=True)) == []
    assert references(on_split(split=None)) == []
    assert references(on_split(split="0123456789abcdef")) == []
    assert references(on_split([r for r in rows if r["case"] != "case_000"])) == []
    lesions = Task("lesions", BRATS.modalities, BRATS.labels, BRATS.regions)
    assert references(on_split(task=lesions)) == []


def table(name, column, value):
    ease = np.random.default_rng(0).random(12)
    rows = [
        {"run": name, "case": f"c{i}", "combination": "t1", "n_present": 1, "region": "WT"}
        | {"dice": 0.5 + e / 10, column: value}
        for i, e in enumerate(ease)
    ]
    return [pd.DataFrame(rows)]


@pytest.mark.parametrize(
    "measure", ["lesion_fp", "lesion_fn", "presence_fp", "presence_fn", "hd95", "volume_error_ml"]
)
def test_the_smaller_error_wins(measure):
    worse = -5.0 if measure == "volume_error_ml" else 5.0
    comparison = compare(table("a", measure, worse), table("b", measure, 1.0), measure)
    assert comparison.exploratory[["wins", "losses"]].to_numpy().tolist() == [[0, 12]]
    assert any("distance from 0" in n for n in comparison.notes) == (measure == "volume_error_ml")


@pytest.mark.parametrize("measure", ["volume_ml", "truth_volume_ml"])
def test_a_volume_is_no_contest(measure):
    with pytest.raises(InputError, match="no better direction"):
        compare(table("a", measure, 2.0), table("b", measure, 1.0), measure)


def test_the_table_is_what_is_scored_in_the_order_of_a_record():
    truth = np.zeros((6, 6, 6), np.uint8)
    truth[1:4, 1:4, 1:4] = 3
    scorer = CaseMetrics(truth, BRATS, (1, 1, 1), Conventions(lesion="brats2023-gli"))
    row = scorer.score(truth)[0]
    assert [*row] == ["region", *(name for name in MEASURES if name not in ("ece", "brier"))]
    for name, value in row.items():
        if name != "region":
            assert isinstance(value, str) != MEASURES[name].numeric, name


def test_every_measure_says_how_it_is_printed_and_which_way_it_is_better():
    undecided = {n for n, m in MEASURES.items() if m.direction is None}
    assert undecided == {"volume_ml", "truth_volume_ml", "empty"}
    assert all(m.title and m.name == n for n, m in MEASURES.items())
    assert len({m.title for m in MEASURES.values()}) == len(MEASURES)
    for measure in MEASURES.values():
        assert (measure.scale == 100) == (measure.unit in ("%", "× 100"))
    assert direction_of("hd95") == "lower" and direction_of("mine") == "higher"


def test_a_column_of_ones_own_is_better_when_higher_and_it_is_said():
    comparison = compare(table("a", "mine", 2.0), table("b", "mine", 1.0), "mine")
    assert comparison.exploratory[["wins", "losses"]].to_numpy().tolist() == [[12, 0]]
    assert any("higher number counts as a win" in note for note in comparison.notes)
