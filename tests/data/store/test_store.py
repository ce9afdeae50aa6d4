import errno
import json
import multiprocessing
import os
import pickle
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pmixseg.cli import main
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.cohorts.shares import Share
from pmixseg.data.scans.canonical import canonicalise
from pmixseg.data.store import stored as storing
from pmixseg.data.store.arrays import copy_box
from pmixseg.data.store.store import Store, StoredCase, prepare
from pmixseg.errors import InputError
from pmixseg.task import BRATS, Task
from tests.processes import said_of_a_full_disk


@pytest.fixture
def cohort(make_case):
    return [make_case(f"BraTS2021_0000{i}") for i in range(3)]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "store"


def files_of(folder):
    """Every file with its content, hidden ones too."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def quietly(cases, out, **settings):
    return prepare(cases, out, BRATS, progress=False, **settings)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_read_is_what_was_prepared(cohort, out, dtype, label):
    report = quietly(cohort, out, dtype=dtype)
    assert report.prepared == [c.case_id for c in cohort] and not report.failed
    store = Store.open(out)
    assert store.cases == tuple(report.prepared) and len(store) == 3
    assert store.task == BRATS and store.spacing is None and store.dtype == dtype
    assert store.normalisation == "zscore-own-mask"
    case = cohort[0]
    expected = canonicalise(case.images, case.label, BRATS, case.codes, dtype=dtype)
    stored = store.read(case.case_id)
    assert stored.image.dtype == np.dtype(dtype)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(stored.folder / "image.npy") in maps.read_text()
    assert stored.image.flags.c_contiguous and not stored.image.flags.writeable
    np.testing.assert_array_equal(stored.image, expected.image)
    np.testing.assert_array_equal(stored.label, expected.label)
    assert stored.geometry == expected.geometry and stored.acquired == (True,) * 4
    assert stored.codes == {"NCR": 1, "ED": 2, "ET": 4} and stored.grade is None
    np.testing.assert_array_equal(np.array([0, 1, 2, 4])[stored.native_label()], label)


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (0.8, 1.3, 1.0)])
def test_the_native_label_survives_resampling(cohort, out, spacing, label):
    quietly(cohort[:1], out, spacing=spacing)
    stored = Store.open(out).read(cohort[0].case_id)
    assert stored.label.shape == stored.image.shape[1:] != label.shape
    np.testing.assert_array_equal(np.array([0, 1, 2, 4])[stored.native_label()], label)


def test_a_case_may_lack_modalities_and_label(make_case, out):
    report = quietly([make_case(modalities=("t1", "t2"), labelled=False)], out)
    assert report.unlabelled == ["BraTS2021_00001"] and not report.failed
    assert "without a label, so of no use for training: BraTS2021_00001" in report.summary()
    stored = Store.open(out).read("BraTS2021_00001")
    assert stored.acquired == (False, False, True, True)
    assert stored.label is None and stored.native_label() is None
    assert not stored.image[:2].any() and stored.image[2:].any()


def test_a_store_and_its_cases_travel_without_their_voxels(cohort, out):
    quietly(cohort, out)
    store = Store.open(out)
    stored = store.read(cohort[0].case_id)
    assert store.read(cohort[0].case_id) is stored
    assert len(pickle.dumps(store)) < 4000 and len(pickle.dumps(stored)) < 1000
    again = pickle.loads(pickle.dumps(stored))
    np.testing.assert_array_equal(again.image, stored.image)
    assert pickle.loads(pickle.dumps(store)).read(cohort[1].case_id).case_id == cohort[1].case_id


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_copy_box_is_copy(dtype):
    whole = np.random.default_rng(0).integers(0, 99, (3, 8, 9, 10)).astype(dtype)
    for box in (whole[:, 1:5, 2:4, 3:10], whole[1, :, :, 4:5], whole[:2, 0:0], whole):
        made = copy_box(box)
        np.testing.assert_array_equal(made, box)
        assert made.flags.c_contiguous and made.dtype == dtype
        assert not np.shares_memory(made, whole)


def test_up_to_date_cases_are_kept(cohort, out):
    quietly(cohort[:2], out)
    before = files_of(out)
    report = quietly(cohort, out)
    assert report.kept == [c.case_id for c in cohort[:2]]
    assert report.prepared == [cohort[2].case_id]
    after = files_of(out)
    assert {k: after[k] for k in before} == before


def test_a_changed_source_is_noticed_even_with_its_old_date_and_size(cohort, out, volume):
    quietly(cohort, out)
    path = cohort[1].images["t1"]
    raw, seen = bytearray(path.read_bytes()), path.stat()
    raw[4] ^= 1  # the time stamp in the gzip header: same voxels, other bytes
    path.write_bytes(raw)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    report = quietly(cohort, out)
    assert report.prepared == [cohort[1].case_id] and len(report.kept) == 2


def test_a_changed_layout_or_parameter_is_noticed(cohort, out):
    quietly(cohort, out)
    swapped = replace(cohort[0], codes={"NCR": 2, "ED": 1, "ET": 4})
    assert quietly([swapped], out).prepared == [cohort[0].case_id]
    fewer = replace(cohort[0], images={m: cohort[0].images[m] for m in ("flair", "t1ce")})
    assert quietly([fewer], out).prepared == [cohort[0].case_id]
    assert Store.open(out).read(cohort[0].case_id).acquired == (True, True, False, False)
    for settings in ({"dtype": "float32"}, {"spacing": (2.0, 2.0, 2.0)}, {}):
        assert len(quietly(cohort, out, **settings).prepared) == 3
    # other regions or names for display change no voxel
    other = Task("other", BRATS.modalities, BRATS.labels, {"all": BRATS.labels})
    assert len(prepare(cohort, out, other, progress=False).kept) == 3
    assert Store.open(out).task == other


def test_cases_of_other_parameters_are_not_mixed_in(cohort, out):
    quietly(cohort, out)
    report = quietly(cohort[:1], out, spacing=(2.0, 2.0, 2.0))
    lost = ", ".join(c.case_id for c in cohort[1:])
    assert "no longer used, being prepared with" in report.summary()
    assert f"normalisation: {lost}; prepare them again" in report.summary()
    assert "no longer used" not in quietly(cohort, out, share=Share(1, 2)).summary()
    quietly(cohort[:1], out, spacing=(2.0, 2.0, 2.0))
    store = Store.open(out)
    assert store.cases == (cohort[0].case_id,) and store.spacing == (2.0, 2.0, 2.0)
    with pytest.raises(InputError, match="has no case 'BraTS2021_00001'"):
        store.read(cohort[1].case_id)


@pytest.mark.parametrize("how", ["labels", "layout"])
def test_label_numbers_that_fit_no_case_are_refused_before_a_copy_goes(cohort, out, how, capsys):
    quietly(cohort, out)
    root, before = cohort[0].label.parents[1], files_of(out)
    flags = ["--labels", "NCR=1", "ED=2", "ET=2"]
    if how == "layout":
        layout = out.parent / "mine.yaml"
        layout.write_text("{base: brats2021, codes: {NCR: 1, ED: 2, ET: 2}}")
        flags = ["--layout", str(layout)]
    assert main(["prepare", str(root), str(out), "--workers=0", *flags]) == 1
    assert "must give each of ['NCR', 'ED', 'ET'] a number of its own" in capsys.readouterr().err
    assert files_of(out) == before


def test_one_bad_case_stops_no_other_and_its_old_copy_goes(cohort, out):
    quietly(cohort, out)
    path = cohort[0].images["flair"]
    path.write_bytes(path.read_bytes()[:-100])
    report = quietly(cohort, out)
    assert list(report.failed) == [cohort[0].case_id] and len(report.kept) == 2
    assert "truncated or damaged gzip" in report.failed[cohort[0].case_id]
    *_, line, code = report.summary().splitlines()
    assert line.startswith("left out: case 'BraTS2021_00000': ")
    assert code == "exit code 1: 1 case is not in the store; 2 others can be trained on"
    report = quietly([*cohort[:2], replace(cohort[2], label=None)], out)
    assert report.summary().endswith("1 other can be trained on")
    assert Store.open(out).cases == tuple(c.case_id for c in cohort[1:])


def test_cases_whose_sources_are_gone_are_told_and_pruned_on_demand(cohort, make_case, out):
    other = make_case("BraTS2021_00009")
    quietly([*cohort, other], out)
    before = files_of(out)
    shutil.rmtree(cohort[0].label.parent)
    report = quietly(cohort[1:], out)
    assert (report.gone, report.elsewhere, report.pruned) == (
        [cohort[0].case_id],
        [other.case_id],
        [],
    )
    assert f"their sources are gone: {cohort[0].case_id}; remove" in report.summary()
    assert f"from other folders or under another layout: {other.case_id}" in report.summary()
    assert files_of(out) == before
    report = quietly(cohort[1:], out, prune=True)
    assert (report.gone, report.elsewhere) == ([], [other.case_id])
    assert report.pruned == [cohort[0].case_id]
    assert Store.open(out).cases == (cohort[1].case_id, cohort[2].case_id, other.case_id)
    assert sorted(p.name for p in (out / "cases").iterdir()) == list(Store.open(out).cases)


def test_a_cohort_that_was_moved_is_not_gone(cohort, out, tmp_path):
    root = cohort[0].label.parents[1]
    quietly(find_cases(root, BRATS), out)
    root.rename(tmp_path / "moved")
    moved = find_cases(tmp_path / "moved", BRATS)
    report = quietly(moved, out, prune=True)
    assert report.kept == [c.case_id for c in cohort]
    assert not report.pruned
    report = quietly(moved[1:], out)
    assert (report.gone, report.elsewhere) == ([], [cohort[0].case_id])


def test_a_case_of_another_cohort_is_not_replaced_without_a_word(cohort, out, tmp_path):
    """Two cohorts may number their cases alike."""
    root = cohort[0].label.parents[1]
    shutil.copytree(root, tmp_path / "other")
    flair = find_cases(tmp_path / "other", BRATS)[1].images["flair"].rename(tmp_path / "away")
    for path in (tmp_path / "other").glob("*/*_t2.nii.gz"):
        scan = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(scan.dataobj) * np.float32(2), scan.affine), path)
    assert "replaces" not in quietly(find_cases(root, BRATS), out).summary()
    report = quietly(find_cases(tmp_path / "other", BRATS), out)
    told = [notes for notes in report.notes.values() if "replaces the case" in notes[0]]
    assert len(report.prepared) == len(told) == len(cohort)
    assert f"prepared from {cohort[0].label.parent}, where it still is" in report.summary()
    flair.rename(tmp_path / "other/BraTS2021_00001/BraTS2021_00001_flair.nii.gz")
    report = quietly(find_cases(tmp_path / "other", BRATS), out)  # one sequence more
    assert report.prepared == ["BraTS2021_00001"] and "replaces" not in report.summary()


def test_prune_at_the_command_line(cohort, out, capsys):
    root = cohort[0].label.parents[1]
    assert main(["prepare", str(root), str(out), "--workers=0"]) == 0
    shutil.rmtree(cohort[0].label.parent)
    assert main(["prepare", str(root), str(out), "--workers=0"]) == 0
    assert "--prune" in capsys.readouterr().out
    assert main(["prepare", str(root), str(out), "--workers=0", "--prune"]) == 0
    assert Store.open(out).cases == tuple(c.case_id for c in cohort[1:])


def test_workers_give_the_same_store(cohort, out, tmp_path):
    damaged = replace(cohort[2], problem="case 'BraTS2021_00002': something is wrong.")
    quietly([*cohort[:2], damaged], out)
    report = quietly([*cohort[:2], damaged], tmp_path / "parallel", workers=2)
    assert report.failed == {cohort[2].case_id: damaged.problem}
    assert files_of(tmp_path / "parallel") == files_of(out)


def test_several_processes_at_once_do_not_harm_each_other(cohort, out):
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(3, context) as pool:
        for _ in range(4):
            runs = [pool.submit(quietly, cohort, out) for _ in range(3)]
            assert all(not run.result().failed for run in runs)
            store = Store.open(out)
            assert len(store) == 3
            for name in store.cases:
                assert store.read(name).image.any()
            # from nothing, and over existing copies of other parameters
            pool.submit(quietly, cohort, out, dtype="float32").result()
    assert not [p for p in (out / "cases").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("at", ["image.npy", "label.npy", "meta.json", "rename"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_interrupted_or_full_leaves_no_half_case(cohort, out, monkeypatch, at, stop):
    quietly(cohort[:1], out)
    before = files_of(out)
    count = {"writes": 0}

    def break_at(place, original):
        def work(*arguments):
            if at in str(place(arguments)):
                count["writes"] += 1
                if count["writes"] == 2:  # the second case
                    raise stop
            return original(*arguments)

        return work

    write, text = storing.write_array, storing.Path.write_text
    monkeypatch.setattr(storing, "write_array", break_at(lambda a: a[0], write))
    monkeypatch.setattr(
        storing.Path, "write_text", lambda *a, **k: break_at(lambda b: b[0], text)(*a)
    )
    monkeypatch.setattr(storing, "_publish", break_at(lambda a: "rename", storing._publish))
    with pytest.raises((KeyboardInterrupt, InputError)) as caught:
        quietly(cohort, out)
    if not isinstance(stop, type):
        assert "the disk is full; free space or name a store on another disk" in str(caught.value)
    after = files_of(out)
    assert {k: after[k] for k in before} == before
    assert Store.open(out).cases == (cohort[0].case_id, cohort[1].case_id)
    assert sorted(p.name for p in (out / "cases").iterdir()) == list(Store.open(out).cases)
    monkeypatch.undo()
    assert quietly(cohort, out).prepared == [cohort[2].case_id], "goes on where it stopped"


def test_a_really_full_disk_is_one_sentence(cohort, tmp_path):
    """A file size limit gives the operating system's own error, not a mocked one."""
    said = said_of_a_full_disk(lambda: quietly(cohort, tmp_path / "s"))
    assert "the store cannot be written" in said
    assert not list((tmp_path / "s" / "cases").iterdir())


