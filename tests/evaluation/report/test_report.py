import errno
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from pmixseg.data.parts import PUBLISHED, hash_cases
from pmixseg.errors import InputError
from pmixseg.evaluation.records import published
from pmixseg.evaluation.records.curves import read_curves
from pmixseg.evaluation.records.examples import Example, examples_of
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.records.sidecar import Sidecar, checkpoint_identity
from pmixseg.evaluation.records.tables import tabulate
from pmixseg.evaluation.report import page
from pmixseg.evaluation.report.page import html_table, write_report
from pmixseg.evaluation.report.summary import additions, region_summaries, remarks, worst_cases
from pmixseg.task import BRATS, Task
from tests.evaluation.made_up import ABOUT, made_up_rows, make_run, plain_report

SPLIT = "BraTS 2018 split 1 (199/29/57)"
BARE = {"pictures": (), "course": False}
"""A run of numbers alone."""


class Page(HTMLParser):
    """What a browser would load, and the text it would show."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.words, self.tags, self._open, self._silent = [], [], [], [], 0
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "data", "xlink:href", "srcset")]
        if tag not in ("meta", "img", "input", "br"):
            self._open.append(tag)
        self._silent += tag in ("style", "script")

    def handle_startendtag(self, tag, attrs):
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self._silent -= tag in ("style", "script")

    def handle_data(self, data):
        if not self._silent:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Pages of one run, of two, and of one without images; figures on that of two alone."""
    root = tmp_path_factory.mktemp("runs")
    two = [
        make_run(root, "plain", made_up_rows(6)),
        make_run(root, "<b>&</b>", made_up_rows(6, seed=1, gain=0.05)),
    ]
    plain_report(two[:1], root / "pages" / "one.html")
    write_report(two, root / "two")
    plain_report(two[:1], root / "bare.html", images=False)
    return root


def test_a_page_of_one_run(written):
    page = Page(written / "pages" / "one.html")
    table = tabulate([Records.read(written / "plain")])
    for line in table.lines:
        assert table.measure.show(line.mean) in page.text
    assert page.text.count("●") >= 32
    assert page.tags.count("canvas") == 4
    assert "Synthetic cases." in page.text
    assert "contains pictures of scans" not in page.text
    assert "Mean rank" not in page.text
    assert "percentile pooled" in page.text
    assert "ET is absent" not in page.text  # the records do not say which masks are empty
    assert "6 cases: too few" in page.text
    assert page.text.index("Read this first") < page.text.index("Key numbers by region")
    assert "lowered the mean Dice" in page.text


@pytest.mark.parametrize("name", ["pages/one.html", "two/report.html", "bare.html"])
def test_a_page_loads_nothing(written, name):
    page = Page(written / name)
    assert all(x.startswith(("data:image/png;base64,", "#")) for x in page.loads)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.source)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page.source)


def test_only_clear_losses_are_bold(tmp_path):
    dice = {"flair": 0.6, "t1": 0.3, "t2": 0.5, "flair+t1": 0.4}
    rows = [
        {"case": str(i), "combination": c, "region": "WT", "dice": d * (1 + 0.02 * i)}
        for i in range(6)
        for c, d in dice.items()
    ]
    # A loss of 0.5 points on average, from +10, -15 and +3.5.
    changes = (0.1, -0.15, 0.035) * 2
    both = {"combination": "flair+t2", "region": "WT"}
    rows += [
        {**both, "case": str(i), "dice": 0.6 * (1 + 0.02 * i) + change}
        for i, change in enumerate(changes)
    ]
    run = make_run(tmp_path, "r", rows, **BARE)
    source = Page(plain_report([run], tmp_path)).source
    assert "<b>−21.0</b>" in source
    assert "<td>−0.5</td>" in source


def test_a_page_of_several_runs_ranks_them_and_escapes_their_names(written):
    page = Page(written / "two" / "report.html")
    assert "2 runs side by side" in page.text
    assert "Mean rank (1 is best)" in page.text
    assert "luck of its seed" in page.text
    assert "<b>&</b>" in page.text
    assert "<b>&</b>" not in page.source
    payload = re.search(r'id="volumes">(.*?)</script>', page.source, re.DOTALL).group(1)
    assert [r["run"] for r in json.loads(payload)["cases"][0]["runs"]] == ["plain", "<b>&</b>"]


