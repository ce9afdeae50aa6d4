"""A run: its log goes on, its checkpoints are whole, a disk fills up, Lightning keeps quiet."""

import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.callbacks import PredictionWriter, RunCheckpoint, RunLogger
from pmixseg.callbacks.silence import silence_lightning
from pmixseg.errors import InputError
from pmixseg.modules import StudentModule, load
from pmixseg.modules.checkpoint import write_checkpoint
from pmixseg.modules.recording import results_folder
from pmixseg.task import BRATS
from tests.callbacks.memory_data import MemoryData, quiet_trainer
from tests.processes import said_of_a_full_disk


def train(folder, width=2, resume=None, logger=None, **arguments):
    module = StudentModule(backbone=MultiEncoderUNet(BRATS.modalities, 4, width=width, levels=2))
    settings = {"limit_val_batches": 0, "limit_train_batches": 1, "log_every_n_steps": 1}
    trainer = quiet_trainer(
        folder,
        callbacks=[RunCheckpoint(folder)],
        logger=RunLogger(folder) if logger is None else logger,
        enable_checkpointing=True,
        **{**settings, **arguments},
    )
    trainer.fit(module, MemoryData(), ckpt_path=resume, weights_only=True)
    return trainer


def test_an_empty_log_is_no_history(tmp_path, recwarn):
    (tmp_path / "metrics.csv").touch()
    logger = RunLogger(tmp_path)
    logger.log_metrics({"train/loss": 1.0}, step=3)
    logger.finalize("success")
    assert pd.read_csv(tmp_path / "metrics.csv")["step"].tolist() == [3]
    assert not [w for w in recwarn if "is no log" in str(w.message)]


@pytest.mark.parametrize("content", ["epoch,loss\n1,2\n", 'a,b\n"1,2,3\n4', "step\nx\n"])
def test_what_is_no_log_is_written_anew(tmp_path, content):
    (tmp_path / "metrics.csv").write_text(content)
    logger = RunLogger(tmp_path)
    with pytest.warns(UserWarning, match=r"metrics\.csv is no log .* written anew"):
        logger.log_metrics({"train/loss": 1.0}, step=3)
    logger.finalize("success")
    assert pd.read_csv(tmp_path / "metrics.csv")["step"].tolist() == [3]


def test_a_checkpoint_without_a_folder_lies_beside_the_others(tmp_path):
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[ModelCheckpoint(save_last=True)],
        logger=RunLogger(tmp_path),
        enable_checkpointing=True,
        limit_train_batches=1,
        limit_val_batches=0,
    )
    backbone = MultiEncoderUNet(BRATS.modalities, 4, width=2, levels=2)
    trainer.fit(StudentModule(backbone=backbone), MemoryData())
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


def test_results_lie_in_the_run_and_not_in_the_working_folder(tmp_path, monkeypatch):
    """Trainers that are given no folder would replace each other's records."""
    monkeypatch.chdir(tmp_path)
    runs = [
        Trainer(callbacks=[RunCheckpoint(name)], logger=False, accelerator="cpu") for name in "ab"
    ]
    assert [results_folder(run) for run in runs] == [Path("a"), Path("b")]
    given = Trainer(default_root_dir="c", callbacks=[RunCheckpoint("a")], accelerator="cpu")
    plain = Trainer(enable_checkpointing=False, logger=False, accelerator="cpu")
    assert [results_folder(run).name for run in (given, plain)] == ["c", tmp_path.name]
    module = StudentModule(backbone=MultiEncoderUNet(BRATS.modalities, 4, width=2, levels=2))
    module._trainer = runs[1]
    assert module.recording.path == Path("b/records.csv")
    assert PredictionWriter().path(runs[1]) == Path("b/predictions")


OLD = "epoch,step,gap/ratio\n-1,0,0.5\n0,0,0.4\n7,70,0.3\n"
"""A log of an earlier training, with rows before and after those of the next."""


def test_a_fresh_training_keeps_nothing_of_an_earlier_one(tmp_path):
    (tmp_path / "metrics.csv").write_text(OLD)
    logger = RunLogger(tmp_path)
    train(tmp_path, logger=logger, limit_train_batches=2)
    once = pd.read_csv(tmp_path / "metrics.csv")
    assert "gap/ratio" not in once
    assert set(once["step"]) == {1}  # the loss of an epoch of two steps
    train(tmp_path, logger=logger)  # the same object again
    assert set(pd.read_csv(tmp_path / "metrics.csv")["step"]) == {0}