def test_half_written_folders_are_never_read_and_old_ones_go(cohort, out):
    quietly(cohort[:2], out)
    with (out / "cases" / cohort[0].case_id / "image.npy").open("r+b") as file:
        file.truncate(1000)  # a power cut after the rename
    assert Store.open(out).cases == (cohort[1].case_id,)
    left = out / "cases" / f".{cohort[2].case_id}-abc"
    fresh = out / "cases" / f".{cohort[2].case_id}-def"
    left.mkdir()
    fresh.mkdir()
    os.utime(left, (time.time() - 7200,) * 2)
    report = quietly(cohort[:2], out)
    assert report.prepared == [cohort[0].case_id] and report.kept == [cohort[1].case_id]
    assert not left.exists() and fresh.exists()
    assert Store.open(out).cases == (cohort[0].case_id, cohort[1].case_id)


def test_an_older_format_is_done_again(cohort, out, monkeypatch):
    quietly(cohort[:1], out)
    path = out / "cases" / cohort[0].case_id / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
    assert Store.open(out).cases == ()
    assert quietly(cohort[:1], out).prepared
    description = json.loads((out / "store.json").read_text())
    (out / "store.json").write_text(json.dumps({**description, "format": 99}))
    with pytest.raises(InputError, match="store format 99, but this version reads 2"):
        Store.open(out)


