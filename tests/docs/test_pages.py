"""What the documentation shows is run: every block that is tagged, page by page."""

import base64
import io
import os

import pytest
from matplotlib.image import imread

from tests.docs.pages import DOCS, ROOT, pages, run, script


def test_blocks_share_one_script():
    text = (
        "```bash run\nx=1\n```\ntext\n```bash\nnot run\n```\n"
        "  ```yaml run file=a.yaml\n  key: [1]\n  ```\n```python run\nprint(1)\n```\n"
    )
    made = script(text)
    assert made.splitlines()[2] == "x=1"
    assert "not run" not in made
    assert "cat > a.yaml <<'END_OF_BLOCK_2'\nkey: [1]\nEND_OF_BLOCK_2" in made
    assert "python <<'END_OF_BLOCK_3'\nprint(1)\n" in made


def test_every_tutorial_is_run():
    tutorials = {page for page in (DOCS / "tutorials").glob("*.md") if page.name != "index.md"}
    assert tutorials
    assert tutorials <= set(pages())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(DOCS)))
def test_every_page_runs_as_written(page, tmp_path):
    done = run(script(page.read_text()), tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


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
