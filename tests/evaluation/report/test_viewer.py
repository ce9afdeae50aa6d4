"""The viewer of a report, run in a browser."""

import html
import json
import re
import shutil
import subprocess
import tempfile

import numpy as np
import pytest

from pmixseg.data.scans.colours import class_colours
from tests.evaluation.made_up import example_label, made_up_rows, make_run, plain_report

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
    const found = {};
    for (const layer of ["truth", "prediction"]) {
      const canvas = document.querySelector(`canvas[data-layer=${layer}]`);
      const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      found[layer] = Array.from({ length: canvas.height }, (_, r) =>
        Array.from({ length: canvas.width }, (_, c) => {
          const [x, y, z] = pixels.subarray(4 * (r * canvas.width + c));
          const two = (v) => v.toString(16).padStart(2, "0");
          return x === y && y === z ? 0 : two(x) + two(y) + two(z);
        }));
    }
    document.body.dataset.found = JSON.stringify(found);
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
    pixels = json.loads(html.unescape(re.search(r'data-found="(.*?)"', dom).group(1)))
    label = example_label()
    for layer, volume in (("truth", label), ("prediction", np.roll(label, 4 - len(("t1",)), 0))):
        # The patient's right on the left, anterior and superior up; sagittal: anterior left.
        expected = np.flip(volume.take(where, plane), (0, 1)).T
        shown = np.array(
            [[CLASSES.index(f"#{v}") + 1 if v else 0 for v in row] for row in pixels[layer]]
        )
        assert expected.any()
        assert (shown == expected).all(), layer