def test_figures_and_tables_are_files_beside_the_page(written):
    names = {p.name for p in (written / "two" / "report_files").iterdir()}
    stems = ("heat_dice", "heat_hd95", "cases_dice", "sequences_dice", "training", "training_1")
    assert names >= {f"{s}.{kind}" for s in stems for kind in ("svg", "png")}
    assert names >= {"table_dice.csv", "table_dice.tex", "table_hd95.csv", "summary.csv"}
    assert names >= {"case_1.png", "case_2.png"}
    assert not list(written.rglob(".*"))
    frame = pd.read_csv(written / "two" / "report_files" / "table_dice.csv")
    assert frame["run"].tolist() == ["plain", "<b>&</b>"] * 3


def test_without_images_nothing_of_a_scan_is_left(written):
    page = Page(written / "bare.html")
    assert "canvas" not in page.tags
    assert "img" not in page.tags
    assert "volumes" not in page.source
    assert "Left out on request" in page.text
    assert not list((written / "bare_files").glob("case_*"))


def test_the_worst_cases_are_shown(tmp_path):
    rows = [r for r in made_up_rows(7) if r["case"] not in ("case_001", "case_002")]
    order = ["case_005", "case_000", "case_006", "case_003", "case_004"]
    rows = [{**r, "dice": 0.1 + 0.2 * order.index(r["case"])} for r in rows]
    run = make_run(tmp_path, "r", rows, pictures=sorted(order), course=False)
    text = Page(plain_report([run], tmp_path)).text
    shown = re.findall(r"(case_\d+): mean Dice ([\d.]+), the ([a-z ]+) of 5 cases", text)
    assert shown == [
        ("case_005", "10.0", "lowest"),
        ("case_000", "30.0", "second lowest"),
        ("case_006", "50.0", "middle"),
        ("case_004", "90.0", "highest"),
    ]


def test_pictures_of_thick_slices_have_the_shape_of_the_brain(tmp_path):
    run = make_run(tmp_path, "r", made_up_rows(1), course=False, pictures=("case_000",))
    (path,) = examples_of(run).values()
    replace(Example.load(path), slice_spacing=(5.0, 0.75)).save(run)
    # 12 x 10 voxels: 60 mm across, 7.5 mm along.
    assert 'style="aspect-ratio: 8.0"' in Page(plain_report([run], tmp_path)).source


def test_scans_carry_a_notice_also_when_nothing_is_known_of_them(tmp_path):
    unknown = replace(ABOUT, phantom=None)
    run = make_run(tmp_path, "r", made_up_rows(12), unknown, course=False)
    text = Page(plain_report([run], tmp_path)).text
    assert "contains pictures of scans" in text
    assert "Synthetic" not in text
    assert "too few" not in text


def test_scores_of_weights_that_a_new_training_replaced_are_told(tmp_path):
    weights = tmp_path / "r" / "checkpoints" / "last.ckpt"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"tested")
    about = replace(ABOUT, checkpoint=checkpoint_identity(weights))
    run = make_run(tmp_path, "r", made_up_rows(12), about, course=False)
    said = "the scores are of another last.ckpt than that which lies in the run"
    assert said not in Page(plain_report([run], tmp_path)).text
    weights.write_bytes(b"trained again")
    assert said in Page(plain_report([run], tmp_path)).text


def test_published_rows_stand_beside_but_are_not_ranked(tmp_path, monkeypatch):
    rows = made_up_rows(6)
    hashes = ("t", "v", hash_cases({r["case"] for r in rows}))
    monkeypatch.setattr(published, "PUBLISHED", {**PUBLISHED, hashes: SPLIT})
    about = replace(ABOUT, phantom=False, split=SPLIT)
    named = [make_run(tmp_path, n, rows, about, **BARE) for n in ("a", "b")]
    page = Page(plain_report(named, tmp_path))
    assert "DeMoSeg" in page.text
    assert "mean over splits 1 to 3" in page.text
    assert "MAVP’s table states a mean TC of 76.00; its row averages to 76.09" in page.text
    ranked = page.text[page.text.index("Mean rank") :]
    assert "RFNet" not in ranked[: ranked.index("Combinations and cases")]
    other = make_run(tmp_path, "c", rows, replace(about, split=None), **BARE)
    assert "DeMoSeg" not in Page(plain_report([named[0], other], tmp_path)).text


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ("0.2496,0.2504", "stayed uniform (within 0.001)"),
        ("0.3,0.2", "left uniform, by up to 0.05"),
    ],
)
def test_a_report_says_whether_learned_weights_left_uniform(last, words, tmp_path):
    run = make_run(tmp_path, "r", made_up_rows(3), **BARE)
    levels = [f"anchor/level{level}/{name}" for level in (1, 2) for name in BRATS.modalities]
    rows = [",".join(["epoch", *levels]), "0" + 8 * ",0.25", f"1{5 * ',0.25'},{last},0.25"]
    (run / "metrics.csv").write_text("\n".join(rows))
    assert f"r: the anchor's learned weights {words}." in Page(plain_report([run], tmp_path)).text


