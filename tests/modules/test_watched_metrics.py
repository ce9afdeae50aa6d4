"""What follows a metric follows it in the metric's own direction, or is refused before training."""

import functools

import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import ReduceLROnPlateau as LightningPlateau
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.modules import StudentModule
from tests.callbacks.memory_data import MemoryData, quiet_trainer, tiny

DESCRIBED = {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau", "init_args": {}}


def fit(folder, scheduler=None, *callbacks, data=None, **arguments):
    module = StudentModule(
        backbone=tiny(), scheduler=scheduler, evaluation=EvaluationSettings(window=(24, 24, 16))
    )
    trainer = quiet_trainer(folder, callbacks=list(callbacks), **arguments)
    trainer.fit(module, data or MemoryData())
    return trainer


def cohort(store):
    return BraTSDataModule(store, patch_size=16, batch_size=4, val_cases=1)


@pytest.mark.parametrize(
    ("scheduler", "mode"),
    [
        (DESCRIBED, "max"),
        ({**DESCRIBED, "init_args": {"mode": "min"}}, "max"),
        (functools.partial(ReduceLROnPlateau, factor=0.5), "max"),
        (functools.partial(LightningPlateau, monitor="train/loss"), "min"),
        (functools.partial(LightningPlateau, monitor="val/dice/ET"), "max"),
        (lambda optimizer: ReduceLROnPlateau(optimizer, mode="max"), "max"),
    ],
)
def test_the_rate_falls_when_the_metric_gets_no_better(phantom_store, tmp_path, scheduler, mode):
    if isinstance(scheduler, functools.partial | dict):
        module = StudentModule(backbone=tiny(), scheduler=scheduler)
        told = module.payload().to_dict()["init_args"]["scheduler"]
        assert told["init_args"]["mode"] == mode
    else:  # which no checkpoint could hold, so it is put in place afterwards
        module = StudentModule(backbone=tiny())
        module.make_scheduler = scheduler
    trainer = quiet_trainer(tmp_path, limit_train_batches=1, num_sanity_val_steps=0)
    trainer.fit(module, cohort(phantom_store))
    config = trainer.lr_scheduler_configs[0]
    assert config.scheduler.mode == mode
    assert config.monitor == getattr(config.scheduler, "monitor", "val/dice")
    for score in (0.1, 0.2, 0.3):
        config.scheduler.step(score if mode == "max" else -score)
    assert config.scheduler.num_bad_epochs == 0


def test_epochs_without_a_validation_count_for_nothing(phantom_store, tmp_path):
    schedule = functools.partial(ReduceLROnPlateau, patience=0, factor=0.5)
    trainer = fit(
        tmp_path,
        schedule,
        data=cohort(phantom_store),
        max_epochs=5,
        limit_train_batches=1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=2,
    )
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2


def test_a_plateau_without_any_validation_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"watches val/dice, but this training validates nothing"):
        fit(tmp_path, DESCRIBED, limit_val_batches=0)


def test_a_lambda_in_the_wrong_direction_is_one_sentence(phantom_store, tmp_path):
    module = StudentModule(backbone=tiny())
    module.make_scheduler = lambda optimizer: ReduceLROnPlateau(optimizer)
    with pytest.raises(InputError, match="better higher; give it mode: max"):
        quiet_trainer(tmp_path).fit(module, cohort(phantom_store))


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
@pytest.mark.parametrize(
    ("monitor", "mode", "right"),
    [("val/dice", "min", "max"), ("val/dice/ET", "min", "max"), ("train/loss", "max", "min")],
)
def test_a_metric_watched_upside_down_is_refused(tmp_path, kind, monitor, mode, right):
    with pytest.raises(InputError, match=f"{kind.__name__} watches {monitor}.*mode: {right}"):
        fit(tmp_path, None, kind(monitor=monitor, mode=mode), enable_checkpointing=True)


def test_a_metric_of_the_users_own_is_theirs(tmp_path):
    stop = EarlyStopping("mine", mode="min", strict=False)
    fit(tmp_path, None, stop)


def test_averaged_weights_that_reach_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(InputError, match="EMAWeightAveraging"):
        fit(tmp_path, None, StochasticWeightAveraging(1e-2))


def test_averaged_weights_are_those_of_the_checkpoint(tmp_path):
    average = EMAWeightAveraging(decay=0.5)
    trainer = fit(tmp_path, None, average, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    own = trainer.lightning_module.state_dict()
    assert all(torch.equal(state["state_dict"][name], own[name]) for name in own)
