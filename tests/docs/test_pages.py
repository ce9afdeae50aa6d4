"""What the documentation shows is run: each tagged block, commands in sentences, the notebook."""

import base64
import io
import os
import re

import pytest
from matplotlib.image import imread

from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
from tests.docs.pages import DOCS, ROOT, pages, run, script
from tests.docs.test_readmes import FENCE, FEW


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


BENCHMARK = "experiments/benchmarks/"
SMALLER = {
    "alignment.py": "--rounds 1 --size 16 --batch 1 --arms student",
    "backbones.py child": "--side 16",
    "backbones.py layers": "--side 16 --repeats 1 --precisions fp32",
    "backbones.py test": "",
    "backbones.py train": "--side 16 --repeats 1",
    "gpu.py": "--rehearse --rows ceilings",
    "grouping.py": "",
    "metrics.py": "--data ../coarse",
    "models.py": "--only UHVED",
    "open_maps.py": "--cases 2 --rounds 1 --spacing 6",
    "operations.py": "--only MultiEncoderUNet --side 16",
    "patches.py": "--data ../shared/data/brats2021 --rounds 1 --cases 1",
    "segment_memory.py": "--shape 48 48 32 --window 16",
    "store.py": "--repeats 1",
}
"""What makes a benchmark small: flags after those of the page, whose place they take."""
SMALLEST = {BENCHMARK + name: flags for name, flags in SMALLER.items()}
SMALLEST["experiments/phantom/montage.py"] = "--cases 3"

ENDS_AT = {
    "backbones.py test": "--official PATH: give a checkout of github.com/dyh127/RFNet",
    "backbones.py train": "--official PATH: give a checkout of github.com/dyh127/RFNet",
}
"""The only exceptions: where a command ends that compares with code that is not ours to keep."""

PAGES = sorted([*ROOT.glob("experiments/*/*.md"), *ROOT.glob("docs/results/*.md")])
SPAN = re.compile(r"`([^`]+)`")
PROGRAM = re.compile(r"python (?P<key>experiments/\S+\.py(?: [a-z]+\b)?)")


def spans(page):
    """What stands between single backticks, without brackets and the one thread that all have."""
    for span in SPAN.findall(FENCE.sub("", page.read_text())):
        yield " ".join(re.sub(r"[][]", "", span).split()).removeprefix("OMP_NUM_THREADS=1 ")


INLINE = sorted({span for page in PAGES for span in spans(page) if "python experiments/" in span})


def test_every_program_of_an_experiment_is_shown_and_its_commands_are_whole():
    programs = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("experiments/*/*.py")
        if '__name__ == "__main__"' in path.read_text() and path.name != "__main__.py"
    }
    fenced = {name for name in FEW if name.endswith(".py")}
    assert programs == fenced | {PROGRAM.search(span)["key"].split()[0] for span in INLINE}
    names = tuple(program.rpartition("/")[2] + " " for program in programs)
    assert [span for page in PAGES for span in spans(page) if span.startswith(names)] == []


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two invented cases in the place of real ones, and a coarse one."""
    root = tmp_path_factory.mktemp("scans")
    for spacing, place in {1.5: root / "shared/data/brats2021", 3.0: root / "coarse"}.items():
        cohort = root / str(spacing)
        write_cohort(cohort, 1, 1, PhantomSettings(spacing=spacing))
        for case in ("BraTS2021_00000", "BraTS2021_00031"):
            (place / case).mkdir(parents=True)
            for file in cohort.rglob("*.nii.gz"):
                (place / case / f"{case}_{file.name.split('_')[-1]}").symlink_to(file)
    return root


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", INLINE, ids=lambda command: command[:60])
def test_a_command_in_a_sentence(command, scans, tmp_path):
    work = tmp_path / "work"
    (work / "docs" / "assets").mkdir(parents=True)
    for name in ("shared", "coarse"):
        (tmp_path / name).symlink_to(scans / name)
    key = PROGRAM.search(command)["key"]
    ends = ENDS_AT.get(key.removeprefix(BENCHMARK), "")
    done = run(f"{command} {SMALLEST[key]}", work)
    assert done.returncode == bool(ends), done.stderr[-2000:]
    assert done.stderr.rstrip().endswith(ends)
    assert done.stdout or ends
