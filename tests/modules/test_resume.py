"""A training that is stopped after an epoch and resumed ends bit-identical.

The contract: docs/design/contracts.md.
"""

import pytest
import torch
from lightning.pytorch import Trainer

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.callbacks import PmixAlignment, RunCheckpoint
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.modules import Polynomial, StudentModule
from pmixseg.task import BRATS


def train(store, folder, *, epochs, stop_after=None, resume=None, workers=0):
    torch.manual_seed(5)
    net = MultiEncoderUNet(BRATS.modalities, BRATS.num_classes, width=4, levels=2, dropout=0.3)
    module = StudentModule(backbone=net, scheduler=Polynomial())
    data = BraTSDataModule(
        store, patch_size=16, batch_size=2, num_workers=workers, val_cases=1, seed=9
    )

    class Stop(RunCheckpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            if stop_after is not None and trainer.current_epoch + 1 == stop_after:
                trainer.should_stop = True

    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[PmixAlignment(weight=0.5, warmup_epochs=2), Stop(folder)],
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return module.state_dict()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_resumed_training_ends_bit_identical(phantom_store, tmp_path, workers):
    whole = train(phantom_store, tmp_path / "whole", epochs=3, workers=workers)
    torch.rand(7)  # whatever happened in between
    train(phantom_store, tmp_path / "part", epochs=3, stop_after=1, workers=workers)
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    resumed = train(phantom_store, tmp_path / "part", epochs=3, resume=last, workers=workers)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_same_seed_same_result_and_training_changes_it(phantom_store, tmp_path):
    one = train(phantom_store, tmp_path / "a", epochs=1)
    two = train(phantom_store, tmp_path / "b", epochs=1)
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    three = train(phantom_store, tmp_path / "c", epochs=2)
    assert any(not torch.equal(v, three[k]) for k, v in one.items())
