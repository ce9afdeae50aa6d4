"""The run folder: a log that goes on, checkpoints that are whole, a disk that fills up."""

import multiprocessing
import os
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from memory_data import MemoryData

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.callbacks import RunCheckpoint, RunLogger
from pmixseg.errors import InputError
from pmixseg.modules import StudentModule, load
from pmixseg.modules.checkpoint import write_checkpoint
from pmixseg.task import BRATS


def train(folder, width=2, **arguments):
    module = StudentModule(backbone=MultiEncoderUNet(BRATS.modalities, 4, width=width, levels=2))
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[RunCheckpoint(folder)],
        logger=RunLogger(folder),
        limit_val_batches=0,
        limit_train_batches=1,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **arguments,
    )
    trainer.fit(module, MemoryData())
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
    import resource
    import signal

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            write_checkpoint({"a": torch.zeros(1_000_000)}, tmp_path / "a.ckpt")
        except InputError as error:
            os._exit(7 if "a.ckpt cannot be written (File too large)" in str(error) else 8)

    process = multiprocessing.get_context("fork").Process(target=limited)
    process.start()
    process.join()
    assert process.exitcode == 7
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
