"""Shares of a cohort, and several machines on one store: no case lost, none double."""

import multiprocessing
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from pmixseg.cli import main
from pmixseg.data.cohorts.shares import Share
from pmixseg.data.store.store import Store, prepare
from pmixseg.data.store.stored import ORIGIN
from pmixseg.errors import InputError
from pmixseg.task import BRATS
from tests.data.store.test_store import files_of

PARTS = 3


@pytest.fixture
def cases(make_case):
    return [make_case(f"BraTS2021_0000{n}") for n in range(5)]


@pytest.fixture
def whole(cases, tmp_path):
    """The store that one process makes."""
    prepare(cases, tmp_path / "whole", BRATS, progress=False)
    return tmp_path / "whole"


def work(cases, out, number):
    return prepare(cases, out, BRATS, progress=False, share=Share(number, PARTS))


def test_parts_at_the_same_time_make_the_store_that_one_process_makes(cases, whole, tmp_path):
    context = multiprocessing.get_context("fork")
    out = tmp_path / "store"
    with ProcessPoolExecutor(PARTS, context) as pool:
        jobs = [pool.submit(work, cases, out, n) for n in (1, 2, 3)]
        reports = [job.result() for job in jobs]
    done = [name for report in reports for name in report.prepared]
    assert sorted(done) == [c.case_id for c in cases], "none lost, none double"
    assert not any(r.failed or r.kept or r.gone or r.elsewhere for r in reports)
    assert Store.open(out).cases == Store.open(whole).cases
    assert files_of(out) == files_of(whole)


def test_a_part_judges_its_cases_beside_all_others(cases, tmp_path, monkeypatch):
    """Which case has no orientation among others that have one is asked of the whole cohort."""
    seen = []
    monkeypatch.setattr(
        "pmixseg.data.store.prepare.odd_ones_out",
        lambda all_: seen.append(len(all_)) or frozenset(),
    )
    work(cases, tmp_path / "store", 2)
    assert seen == [len(cases)]


def test_a_part_prunes_nothing_of_the_others(cases, tmp_path):
    out = tmp_path / "store"
    work(cases, out, 1)
    report = prepare(cases, out, BRATS, progress=False, share=Share(2, PARTS), prune=True)
    assert not report.pruned and not report.gone and not report.elsewhere
    assert len(Store.open(out)) == 4


def test_a_case_that_another_process_is_writing_is_not_told(cases, whole):
    out = whole
    shutil.copytree(out / "cases" / cases[0].case_id, out / "cases" / ".part-x")
    (out / "cases" / ".part-x" / ORIGIN).write_text("gone")
    report = prepare(cases, out, BRATS, progress=False, prune=True)
    assert not report.gone and not report.elsewhere and not report.pruned
    assert (out / "cases" / ".part-x").is_dir()


def test_a_store_that_another_process_is_just_making_is_a_store(cases, tmp_path, monkeypatch):
    """Its description is written between two looks of this process."""
    out = tmp_path / "store"
    out.mkdir()
    ready = tmp_path / "ready"
    prepare(cases[:1], ready, BRATS, progress=False)
    list_folder, exists = Path.iterdir, Path.exists

    def make():
        if not exists(out / "store.json"):
            shutil.copytree(ready, out, dirs_exist_ok=True)

    def listing(path):
        if path == out:
            make()
        return list_folder(path)

    def there(path, **rest):
        answer = exists(path, **rest)
        if path == out / "store.json":
            make()
        return answer

    monkeypatch.setattr(Path, "iterdir", listing)
    monkeypatch.setattr(Path, "exists", there)
    assert prepare(cases[:2], out, BRATS, progress=False).kept == [cases[0].case_id]


def test_two_commands_prepare_a_share_each(cases, tmp_path, capsys):
    root, out = cases[0].label.parents[1], tmp_path / "store"
    for part, count in {"1/2": 3, "2/2": 2}.items():
        assert main(["prepare", str(root), str(out), "--workers=0", f"--part={part}"]) == 0
        assert f"{count} prepared, 0 up to date, 0 left out" in capsys.readouterr().out
    assert len(Store.open(out)) == 5
    assert main(["prepare", str(root), str(out), "--part=3/2"]) == 1
    assert "part 3/2 does not exist; count from 1/2 to 2/2" in capsys.readouterr().err


def test_a_share_may_be_empty_but_no_cohort(cases, tmp_path):
    report = prepare(cases[:2], tmp_path / "s", BRATS, progress=False, share=Share(3, 3))
    assert not report.prepared and not report.failed
    with pytest.raises(InputError, match="there is no case"):
        prepare([], tmp_path / "s", BRATS, progress=False, share=Share(1, 3))


@pytest.mark.parametrize(("cases", "total"), [(8, 3), (1, 4), (7, 7), (20, 1), (0, 2)])
def test_shares_divide_a_cohort_without_loss(cases, total):
    names = [f"case{n:03d}" for n in range(cases)]
    shares = []
    for number in range(1, total + 1):
        random.Random(number).shuffle(names)  # machines may list a folder in different orders
        shares.append(Share(number, total).of(names))
    assert sorted(name for share in shares for name in share) == sorted(names)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_share_is_every_nth_case_by_name():
    assert Share.parse("2/3").of(["e", "a", "d", "b", "c"]) == ["b", "e"]
    assert str(Share.parse(" 2/3 ")) == "2/3"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0/3", "count from 1/3 to 3/3"),
        ("4/3", "count from 1/3 to 3/3"),
        ("1/0", "count from 1/1 to 1/1"),
        ("2", "not of the form 2/8"),
        ("-1/3", "not of the form 2/8"),
        ("a/b", "not of the form 2/8"),
        ("", "not of the form 2/8"),
    ],
)
def test_a_share_that_does_not_exist_is_refused(text, says):
    with pytest.raises(InputError, match=says):
        Share.parse(text)