def test_what_is_no_store_or_cannot_become_one_is_refused(cohort, tmp_path):
    with pytest.raises(InputError, match="is not a prepared store"):
        Store.open(tmp_path)
    for damaged in (b"{", b"[]", b"\xff\x80"):
        (tmp_path / "store.json").write_bytes(damaged)
        with pytest.raises(InputError, match=r"store\.json is damaged or was edited"):
            Store.open(tmp_path)
    root = cohort[0].label.parents[1]
    with pytest.raises(InputError, match="holds files and is no store"):
        quietly(cohort, root)
    with pytest.raises(InputError, match="dtype is 'int8'; give float16 or float32"):
        quietly(cohort, tmp_path / "s", dtype="int8")
    with pytest.raises(InputError, match="measure 1 x 0 x 1 mm"):
        quietly(cohort, tmp_path / "s", spacing=(1.0, 0.0, 1.0))
    with pytest.raises(InputError, match="two cases are called 'BraTS2021_00000'"):
        quietly([cohort[0], cohort[0]], tmp_path / "s")
    with pytest.raises(InputError, match="there is no case"):
        quietly([], tmp_path / "s")
    for name in ("../up", "...", "x" * 256):
        report = quietly([replace(cohort[0], case_id=name), cohort[1]], tmp_path / "s")
        assert "cannot name a file or folder" in report.failed[name], name
        assert report.prepared or report.kept, "one bad name stops no other"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the store cannot be written"):
        quietly(cohort, tmp_path / "file" / "store")
    with pytest.raises(InputError, match="holds no complete prepared case"):
        StoredCase.open(tmp_path)


