"""A store proves what it reads, holds few files open, and leaves nothing running."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pmixseg.cli import main
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.patches import CaseDataset, PatchDataset
from pmixseg.data.store.arrays import open_maps
from pmixseg.data.store.store import Store, prepare
from pmixseg.data.store.stored import read_meta, seal, unseal
from pmixseg.errors import InputError
from pmixseg.modules.checkpoint import read_checkpoint
from pmixseg.task import BRATS


@pytest.fixture
def case(make_case):
    return make_case()


@pytest.fixture
def store(case, tmp_path):
    prepare([case], tmp_path / "store", BRATS, progress=False)
    return tmp_path / "store"


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["image.npy", "label.npy"])
@pytest.mark.parametrize("at", [0, 7, 9, 20, 45, 60, 70])
def test_a_flipped_bit_in_the_header_of_an_array_is_one_sentence(store, case, name, at):
    flip(store / "cases" / case.case_id / name, at)
    stored = Store.open(store).read(case.case_id)
    with pytest.raises(InputError, match="run `pmixseg prepare` on its store again"):
        getattr(stored, name.removesuffix(".npy"))
    report = prepare([case], store, BRATS, progress=False)
    assert report.prepared == [case.case_id], "it is not up to date"


@pytest.mark.parametrize("name", ["image.npy", "label.npy"])
def test_a_flipped_bit_in_a_voxel_is_not_up_to_date(store, case, name):
    flip(store / "cases" / case.case_id / name, -30)
    assert prepare([case], store, BRATS, progress=False).prepared == [case.case_id]
    assert prepare([case], store, BRATS, progress=False).kept == [case.case_id]


@pytest.mark.parametrize("name", ["image.npy", "label.npy"])
def test_a_whole_case_is_proved_before_it_is_scored(store, case, name):
    """One bit of one voxel, or another case's array of the same size, changes a published score."""
    dataset = CaseDataset(Store.open(store), [case.case_id])
    assert dataset[0]["case_id"] == case.case_id
    flip(store / "cases" / case.case_id / name, -30)
    dataset[0]  # proved once, when it was read first
    with pytest.raises(InputError, match=r"holds other arrays than were written; run `pmixseg"):
        CaseDataset(Store.open(store), [case.case_id])[0]


@pytest.mark.parametrize("name", ["image.npy", "label.npy"])
def test_a_training_proves_a_case_in_its_first_epoch(store, case, name):
    flip(store / "cases" / case.case_id / name, -30)
    with pytest.raises(InputError, match=r"holds other arrays than were written; run `pmixseg"):
        PatchDataset(Store.open(store), [case.case_id], (8, 8, 8))[3, 0]  # as one that is resumed