@pytest.mark.parametrize("same", [True, False])
def test_a_resumed_training_keeps_what_came_before(tmp_path, same):
    logger = RunLogger(tmp_path)
    train(tmp_path, logger=logger)
    table = pd.read_csv(tmp_path / "metrics.csv")
    rest = pd.DataFrame({"epoch": [-1, 9], "step": [0, 90], "gap/ratio": [0.5, 0.3]})
    pd.concat([table, rest]).to_csv(tmp_path / "metrics.csv", index=False)
    last = tmp_path / "checkpoints" / "last.ckpt"
    train(tmp_path, logger=logger if same else None, max_epochs=2, resume=last)
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert sorted(set(table["step"])) == [0, 1]
    assert table["gap/ratio"].dropna().tolist() == [0.5]


@pytest.mark.parametrize("same", [True, False])
def test_validating_after_a_training_keeps_its_log(tmp_path, same, monkeypatch):
    """Its steps begin at 0 again, as those of a new training do."""
    monkeypatch.setattr(MemoryData, "parts", SimpleNamespace(val=()), raising=False)
    logger = RunLogger(tmp_path)
    trainer = train(tmp_path, logger=logger, limit_train_batches=2)
    before = pd.read_csv(tmp_path / "metrics.csv")

    class Validated(StudentModule):
        def on_validation_epoch_start(self): ...

        def validation_step(self, batch, batch_idx):
            self.log("val/dice", 0.5, batch_size=1)

        def on_validation_epoch_end(self): ...

    if not same:
        trainer = quiet_trainer(tmp_path, logger=RunLogger(tmp_path))
    module = Validated(backbone=MultiEncoderUNet(BRATS.modalities, 4, width=2, levels=2))
    trainer.limit_val_batches = 1
    trainer.validate(module, MemoryData().train_dataloader(), verbose=False)
    after = pd.read_csv(tmp_path / "metrics.csv")
    assert after["val/dice"].dropna().tolist() == [0.5]
    pd.testing.assert_frame_equal(after.iloc[: len(before)][list(before)], before)


def test_a_log_that_cannot_be_written_hides_no_other_error(tmp_path):
    (tmp_path / "afile").touch()
    logger = RunLogger(tmp_path / "afile" / "run")
    logger.log_metrics({"train/loss": 1.0}, step=3)
    for save in (logger.save, lambda: logger.finalize("success")):
        with pytest.raises(InputError, match=r"metrics\.csv cannot be written \(Not a directory\)"):
            save()
    with pytest.warns(UserWarning, match="cannot be written"):
        logger.finalize("failed")


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    assert isinstance(train(tmp_path), Trainer)
    last = tmp_path / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    real = torch.save

    def full_disk(checkpoint, file):
        real(checkpoint, file)
        file.truncate(1000)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(InputError, match=r"last\.ckpt cannot be written \(No space left on device"):
        train(tmp_path)
    assert last.read_bytes() == before
    assert [p.name for p in last.parent.iterdir()] == ["last.ckpt"]
    assert isinstance(load(last), StudentModule)


def test_a_limit_of_the_system_is_told_with_the_file(tmp_path, capfd):
    """PyTorch's writer has errors of its own; these are real ones."""
    weights = {"a": torch.zeros(1_000_000)}
    said = said_of_a_full_disk(lambda: write_checkpoint(weights, tmp_path / "a.ckpt"))
    assert "a.ckpt cannot be written (File too large)" in said
    assert not list(tmp_path.iterdir())


def test_nothing_of_a_checkpoint_is_written_elsewhere_and_copied(tmp_path, monkeypatch):
    """A copy from another disk is half there when this one is full."""
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    seen = []
    real = Path.replace

    def replaced(self, target):
        seen.append((self.parent, Path(target).name))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replaced)
    train(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints", "last.ckpt") in seen


def test_a_writer_of_ones_own_is_kept(tmp_path):
    class Mine(TorchCheckpointIO): ...

    mine = Mine()
    assert train(tmp_path, plugins=[mine]).strategy.checkpoint_io is mine


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("Seed set to 0", False),
        ("[rank: 1] Seed set to 0", False),
        ("GPU available: False, used: False", False),
        ("[rank: 1] the loss is not finite", True),
    ],
)
def test_chatter_of_any_rank_is_silenced(message, kept):
    silence_lightning()
    logger = logging.getLogger("lightning.fabric.utilities.seed")
    record = logger.makeRecord(logger.name, logging.INFO, "", 0, message, (), None)
    assert bool(logger.filter(record)) == kept


def test_chatter_of_a_logger_below():
    above, handler = logging.getLogger("lightning.pytorch"), logging.StreamHandler()
    message = "`weights_only` was not set, defaulting to `False`."
    name = "lightning.pytorch.trainer.connectors.checkpoint_connector"
    record = logging.getLogger(name).makeRecord(name, logging.INFO, "", 0, message, (), None)
    above.addHandler(handler)
    try:
        silence_lightning()
        assert not handler.filter(record)
    finally:
        above.removeHandler(handler)
