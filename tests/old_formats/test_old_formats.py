"""What version 2ddf8fe wrote is read: checkpoint, store, records and YAML.

``2ddf8fe.zip`` holds what that version wrote of a phantom cohort of ten cases at 6 mm; nothing in
it is of a patient:

* ``runs/student/``: a student of two channels, trained for one epoch and tested. ``last.ckpt`` is
  of checkpoint format 1, with class paths by module; configuration, metrics and records beside it.
* ``store/``: two of the ten cases.
* ``settings.yaml``: the file for ``fit -c``, with class paths of modules that have moved since.
"""

import importlib
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from pmixseg.cli import main
from pmixseg.data.missing import Bernoulli
from pmixseg.data.store.store import Store
from pmixseg.evaluation.records.records import Records
from pmixseg.losses.anchors import MixtureAnchor
from pmixseg.modules import StudentModule, load
from pmixseg.modules.checkpoint import read_checkpoint
from pmixseg.old_paths import MOVED
from tests.cli.presets import QUIET

ARCHIVE = Path(__file__).with_name("2ddf8fe.zip")
CHECKPOINT = Path("runs/student/checkpoints/last.ckpt")
CASES = ("Brats18_PHANTOM_004_1", "Brats18_PHANTOM_005_1")
LARGE_WINDOW = ["--model.evaluation.window=[24,24,24]", "--trainer.num_sanity_val_steps=0"]
"""Validation in windows of a patch of 8 voxels would be most of a test's time."""


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A folder with the old run and store, as relative paths of its config say."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    checkpoints = tmp_path / CHECKPOINT.parent
    shutil.copytree(checkpoints, tmp_path / "runs" / "teacher" / "checkpoints")
    for part, case in zip(("train", "val"), CASES, strict=True):
        (tmp_path / f"{part}.txt").write_text(f"{case}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SPLIT = ["--data.split=SplitFiles", "--data.split.train=train.txt", "--data.split.val=val.txt"]


def test_the_checkpoint_names_modules_that_have_moved_or_may_move(old):
    payload = torch.load(CHECKPOINT, weights_only=True)["pmixseg"]
    assert payload["class_path"] == "pmixseg.modules.student.StudentModule"
    assert payload["init_args"]["anchor"]["class_path"] == "pmixseg.losses.anchors.MixtureAnchor"


def test_the_checkpoint_loads(old):
    module = load(CHECKPOINT)
    assert isinstance(module, StudentModule)
    assert isinstance(module.anchor, MixtureAnchor)
    assert isinstance(module.sampler, Bernoulli)
    assert module.evaluation.overlap == 0.25
    assert module.evaluation.conventions.hd95 == "nan"
    state = read_checkpoint(CHECKPOINT)["state_dict"]
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_the_checkpoint_is_tested_as_it_was(old, capsys):
    (old / "test.txt").write_text(f"{CASES[1]}\n")
    split = ["--data.split=SplitFiles", "--data.split.test=test.txt"]
    checkpoint = "--ckpt_path=runs/student/checkpoints/last.ckpt"
    # Windows of the checkpoint's patch of 8 voxels, many at once: one by one they take long.
    flags = ["--data.store=store", "--run=again", "--model.evaluation.batch_size=64"]
    assert main(["test", checkpoint, *flags, *split, *QUIET]) == 0
    was, now = (Records.read(run).table for run in ("runs/student", "again"))
    key = ["case", "combination", "region"]
    both = was.merge(now, on=key, suffixes=("_was", "_now"))
    assert len(both) == 45  # one case, 15 combinations, 3 regions
    np.testing.assert_allclose(both["dice_was"], both["dice_now"], atol=1e-6)


def test_a_training_is_resumed(old):
    teacher = ["--distill.weight=1", "--distill.teacher=runs/teacher/checkpoints/last.ckpt"]
    flags = ["--run=runs/student", "--ckpt_path=runs/student/checkpoints/last.ckpt"]
    flags += ["--trainer.max_epochs=2", "--align.weight=0.1", "--data.store=store"]
    flags += ["--data.patch_size=8", "--data.batch_size=1", "--align.distance=nmse"]
    flags += ["-c", "settings.yaml", *SPLIT, *LARGE_WINDOW, *QUIET]
    assert main(["fit", *flags, *teacher]) == 0
    checkpoint = read_checkpoint("runs/student/checkpoints/last.ckpt")
    assert checkpoint["epoch"] == 1
    assert checkpoint["pmixseg"]["class_path"] == "pmixseg.StudentModule"


def test_scans_are_segmented(old):
    scan = np.zeros((24, 24, 24), np.int16)
    scan[4:20, 4:20, 4:20] = np.random.default_rng(0).integers(100, 900, (16, 16, 16))
    nib.save(nib.Nifti1Image(scan, np.diag([6.0, 6.0, 6.0, 1.0])), "p_t1.nii.gz")
    flags = ["--t1=p_t1.nii.gz", "-o", "out", "--device=cpu", "--force"]
    assert main(["segment", "runs/student/checkpoints/last.ckpt", *flags]) == 0
    assert nib.load("out/p_seg.nii.gz").shape == scan.shape


def test_the_run_is_trained_anew_from_its_configuration(old):
    config = "runs/student/config.yaml"
    flags = ["--run=anew", "--trainer.limit_train_batches=1", *SPLIT]
    assert main(["fit", "-c", config, *flags, *LARGE_WINDOW, *QUIET]) == 0
    written = yaml.safe_load(Path("anew/config.yaml").read_text())
    assert written["model"]["init_args"]["evaluation"]["conventions"]["hd95"] == "nan"


def test_a_file_with_old_class_paths_is_accepted(old):
    settings = yaml.safe_load(Path("settings.yaml").read_text())
    path = settings["model"]["init_args"]["evaluation"]["class_path"]
    assert path.rpartition(".")[0] in MOVED
    flags = ["-c", "settings.yaml", "--data.store=store", "--run=anew"]
    flags += ["--data.patch_size=8", "--data.batch_size=1", "--trainer.max_epochs=1", *SPLIT]
    assert main(["fit", *flags, *LARGE_WINDOW, *QUIET]) == 0
    module = load("anew/checkpoints/last.ckpt")
    assert module.evaluation.overlap == 0.25


def test_the_store_is_read(old):
    store = Store.open("store")
    assert store.cases == CASES
    case = store.read(CASES[0])
    assert case.image.shape[0] == 4
    assert case.label is not None
    assert case.label.shape == case.image.shape[1:]


def test_records_are_read_and_reported(old):
    records = Records.read("runs/student")
    assert len(records.table) == 135
    assert not records.altered
    assert records.sidecar.conventions["hd95"] == "nan"
    assert main(["report", "runs/student", "-o", "report.html"]) == 0


@pytest.mark.parametrize("old", MOVED)
def test_imports_of_earlier_paths_give_the_module_of_today(old):
    today = importlib.import_module(MOVED[old])
    name = next(n for n, v in vars(today).items() if getattr(v, "__module__", "") == MOVED[old])
    earlier = importlib.import_module(old)
    assert getattr(earlier, name) is getattr(today, name)
    assert today.__name__ == MOVED[old]


def test_only_modules_that_have_moved_are_found_anew():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("pmixseg.data.nowhere")
    with pytest.raises(ImportError, match="nothing"):
        exec("from pmixseg.data.store import nothing")
