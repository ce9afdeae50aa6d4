"""The learning rate as Lightning's tuner sees it, and schedules of a few steps."""

import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.optim import SGD

from pmixseg.errors import InputError
from pmixseg.modules import OneCycle, Polynomial, StudentModule
from pmixseg.modules.checkpoint import read_checkpoint
from tests.callbacks.memory_data import MemoryData, quiet_trainer, tiny


def many():
    return MemoryData(((True,) * 4,) * 40)


def student(**arguments):
    torch.manual_seed(0)
    return StudentModule(backbone=tiny(), **arguments)


def rates(total, share):
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = OneCycle(share)(optimizer, total)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("total", range(13))
@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.3, 0.5, 1.0])
def test_one_cycle_has_any_number_of_steps(total, share):
    seen = rates(total, share)
    assert len(seen) == total
    assert all(0 < rate <= 1 for rate in seen)


def test_a_long_cycle_is_that_of_pytorch():
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=40)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    assert rates(40, 0.3) == expected
    assert rates(10, 0.1)[1] == 1.0  # a warm-up of one step


@pytest.mark.parametrize("schedule", [OneCycle(), Polynomial()])
def test_a_schedule_of_a_training_without_end_is_one_sentence(tmp_path, schedule):
    with pytest.raises(InputError, match=r"needs its length; give --trainer\.max_epochs"):
        quiet_trainer(tmp_path, max_epochs=-1).fit(student(scheduler=schedule), MemoryData())


def test_the_rate_is_read_and_set_on_the_module():
    assert student().lr == 1e-3  # AdamW's own default
    module = student(optimizer=functools.partial(SGD, lr=0.5, momentum=0.9))
    assert module.lr == 0.5
    module.lr = 0.25
    assert module.make_optimizer.keywords == {"lr": 0.25, "momentum": 0.9}
    described = student(optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 3.0}})
    assert described.lr == 3.0
    assert described.hparams["optimizer"]["init_args"] == {"lr": 3.0}
    assert described.hparams["backbone"]["init_args"]["width"] == 4


class Own(StudentModule):
    """As a user's own module has it."""

    def __init__(self, lr=0.125, **arguments):
        self.lr = lr
        super().__init__(**arguments)

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=self.lr)


def test_a_users_own_rate_is_theirs(tmp_path):
    module = Own(backbone=tiny())
    assert module.lr == 0.125
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, MemoryData())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("make", [student, functools.partial(Own, backbone=tiny())])
def test_the_tuner_sets_what_it_finds(tmp_path, make):
    module = make()
    # The loss of random samples rises, and none of it is to be left out.
    options = {"num_training": 20, "early_stop_threshold": None}
    finder = Tuner(quiet_trainer(tmp_path)).lr_find(module, datamodule=many(), **options)
    assert len(finder.results["loss"]) > 10
    assert module.lr == finder.suggestion()


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_a_schedule_starts_from_the_rate_that_was_found(tmp_path):
    module, seen = student(scheduler=Polynomial(power=1.0)), Rates()
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[finder, seen])
    trainer.fit(module, many())
    found = finder.optimal_lr.suggestion()
    assert module.lr == found != 1e-3
    assert seen.seen[-40:] == pytest.approx([found * (1 - step / 40) for step in range(40)])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    assert checkpoint["pmixseg"]["init_args"]["optimizer"]["init_args"]["lr"] == found
    assert "hyper_parameters" not in checkpoint