def test_a_task_of_one_sequence_has_a_report(tmp_path):
    task = Task("lesions", ("ct",), ("lesion",), {"lesion": ("lesion",)})
    rows = [{"case": "1", "combination": "ct", "region": "lesion", "dice": 0.5}]
    run = tmp_path / "r"
    Records.from_rows(rows, "r", Sidecar(task)).write(run / "records.csv")
    text = Page(write_report([run], tmp_path)).text
    assert "1 combination of 1 sequence " in text
    assert "HD95 (mm) on every combination" not in text


def test_calibration_by_size_and_its_temperatures(tmp_path):
    rows = [
        {**row, "ece": 0.01 * (5 - row["combination"].count("+")), "brier": 0.002}
        for row in made_up_rows(3)
    ]
    fitted = replace(ABOUT, config={"evaluation": {"temperatures": {"1": 1.75}}})
    run = make_run(tmp_path, "a", rows, fitted, **BARE)
    text = Page(plain_report([run], tmp_path)).text
    table = text[text.index("Calibration of each") :]
    # One sequence 5, two 4, three 3, four 2; (4·5 + 6·4 + 4·3 + 2) / 15 = 3.87 in two cases. In the
    # third, which lacks T1, (3·5 + 3·4 + 3) / 7 = 4.29; the mean of the three is 4.01.
    assert "WT 5.00 4.00 3.00 2.00 4.01 0.20 0.20 0.20 0.20 0.20" in table
    assert "Probabilities at temperatures fitted on validation cases (see below)" in table
    assert "temperatures 1 shown: 1.75" in table
    frame = pd.read_csv(tmp_path / "report_files" / "table_ece.csv")
    assert frame["flair+t1"].tolist() == pytest.approx([4.0] * 3)
    assert (tmp_path / "report_files" / "table_brier.tex").is_file()
    other = make_run(tmp_path, "b", rows, **BARE)
    text = Page(plain_report([run, other], tmp_path)).text
    assert "in some runs only" in text
    assert "differ in the temperatures" in text
    older = make_run(tmp_path, "c", made_up_rows(3), **BARE)
    assert "Calibration of each" not in Page(plain_report([run, older], tmp_path)).text