@pytest.mark.parametrize("damage", ["meta.json", "image.npy", "label.npy"])
def test_a_case_that_cannot_be_used_is_told(make_case, tmp_path, damage):
    cases = [make_case(f"case_{i}") for i in range(3)]
    prepare(cases, tmp_path / "store", BRATS, progress=False)
    data = BraTSDataModule(store=tmp_path / "store", patch_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(data.cases) == 3
    path = tmp_path / "store" / "cases" / "case_1" / damage
    path.write_bytes(path.read_bytes()[:-1])
    data = BraTSDataModule(store=tmp_path / "store", patch_size=8)
    with pytest.warns(UserWarning, match=r"1 case of the store is damaged, .* left out \(case_1\)"):
        assert data.cases == ("case_0", "case_2")


def test_a_case_that_was_copied_or_renamed_in_the_store_is_none(store, case):
    """It would count twice, or be a KeyError of the split."""
    folder = store / "cases" / case.case_id
    shutil.copytree(folder, folder.with_name("copy"))
    opened = Store.open(store)
    assert (opened.cases, opened.unlisted) == ((case.case_id,), ("copy",))


def test_an_edited_meta_json_is_no_case(store, case):
    path = store / "cases" / case.case_id / "meta.json"
    text = path.read_text()
    for old, new in (('"ED": 2', '"ED": 1'), ('"patient": "B', '"patient": "C'), ("240", "241")):
        if old in text:
            path.write_text(text.replace(old, new))
            assert Store.open(store).cases == () and read_meta(path.parent) is None
    path.write_text("[" * 100_000)
    assert Store.open(store).cases == ()
    assert prepare([case], store, BRATS, progress=False).prepared


@pytest.mark.parametrize("text", ["{}", "[" * 100_000, "null", '{"format": []}', "\x00", "[1]"])
def test_a_damaged_store_json_is_one_sentence(store, case, text):
    (store / "store.json").write_text(text)
    with pytest.raises(InputError, match=r"store.json is damaged or was edited"):
        Store.open(store)
    assert prepare([case], store, BRATS, progress=False).kept == [case.case_id]


def test_a_sealed_file_says_what_was_written(tmp_path):
    facts = {"b": [1, 2.5, None, "ü"], "a": {"x": True}}
    (tmp_path / "f.json").write_text(seal(facts))
    assert unseal(tmp_path / "f.json") == facts
    other = json.loads((tmp_path / "f.json").read_text())
    (tmp_path / "f.json").write_text(json.dumps({**other, "b": [1, 2, None, "ü"]}))
    assert unseal(tmp_path / "f.json") is None


# ------------------------------------------------------------------- open files


def many_cases(store, case, count):
    """Copies of one prepared case under other names."""
    first = store / "cases" / case.case_id
    meta = unseal(first / "meta.json")
    for index in range(count):
        folder = store / "cases" / f"copy_{index:04}"
        folder.mkdir()
        for name in ("image.npy", "label.npy"):
            os.link(first / name, folder / name)
        facts = {**meta, "case_id": folder.name, "patient": folder.name}
        (folder / "meta.json").write_text(seal(facts))


@contextmanager
def few_open_files(most):
    """A limit of the system within, of which hardly any is left open behind."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    try:
        yield
        assert len(list(Path("/proc/self/fd").iterdir())) - before <= 8
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_cohort_of_2000_cases_is_read_with_few_open_files(store, case):
    many_cases(store, case, 2000)
    with few_open_files(1024):
        data = BraTSDataModule(store=store, patch_size=8, batch_size=4, augmentation=False)
        data.setup("fit")
        batches = sum(len(batch["case_id"]) for batch in data.train_dataloader())
        assert batches >= 1400 and len(data.cases) == 2001


def test_a_training_needs_fewer_open_files_than_cases(store, case):
    many_cases(store, case, 200)
    with few_open_files(256):
        flags = ["--data.patch_size=8", "--data.batch_size=80", "--data.augmentation=false"]
        flags += ["--model.backbone=MultiEncoderUNet", "--model.backbone.width=1"]
        flags += ["--model.backbone.levels=2", "--trainer.max_epochs=1", "--data.val_cases=1"]
        flags += ["--trainer.accelerator=cpu", "--trainer.limit_val_batches=0"]
        flags += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        assert main(["fit", f"--data.store={store}", f"--run={store.parent}/run", *flags]) == 0
        made = read_checkpoint(store.parent / "run" / "checkpoints" / "last.ckpt")["global_step"]
        assert made == 2  # so every training case was read, and 400 arrays


def test_an_array_outlives_its_place_among_the_open_maps(store, case):
    many_cases(store, case, 5)
    opened = Store.open(store)
    opened._maps = open_maps(limit=2)
    first = opened.read(case.case_id)
    image, copy = first.image, np.array(first.image)
    for name in opened.cases:
        assert opened.read(name).image.shape == image.shape
    assert opened._maps.cache_info().currsize == 2
    np.testing.assert_array_equal(image, copy)
    np.testing.assert_array_equal(opened.read(case.case_id).image, copy)


@pytest.mark.parametrize("name", ["image", "label"])
def test_what_is_read_cannot_be_written_to(store, case, name):
    array = getattr(Store.open(store).read(case.case_id), name)
    with pytest.raises(ValueError, match="read-only"):
        array[:] = 0


@pytest.mark.parametrize("name", ["image.npy", "label.npy"])
def test_an_array_that_is_cut_or_gone_after_opening_is_one_sentence(store, case, name):
    stored = Store.open(store).read(case.case_id)
    path = stored.folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="prepare` on its store again"):
        stored.image, stored.label  # noqa: B018  # reading is what is tried
    path.unlink()
    with pytest.raises(InputError, match=r"No such file.*prepare` on its store again"):
        stored.image, stored.label  # noqa: B018  # reading is what is tried


# ------------------------------------------------------------------- processes


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_prepare_leaves_no_worker(make_case, tmp_path):
    case = make_case()
    for index in range(30):
        shutil.copytree(case.label.parent, tmp_path / "cohort" / f"x{index}")
        for path in (tmp_path / "cohort" / f"x{index}").iterdir():
            path.rename(path.with_name(path.name.replace(case.case_id, f"x{index}")))
    mark = f"PMIXSEG_TEST_MARK={os.getpid()}-{time.time_ns()}"
    name, _, value = mark.partition("=")
    process = subprocess.Popen(
        [sys.executable, "-m", "pmixseg", "prepare", "cohort", "store", "--workers", "2"],
        cwd=tmp_path,
        env={**os.environ, name: value, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    cases = tmp_path / "store" / "cases"
    _until(lambda: cases.is_dir() and any(cases.iterdir()), 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert _until(lambda: not _processes_with(mark), 20), "workers are still there"


def _until(condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def _processes_with(mark):
    alive = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                alive.append(int(folder.name))
        except OSError:
            continue
    return alive


# ------------------------------------------------------------------- names


def test_names_as_long_as_names_can_be(make_case, tmp_path):
    case, long = make_case(), "n" * 255
    report = prepare([case, replace(case, case_id=long)], tmp_path / "store", BRATS, progress=False)
    assert sorted(report.prepared) == sorted([case.case_id, long])


def test_hidden_and_odd_folders_are_told(make_case, tmp_path, capsys):
    case = make_case(name="x1")
    for name in ("...", ".hidden"):
        folder = case.label.parents[1] / name
        shutil.copytree(case.label.parent, folder)
        for path in folder.iterdir():
            path.rename(path.with_name(path.name.replace(case.case_id, name)))
    code = main(["inspect", str(tmp_path / "cohort")])
    told = capsys.readouterr().out
    assert ".hidden" in told and "..." in told and code == 1
    assert main(["prepare", str(tmp_path / "cohort"), str(tmp_path / "s"), "--workers", "0"]) == 1
    told = capsys.readouterr().out
    assert "1 prepared" in told and "case '...'" in told and ".hidden" in told


def test_names_that_are_no_utf_8_stop_no_other_case(make_case, tmp_path, capsys):
    case = make_case()
    name = os.fsdecode(b"f\xe4lle")
    odd = tmp_path / "cohort" / name
    odd.mkdir()
    for role in ("t1", "t2"):
        shutil.copy(case.images[role], odd / f"{name}_{role}.nii.gz")
    assert main(["inspect", str(tmp_path / "cohort")]) == 1
    told = capsys.readouterr().out
    assert "no UTF-8" in told and "\\xe4" in told
    assert main(["prepare", str(tmp_path / "cohort"), str(tmp_path / "s"), "--workers", "0"]) == 1
    assert "1 prepared" in capsys.readouterr().out


SCRIPT = """
import sys, pmixseg
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.store.prepare import prepare
from pmixseg.task import BRATS
try:
    prepare(find_cases(sys.argv[1], BRATS), sys.argv[2], BRATS, workers=1, progress=False)
except pmixseg.InputError as error:
    print("SAID", error)
"""


def test_a_script_without_a_main_guard(phantom_root, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(phantom_root), str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "under `if __name__ == '__main__':`" in done.stdout.split("SAID")[-1], done.stderr
    assert "Traceback" not in done.stderr
