"""The quickstart in small: the same path with fewer and coarser cases and hardly any steps."""

import re
import shutil
import warnings

import pytest

from pmixseg import quickstart
from pmixseg.cli import main
from pmixseg.data.store.store import Store
from pmixseg.errors import InputError
from pmixseg.evaluation.records.records import Records
from tests.evaluation.made_up import figures_left_empty

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {
        "CASES": 5,
        "SPACING": 6.0,
        "WORKERS": 0,
        "PATCH": (32, 40, 32),  # one window holds a whole brain
        "WIDTH": 4,
        "TEACHER_STEPS": 2,
        "STUDENT_STEPS": 1,
    }.items():
        monkeypatch.setattr(quickstart, name, value)
    monkeypatch.setattr("pmixseg.cli.commands.start_server", lambda modules: None)
    monkeypatch.setenv("PL_TRAINER_NUM_SANITY_VAL_STEPS", "0")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, capsys):
    (tmp_path / "afile").touch()
    out = tmp_path / "afile" / "x"
    assert main(["quickstart", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"pmixseg: {out} cannot be read or written (Not a directory); correct")


def test_phantom_then_again_from_the_same_store(tmp_path, capsys, monkeypatch):
    out = tmp_path / "q"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # ours are such
        assert main(["quickstart", "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "student-aligned" in page and "student-unaligned" in page
    assert not re.search(r"(src|href)=[\"']https?://", page), "the page loads something"
    section = page[page.index("Gap between sequences") :].partition("</section>")[0]
    for text in ("student-aligned", "student-unaligned", "Rank within", "Decodability"):
        assert text in section, text
    for arm in ("aligned", "unaligned"):
        table = Records.read(out / "runs" / f"student-{arm}").table
        assert table.combination.nunique() == 15 and set(table.region) == {"WT", "TC", "ET"}
    stamps = {p: p.stat().st_mtime_ns for p in sorted((out / "store").rglob("*.npy"))}
    assert stamps
    monkeypatch.setattr(quickstart, "ARMS", quickstart.ARMS[1:])
    monkeypatch.setattr(quickstart, "can_measure_gap", lambda data: False)
    with figures_left_empty():
        assert main(["quickstart", "--out", str(out)]) == 0
    assert {p: p.stat().st_mtime_ns for p in sorted((out / "store").rglob("*.npy"))} == stamps
    assert len(Records.read(out / "runs" / "student-aligned").table) == len(table)
    assert "research use only" in capsys.readouterr().out.lower()


def test_a_cohort_of_ones_own(phantom_root, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "ARMS", (quickstart.UNALIGNED,))
    monkeypatch.setattr(quickstart, "can_measure_gap", lambda data: False)
    with figures_left_empty():
        assert main(["quickstart", "--data", str(phantom_root), "--out", str(tmp_path / "q")]) == 0
    assert (tmp_path / "q" / "report.html").stat().st_size > 10_000
    assert not (tmp_path / "q" / "cohort").exists()


def test_two_cohorts_are_not_mixed(phantom_root, tmp_path):
    cases = sorted((phantom_root / "HGG").iterdir())[:4]
    for name, own in (("one", cases[:2]), ("two", cases[2:])):
        for folder in own:  # names of its own
            home = tmp_path / name / "HGG" / folder.name.replace("PHANTOM", name)
            home.mkdir(parents=True)
            for file in folder.iterdir():
                shutil.copy(file, home / file.name.replace("PHANTOM", name))
    quickstart.prepare_cohort(tmp_path / "one", tmp_path / "store")
    with pytest.raises(InputError, match=r"holds 2 cases that are not under .*two, such as"):
        quickstart.prepare_cohort(tmp_path / "two", tmp_path / "store")
    shutil.rmtree(tmp_path / "one")
    quickstart.prepare_cohort(tmp_path / "two", tmp_path / "store")
    assert all("_two_" in name for name in Store.open(tmp_path / "store").cases)


def test_a_missing_cohort_is_one_sentence(tmp_path, capsys):
    assert main(["quickstart", "--data", str(tmp_path / "no"), "--out", str(tmp_path / "q")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