@pytest.mark.real
def test_real_cohort_at_two_millimetres(real_root, out):
    cases = find_cases(real_root, BRATS)[:2]
    report = quietly(cases, out, spacing=(2.0, 2.0, 2.0))
    assert len(report.prepared) == 2 and not report.failed and not report.unlabelled
    for case in cases:
        stored = Store.open(out).read(case.case_id)
        assert stored.geometry.grid_spacing == (2.0, 2.0, 2.0)
        assert stored.image.shape[1:] == stored.geometry.box().shape
        truth = np.asarray(nib.load(case.label).dataobj)
        np.testing.assert_array_equal(np.array([0, 1, 2, 4])[stored.native_label()], truth)
        # the coarse label, brought back, is the source up to its own border
        coarse = stored.geometry.to_source(stored.label, stored.geometry.box(), order=0)
        overlap = 2 * ((coarse > 0) & (truth > 0)).sum() / ((coarse > 0).sum() + (truth > 0).sum())
        assert overlap > 0.95


@pytest.mark.real
def test_real_case_at_its_own_resolution(real_root, out):
    case = find_cases(real_root, BRATS)[3]
    quietly([case], out)
    stored = Store.open(out).read(case.case_id)
    assert stored.geometry.source_shape == (240, 240, 155) and not stored.geometry.resampled
    back = np.array([0, *(stored.codes[n] for n in BRATS.labels)])[stored.native_label()]
    np.testing.assert_array_equal(back, np.asarray(nib.load(case.label).dataobj))
    for channel in stored.image:
        inside = channel[channel != 0].astype(np.float64)
        assert abs(inside.mean()) < 2e-3 and abs(inside.std() - 1) < 2e-3
