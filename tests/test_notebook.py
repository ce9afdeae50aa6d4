"""The notebook runs from top to bottom, and its pictures hold something."""

import base64
import io
import os
from pathlib import Path

import pytest
from matplotlib.image import imread

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def notebook():
    nbformat = pytest.importorskip("nbformat", reason="needs pmixseg[notebook]")
    return nbformat.read(NOTEBOOK, as_version=4)


def pictures(notebook):
    return [
        imread(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


def test_what_is_committed_is_small_and_has_no_path_of_a_machine(notebook):
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 2_000_000
    assert not any(f"{root}/" in text for root in ("/home", "/root", "/work", "/tmp", "/Users"))
    for cell in notebook.cells:
        assert not any(output["output_type"] == "error" for output in cell.get("outputs", []))


def test_the_backbone_takes_about_twenty_lines(notebook):
    (cell,) = (c for c in notebook.cells if "class TinyNet(" in c.source)
    network = cell.source[: cell.source.index("class TinyStudent")]
    assert len([line for line in network.splitlines() if line.strip()]) <= 25


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_notebook_runs(notebook, tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient", reason="needs pmixseg[notebook]")
    pytest.importorskip("ipykernel", reason="needs pmixseg[notebook]")
    monkeypatch.setenv("PMIXSEG_NOTEBOOK_EPOCHS", os.environ.get("PMIXSEG_NOTEBOOK_EPOCHS", "2"))
    place = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=1500, kernel_name="python3", resources=place).execute()
    shown = pictures(notebook)
    assert len(shown) == 5
    for picture in shown:
        assert picture.shape[1] > 500
        assert picture[..., :3].std() > 0.05
    made = tmp_path / "pmixseg-notebook"
    assert (made / "report.html").is_file()
    assert (made / "runs" / "student" / "records.csv").is_file()
