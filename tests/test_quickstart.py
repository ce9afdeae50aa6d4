"""The quickstart in small: the same path with fewer and coarser cases and hardly any steps."""

import re
import shutil

import pytest

from pmixseg import quickstart
from pmixseg.cli import main
from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
from pmixseg.data.store.store import Store
from pmixseg.errors import InputError
from pmixseg.evaluation.records.records import Records

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {
        "CASES": 7,
        "SPACING": 6.0,
        "WORKERS": 0,
        "PATCH": (24, 32, 24),
        "WIDTH": 4,
        "TEACHER_STEPS": 2,
        "STUDENT_STEPS": 1,
    }.items():
        monkeypatch.setattr(quickstart, name, value)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, capsys):
    (tmp_path / "afile").touch()
    out = tmp_path / "afile" / "x"
    assert main(["quickstart", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"pmixseg: {out} cannot be read or written (Not a directory); correct")


def test_phantom_then_again_from_the_same_store(tmp_path, capsys, monkeypatch):
    out = tmp_path / "q"
    assert main(["quickstart", "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "student-aligned" in page and "student-unaligned" in page
    assert not re.search(r"(src|href)=[\"']https?://", page), "the page loads something"
    for arm in ("aligned", "unaligned"):
        table = Records.read(out / "runs" / f"student-{arm}").table
        assert table.combination.nunique() == 15 and set(table.region) == {"WT", "TC", "ET"}
    stamps = {p: p.stat().st_mtime_ns for p in sorted((out / "store").rglob("*.npy"))}
    assert stamps
    # The aligned arm alone: what the other left is its reference.
    monkeypatch.setattr(quickstart, "ARMS", quickstart.ARMS[1:])
    assert main(["quickstart", "--out", str(out)]) == 0
    assert {p: p.stat().st_mtime_ns for p in sorted((out / "store").rglob("*.npy"))} == stamps
    assert len(Records.read(out / "runs" / "student-aligned").table) == len(table)
    assert "research use only" in capsys.readouterr().out.lower()


def test_a_cohort_of_ones_own(phantom_root, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "ARMS", (quickstart.UNALIGNED,))
    assert main(["quickstart", "--data", str(phantom_root), "--out", str(tmp_path / "q")]) == 0
    assert (tmp_path / "q" / "report.html").stat().st_size > 10_000
    assert not (tmp_path / "q" / "cohort").exists()


def test_two_cohorts_are_not_mixed(tmp_path):
    for name, seed in (("one", 3), ("two", 4)):
        settings = PhantomSettings(spacing=6.0)
        made = write_cohort(tmp_path / name, 2, seed, settings)
        for folder in (tmp_path / name / "HGG").iterdir():  # names of its own
            for file in folder.iterdir():
                file.rename(file.with_name(file.name.replace("PHANTOM", name)))
            folder.rename(folder.with_name(folder.name.replace("PHANTOM", name)))
        assert len(made) == 2
    quickstart.prepare_cohort(tmp_path / "one", tmp_path / "store")
    with pytest.raises(InputError, match=r"holds 2 cases that are not under .*two, such as"):
        quickstart.prepare_cohort(tmp_path / "two", tmp_path / "store")
    shutil.rmtree(tmp_path / "one")
    quickstart.prepare_cohort(tmp_path / "two", tmp_path / "store")
    assert all("_two_" in name for name in Store.open(tmp_path / "store").cases)


def test_a_missing_cohort_is_one_sentence(tmp_path, capsys):
    assert main(["quickstart", "--data", str(tmp_path / "no"), "--out", str(tmp_path / "q")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
