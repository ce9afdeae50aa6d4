"""What a report shows: figures that do not grow, the viewer in a browser, who is marked best."""

import html
import json
import math
import re
import shutil
import subprocess
import tempfile

import numpy as np
import pandas as pd
import pytest

from pmixseg.data.formats.colours import class_colours
from pmixseg.errors import InputError
from pmixseg.evaluation.records.curves import Chart, read_curves
from pmixseg.evaluation.records.measures import HD95
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.records.sidecar import Sidecar
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
from pmixseg.evaluation.scores.conventions import Conventions
from pmixseg.task import BRATS, format_combination
from tests.evaluation.made_up import (
    ABOUT,
    example_label,
    made_up_rows,
    make_run,
    plain_report,
)


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


CLASSES = [colour.lower() for colour in class_colours(3)]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of two runs, whose predictions are the truth moved by 4 less what was shown."""
    root = tmp_path_factory.mktemp("viewer")
    runs = [
        make_run(root, name, made_up_rows(6, seed), course=False)
        for seed, name in enumerate(("plain", "<b>&</b>"))
    ]
    return plain_report(runs, root / "report.html")


def in_browser(page):
    """The document as it stands after its scripts have run."""
    with tempfile.TemporaryDirectory() as profile:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update"]
        command += ["--disable-sync", f"--user-data-dir={profile}", "--virtual-time-budget=4000"]
        done = subprocess.run(
            [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=200
        )
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to run the viewer's script")
def test_the_viewer_works_in_a_browser(page):
    dom = in_browser(page)
    assert 'id="viewer" hidden' not in dom
    assert "Voxels of 1.0 × 1.0 × 1.0 mm" in dom
    assert (
        '<option value="0">plain</option><option value="1">&lt;b&gt;&amp;&lt;/b&gt;</option>' in dom
    )
    assert re.search(r'<canvas data-layer="error" width="12" height="10"', dom)


CHOOSE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const form = document.querySelector("#viewer form");
  const choose = (name, value) => {
    const field = form.elements.namedItem(name);
    field.value = value;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };
  choose("combination", "t1");
  choose("plane", "PLANE");
  choose("slice", "SLICE");
  choose("opacity", "100");
  setTimeout(() => {
    const shown = {};
    for (const layer of ["truth", "prediction"]) {
      const canvas = document.querySelector(`canvas[data-layer=${layer}]`);
      const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      shown[layer] = Array.from({ length: canvas.height }, (_, r) =>
        Array.from({ length: canvas.width }, (_, c) => {
          const [x, y, z] = pixels.subarray(4 * (r * canvas.width + c));
          const two = (v) => v.toString(16).padStart(2, "0");
          return x === y && y === z ? 0 : two(x) + two(y) + two(z);
        }));
    }
    document.body.dataset.shown = JSON.stringify(shown);
  }, 500);
}, 500));
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to run the viewer's script")
@pytest.mark.parametrize(("plane", "where"), [(2, 3), (1, 4), (0, 7)])
def test_the_viewer_shows_the_chosen_combination_plane_and_slice(page, tmp_path, plane, where):
    source = page.read_text(encoding="utf-8")
    script = CHOOSE.replace("PLANE", str(plane)).replace("SLICE", str(where))
    chosen = tmp_path / "chosen.html"
    chosen.write_text(source.replace("</body>", script + "</body>"), encoding="utf-8")
    dom = in_browser(chosen)
    pixels = json.loads(html.unescape(re.search(r'data-shown="(.*?)"', dom).group(1)))
    label = example_label()
    for layer, volume in (("truth", label), ("prediction", np.roll(label, 4 - len(("t1",)), 0))):
        # The patient's right on the left, anterior and superior up; sagittal: anterior left.
        expected = np.flip(volume.take(where, plane), (0, 1)).T
        shown = np.array(
            [[CLASSES.index(f"#{v}") + 1 if v else 0 for v in row] for row in pixels[layer]]
        )
        assert expected.any()
        assert (shown == expected).all(), layer


def test_a_run_that_misses_tumours_does_not_win_by_having_no_distance(tmp_path):
    """The convention ``hd95: nan`` leaves out the cases in which nothing was found."""
    about = Sidecar(BRATS, conventions=Conventions(hd95="nan").to_dict())
    values = {"misses": ((0, math.nan), (0.8, 3)), "finds": ((0.8, 4), (0.8, 20))}
    values["nothing"] = ((0, math.nan), (0, math.nan))
    for name, of in values.items():
        rows = [
            {"case": f"{i:02}", "combination": format_combination(c), "region": region}
            | dict(zip(("dice", "hd95"), of[i // 6], strict=True))
            for i in range(12)
            for c in BRATS.combinations()
            for region in BRATS.regions
        ]
        Records.from_rows(rows, name, about).write(tmp_path / name / "records.csv")
    out = tmp_path / "report.html"
    said = plain_report([tmp_path / "finds", tmp_path / "nothing"], out).read_text()
    assert "HD95 has no value in nothing, so it is not shown here." in said
    pair = [tmp_path / "misses", tmp_path / "finds"]
    said = " ".join(plain_report(pair, out).read_text().split())
    assert "HD95 is missing from 270 of 540 rows of misses (6 of 12 cases lack it)" in said
    assert "penalties included" not in said and ": 45 for Dice." in said
    assert "3.0 <small>in 6 cases</small>" in said
    files = tmp_path / "report_files"
    latex = (files / "table_hd95.tex").read_text()
    assert "textbf" not in latex and "% cases: 6 to 12\n" in latex
    assert "textbf" in (files / "table_dice.tex").read_text()
    assert pd.read_csv(files / "table_hd95.csv")["cases"].tolist() == [6, 12] * 3


def test_curves_are_grouped_by_name(tmp_path):
    run = make_run(tmp_path, "r", made_up_rows(1), pictures=())
    charts = {chart.title: chart.curves for chart in read_curves(run)}
    assert list(charts) == ["train", "val/dice", "anchor/level1"]
    assert charts["train"]["loss"].tolist() == [1, 0.5]
    assert charts["val/dice"]["mean"].to_dict() == {0: 0.2, 1: 0.4}
    assert list(charts["val/dice"]) == ["mean", "WT"]
    (run / "metrics.csv").write_text("")
    assert read_curves(run) == []
    damaged = {b"epoch,train/loss\n0,x\n": "hold other things", b"\xff\xfe\n": "cannot be read"}
    for content, words in (damaged | {b"\xff\xfe\x00": ""}).items():
        (run / "metrics.csv").write_bytes(content)
        with pytest.raises(InputError, match=rf"metrics\.csv.* {words}"):
            read_curves(run)