def test_what_a_person_gets_wrong(tmp_path):
    with pytest.raises(InputError, match="holds no records"):
        plain_report([tmp_path / "nowhere"], tmp_path)
    run = make_run(tmp_path, "r", made_up_rows(1), **BARE)
    with pytest.raises(InputError, match="two runs are named"):
        plain_report([run, run], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        plain_report([run], tmp_path / "file" / "report.html")


@pytest.mark.parametrize(("kind", "method"), [(pd.DataFrame, "to_csv"), (Figure, "savefig")])
def test_no_half_of_a_file_is_left_on_a_full_disk(tmp_path, monkeypatch, kind, method):
    def full(self, path, **options):
        if not isinstance(path, io.StringIO):
            Path(path).write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(page, "as_svg", lambda figure: "<svg></svg>")
    run = make_run(tmp_path, "r", made_up_rows(1), **BARE)
    monkeypatch.setattr(kind, method, full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        plain_report([run], tmp_path / "out" / "report.html")
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert left and all(path.read_bytes() != b"half" for path in left), left


# ------------------------------------------------------------------ its parts


def summary_rows():
    rows = []
    for case, combination, dice, hd95, empty in (
        ("1", "t1", 0.0, 373.0, "prediction"),
        ("1", "flair", 0.8, 2.0, "none"),
        ("2", "t1", 0.0, 373.0, "truth"),
        ("2", "flair", 1.0, 0.0, "both"),
    ):
        row = {"case": case, "combination": combination, "region": "ET", "dice": dice}
        rows.append({**row, "hd95": hd95, "empty": empty})
    return rows


def test_key_numbers_by_hand():
    (summary,) = region_summaries([Records.from_rows(summary_rows(), "r", Sidecar(BRATS))])
    assert summary.dice == pytest.approx(45)  # mean of 0 and 90
    assert summary.spread == pytest.approx(7.0711, abs=1e-4)  # of 40 and 50
    assert np.isnan(summary.full)
    assert (summary.lowest, summary.lowest_at) == (0, "t1")
    assert summary.hd95 == pytest.approx(748 / 4)
    assert summary.hd95_median == pytest.approx(187.5)
    assert (summary.penalised, summary.invented, summary.missed) == (2, 1, 1)
    assert (summary.absent, summary.cases, summary.rows) == (1, 2, 4)


def test_worst_cases_by_hand():
    first, second = worst_cases(Records.from_rows(summary_rows(), "r", Sidecar(BRATS)))
    assert (first.case, first.combination, second.case) == ("1", "t1", "2")
    assert (first.dice, first.combination_dice) == (pytest.approx(40), 0)
    without = [{**r, "dice": np.nan} if r["case"] == "2" else r for r in summary_rows()]
    assert [w.case for w in worst_cases(Records.from_rows(without, "r", Sidecar(BRATS)))] == ["1"]


def test_additions_that_hurt_by_hand():
    rows = [
        {"case": case, "combination": c, "region": "WT", "dice": d * (1 + 0.01 * int(case))}
        for case in "123456"
        for c, d in (("flair", 0.6), ("t1", 0.3), ("flair+t1", 0.5))
    ]
    effects = additions(Records.from_rows(rows, "r", Sidecar(BRATS)))
    assert (effects.pairs, effects.hurt, effects.clear) == (2, 1, 1)
    (row,) = effects.worst
    assert (row["combination"], row["added"], row["cases"]) == ("flair", "t1", 6)
    assert row["change"] == pytest.approx(-0.1 * 1.035)


def test_remarks_say_what_differs():
    rows = summary_rows()
    one = Records.from_rows(rows, "one", ABOUT)
    about = replace(
        ABOUT,
        conventions={"percentile": "max_directed", "hd95_one_empty_mm": 373.12866},
        git={"commit": "1" * 40, "dirty": True},
    )
    two = Records.from_rows([r for r in rows if r["case"] == "1"], "two", about)
    two.altered = True
    text = "\n".join(remarks([one, two]))
    assert "differ in their conventions (percentile): do not compare" in text
    assert "scored on different cases" in text
    assert "ET is absent from the truth of 1 of 2 cases" in text
    assert "table of two was changed" in text
    assert "uncommitted changes: two." in text
    assert "1 case: too few" in text
    alone = "\n".join(remarks([Records.from_rows(made_up_rows(12), "r", ABOUT)]))
    assert "too few" not in alone
    assert "Not every case has every sequence (r)" in alone


def test_gap_before_and_after_beside_dice(tmp_path):
    plain = make_run(tmp_path, "plain", made_up_rows())
    aligned = make_run(tmp_path, "aligned", made_up_rows(seed=1))
    rows = [
        "epoch,step,val/dice,gap/level1/ratio,gap/level1/whitened,gap/level1/rank_within,"
        "gap/level1/decodability,gap/level1/collapsed,gap/level1/ratio/flair+t1",
        "-1,0,,0.61234,0.5,7.25,0.125,0,0.9",
        "0,9,0.5,0.31234,0.25,6.25,0.5,0,0.9",
        "1,19,0.4,0.01234,0.0125,1.5,0.75,1,0.9",
    ]
    (aligned / "metrics.csv").write_text("\n".join(rows))
    page = plain_report([plain, aligned], tmp_path / "out", images=False).read_text()
    section = page[page.index("Gap between sequences") :]
    section = section[: section.index("</section>")]
    assert section.count("<tbody>") == 1  # the other run was not monitored
    for number in ("0.612", "0.012", "0.500", "0.013", "7.2", "1.5", "0.12", "0.75", ">yes<"):
        assert number in section, number
    titles = {chart.title: set(chart.curves) for chart in read_curves(aligned)}
    assert titles["gap/ratio"] == {"level1"}
    gaps = {f"gap/{name}" for name in ("ratio", "whitened", "rank_within", "decodability")}
    assert set(titles) == {"val/dice", *gaps}
    alone = plain_report([plain], tmp_path / "alone", images=False).read_text()
    assert "Gap between sequences" not in alone


def test_html_table_stands_alone(records):
    page = html_table(tabulate([records]))
    assert page.count("<td") == 15 * 4 + 16 * 3
    assert page.count("●") == 32
