"""A resumed training repeats the uninterrupted one, and applies the settings that it was told."""

import functools

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.callbacks import PmixAlignment, RunCheckpoint
from pmixseg.data.augment import Augmentation
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.describe import describe
from pmixseg.errors import InputError
from pmixseg.losses.distances import NMSE
from pmixseg.modules import OneCycle, Polynomial, StudentModule, load
from pmixseg.modules.checkpoint import read_checkpoint
from pmixseg.task import BRATS
from tests.callbacks.memory_data import MemoryData, fit, quiet_trainer, student, tiny


def train_store(
    store, folder, *, epochs, steps=-1, stop_after=None, resume=None, workers=0, save_at=None
):
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

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == save_at:
                trainer.save_checkpoint(folder / "within.ckpt")

    trainer = Trainer(
        max_epochs=epochs,
        max_steps=steps,
        accelerator="cpu",
        callbacks=[PmixAlignment(weight=0.5, warmup_epochs=2), Stop(folder)],
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return module.state_dict()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_resumed_training_ends_bit_identical(phantom_store, tmp_path, workers):
    whole = train_store(phantom_store, tmp_path / "whole", epochs=3, workers=workers)
    torch.rand(7)  # whatever happened in between
    train_store(phantom_store, tmp_path / "part", epochs=3, stop_after=1, workers=workers)
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    resumed = train_store(phantom_store, tmp_path / "part", epochs=3, resume=last, workers=workers)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_same_seed_same_result_and_training_changes_it(phantom_store, tmp_path):
    one = train_store(phantom_store, tmp_path / "a", epochs=1)
    two = train_store(phantom_store, tmp_path / "b", epochs=1)
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    three = train_store(phantom_store, tmp_path / "c", epochs=2)
    assert any(not torch.equal(v, three[k]) for k, v in one.items())


KEYS = ("lr", "weight_decay", "momentum", "betas", "eps")


class Rates(Callback):
    """What every optimizer step was made with."""

    def __init__(self):
        self.rows = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        groups = optimizer.param_groups
        self.rows.append([{k: g[k] for k in KEYS if k in g} for g in groups])


def train(folder, optimizer, scheduler=None, *, epochs, resume=None, keep=None, callbacks=()):
    torch.manual_seed(0)
    module = StudentModule(backbone=tiny(levels=2), optimizer=optimizer, scheduler=scheduler)
    rates = Rates()
    keep = RunCheckpoint(folder) if keep is None else keep
    trainer = quiet_trainer(
        folder,
        max_epochs=epochs,
        enable_checkpointing=True,
        limit_val_batches=0,
        callbacks=[rates, *callbacks, keep],
    )
    trainer.fit(module, MemoryData(), ckpt_path=resume, weights_only=True)
    return rates.rows, trainer


def sgd(**arguments):
    return functools.partial(torch.optim.SGD, **{"lr": 0.1, **arguments})


SCHEDULES = {
    "none": None,
    "polynomial": Polynomial(warmup_steps=2),
    "one_cycle": OneCycle(),
    "step": functools.partial(StepLR, step_size=1, gamma=0.5),
    "exponential": functools.partial(ExponentialLR, gamma=0.7),
    "cosine": functools.partial(CosineAnnealingLR, T_max=4, eta_min=0.01),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("keep", ["run", "lightning"])
def test_every_step_of_a_resumed_schedule_is_that_of_a_whole_one(tmp_path, name, keep):
    def checkpoint(folder):
        if keep == "run":
            return RunCheckpoint(folder)
        return ModelCheckpoint(folder / "checkpoints", filename="last", save_top_k=-1)

    schedule = SCHEDULES[name]
    other = sgd(lr=0.02, momentum=0.5, weight_decay=0.3)
    whole, _ = train(tmp_path / "a", other, schedule, epochs=4)
    part = tmp_path / "b"
    train(part, sgd(momentum=0.9), schedule, epochs=2, keep=checkpoint(part))
    last = part / "checkpoints" / "last.ckpt"
    rest, _ = train(part, other, schedule, epochs=4, resume=last, keep=checkpoint(part))
    assert rest == whole[4:]
    assert [g["momentum"] for g in rest[0]] == [g["momentum"] for g in whole[4]]


def test_a_schedule_is_stretched_to_more_epochs(tmp_path):
    whole, _ = train(tmp_path / "a", sgd(), OneCycle(), epochs=4)
    train(tmp_path / "b", sgd(), OneCycle(), epochs=1)
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    rest, _ = train(tmp_path / "b", sgd(), OneCycle(), epochs=4, resume=last)
    assert rest == whole[2:]


def test_a_schedule_can_be_begun_or_left_out_when_resuming(tmp_path):
    whole, _ = train(tmp_path / "a", sgd(), Polynomial(), epochs=3)
    train(tmp_path / "b", sgd(), epochs=1)
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    assert train(tmp_path / "b", sgd(), Polynomial(), epochs=3, resume=last)[0] == whole[2:]
    train(tmp_path / "c", sgd(), Polynomial(), epochs=3)
    last = tmp_path / "c" / "checkpoints" / "last.ckpt"
    rest, _ = train(tmp_path / "c", sgd(), epochs=4, resume=last)
    assert [g["lr"] for g in rest[0]] == [0.1, 0.1]


def test_decay_and_betas_of_adam_are_those_given_now(tmp_path):
    adam = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    other = functools.partial(torch.optim.AdamW, lr=1e-6, weight_decay=0.2, betas=(0.5, 0.6))
    train(tmp_path, adam, epochs=1)
    rest, trainer = train(tmp_path, other, epochs=2, resume=tmp_path / "checkpoints" / "last.ckpt")
    assert [g["lr"] for g in rest[0]] == [1e-6, 1e-6]
    assert [g["weight_decay"] for g in rest[0]] == [0.2, 0.0]  # biases have no decay
    assert [g["betas"] for g in rest[0]] == [(0.5, 0.6)] * 2
    state = next(iter(trainer.optimizers[0].state.values()))
    assert state["step"] == 4  # moments and counts go on


@pytest.mark.parametrize(
    ("before", "after", "lacks"),
    [
        (sgd(momentum=0.9), torch.optim.AdamW, "exp_avg, exp_avg_sq, step"),
        (torch.optim.AdamW, functools.partial(torch.optim.AdamW, amsgrad=True), "max_exp_avg_sq"),
        (torch.optim.AdamW, torch.optim.Adagrad, "sum"),
        (sgd(momentum=0.9), sgd(), ""),
        (sgd(), sgd(momentum=0.9), ""),
    ],
)
def test_another_optimizer_begins_as_a_new_one(tmp_path, caplog, before, after, lacks):
    """Torch would use the state of the first one, and stumble over what that has not kept."""
    train(tmp_path, before, epochs=1)
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    last = tmp_path / "checkpoints" / "last.ckpt"
    rest, trainer = train(tmp_path, after, epochs=2, resume=last)
    assert len(rest) == 2
    assert (f"the checkpoint holds no {lacks}, which" in caplog.text) == bool(lacks)
    steps = {int(s["step"]) for s in trainer.optimizers[0].state.values() if "step" in s}
    assert steps == ({2} if lacks else set())


class Counting(torch.optim.SGD):
    """Keeps a running number in its groups, as schedule-free optimizers do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["seen"] = 0

    def step(self, closure=None):
        for group in self.param_groups:
            group["seen"] += 1
        return super().step(closure)


def test_running_numbers_of_an_optimizer_are_no_settings(tmp_path):
    train(tmp_path, Counting, epochs=1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    _, trainer = train(tmp_path, Counting, epochs=2, resume=last)
    assert [g["seen"] for g in trainer.optimizers[0].param_groups] == [4, 4]


class Score(Callback):
    """Sets the metric that a schedule watches."""

    def __init__(self, values):
        self.values = values

    def on_train_epoch_end(self, trainer, module):
        module.log("val/dice", torch.tensor(self.values[trainer.current_epoch]))


def plateau(**arguments):
    return functools.partial(ReduceLROnPlateau, **{"patience": 0, "factor": 0.5, **arguments})


def test_a_plateau_goes_on_where_it_was_with_the_settings_given_now(tmp_path, monkeypatch):
    # Nothing is validated here; the score comes from a callback.
    monkeypatch.setattr("pmixseg.modules.training.optimization.validates", lambda trainer: True)
    values = [0.3, 0.2, 0.1, 0.4, 0.2, 0.1]

    def lrs(folder, optimizer, scheduler, epochs, resume=None):
        score = Score(values)
        rows, _ = train(
            folder, optimizer, scheduler, epochs=epochs, resume=resume, callbacks=[score]
        )
        return [row[0]["lr"] for row in rows][::2]

    # Dice falls in the second, third, fifth and sixth epoch: half the rate after each.
    whole = lrs(tmp_path / "a", sgd(), plateau(), 6)
    assert whole == [0.1, 0.1, 0.05, 0.025, 0.025, 0.0125]
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    assert lrs(tmp_path / "b", sgd(), plateau(), 3) == whole[:3]
    assert lrs(tmp_path / "b", sgd(), plateau(), 6, last) == whole[3:]
    # A tenth of the rate, and a factor of 0.1 from now on.
    assert lrs(tmp_path / "c", sgd(), plateau(), 3) == whole[:3]
    last = tmp_path / "c" / "checkpoints" / "last.ckpt"
    rest = lrs(tmp_path / "c", sgd(lr=0.01), plateau(factor=0.1), 6, last)
    assert rest == pytest.approx([0.0025 * 0.2, 0.0005, 0.00005])


def test_patience_is_that_given_now(tmp_path):
    def stop(patience):
        return EarlyStopping("train/loss", patience=patience, check_on_train_epoch_end=True)

    train(tmp_path, sgd(), epochs=1, callbacks=[stop(3)])
    last = tmp_path / "checkpoints" / "last.ckpt"
    now = stop(7)
    train(tmp_path, sgd(), epochs=2, resume=last, callbacks=[now])
    assert now.patience == 7


def test_a_schedule_that_is_over_is_one_sentence(tmp_path):
    train(tmp_path, sgd(), OneCycle(), epochs=2)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.warns(UserWarning, match=r"nothing was trained: .* made \d+ steps in 2 epochs"):
        rows, _ = train(tmp_path, sgd(), OneCycle(), epochs=2, resume=last)
    assert rows == []


def test_weights_alone_are_nothing_to_resume(tmp_path):
    trainer = quiet_trainer(tmp_path)
    trainer.fit(StudentModule(backbone=tiny(levels=2)), MemoryData())
    trainer.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    module = load(tmp_path / "w.ckpt")
    with pytest.raises(InputError, match=r"holds weights alone, .* fit what pmixseg\.load returns"):
        quiet_trainer(tmp_path).fit(module, MemoryData(), ckpt_path=tmp_path / "w.ckpt")
    quiet_trainer(tmp_path).fit(module, MemoryData())


def test_another_batch_size_precision_or_seed_is_told(tmp_path, caplog):
    """They change what continues, and no flag of the model or the data's preparation shows it."""

    def go_on(folder, batch_size, epochs, resume=None, seed=0, weight=0.1, **arguments):
        data = MemoryData(batch_size=batch_size)
        data.seed = seed
        data.patch_size = (8, 8, 8) if seed else data.patch_size
        data.augmentation = None if seed else Augmentation()
        align = PmixAlignment(weight, distance=NMSE() if seed else "mse")
        keep = {"enable_checkpointing": True, "callbacks": [align, RunCheckpoint(folder)]}
        trainer = quiet_trainer(folder, max_epochs=epochs, limit_val_batches=0, **keep, **arguments)
        module = StudentModule(backbone=tiny(levels=2))
        with caplog.at_level("INFO"):
            caplog.clear()
            trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        return [line for line in caplog.messages if "the checkpoint had" in line]

    last = tmp_path / "checkpoints" / "last.ckpt"
    assert go_on(tmp_path, 2, 1) == []
    assert go_on(tmp_path, 2, 2, last) == []
    (line,) = go_on(tmp_path, 4, 3, last, 7, 0.2, precision="bf16-mixed", accumulate_grad_batches=2)
    assert line == (
        "data.batch_size is 4, the checkpoint had 2; "
        f"data.patch_size is [8, 8, 8], the checkpoint had {list(MemoryData.patch_size)}; "
        "data.seed is 7, the checkpoint had 0; "
        f"data.augmentation is None, the checkpoint had {describe(Augmentation())}; "
        "trainer.precision is bf16-mixed, the checkpoint had 32-true; "
        "trainer.accumulate_grad_batches is 2, the checkpoint had 1; "
        "align.weight is 0.2, the checkpoint had 0.1; "
        f"align.distance is {describe(NMSE())}, the checkpoint had mse: the training goes on with "
        "the settings of this call, and not as it would have without the interruption."
    )


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_checkpoint_of_a_clipped_training_is_read_and_resumed(tmp_path, algorithm):
    clip = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": algorithm}
    path = tmp_path / "a.ckpt"
    fit(tmp_path, student(), **clip).save_checkpoint(path)
    assert read_checkpoint(path)["circumstances"]["trainer.gradient_clip_algorithm"] == algorithm
    assert fit(tmp_path, student(), resume=path, max_epochs=2, **clip).global_step == 4


def test_a_training_of_steps_goes_on_with_the_next_epoch_whatever_wrote_its_checkpoint(
    phantom_store, tmp_path
):
    def steps(number, resume=None):
        torch.manual_seed(0)
        module = StudentModule(backbone=tiny(levels=2))
        keep = ModelCheckpoint(tmp_path, filename=f"{number}", enable_version_counter=False)
        settings = {"callbacks": [keep], "enable_checkpointing": True, "limit_val_batches": 0}
        trainer = quiet_trainer(tmp_path, max_epochs=-1, max_steps=number, **settings)
        data = BraTSDataModule(phantom_store, patch_size=16)
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        return trainer

    assert steps(3).num_training_batches == 3  # an epoch: five cases, two at a time
    whole, resumed = steps(6), steps(6, tmp_path / "3.ckpt")
    assert resumed.current_epoch == whole.current_epoch
    for name, value in whole.lightning_module.state_dict().items():
        assert torch.equal(resumed.lightning_module.state_dict()[name], value), name


def test_the_rest_of_an_epoch_that_max_steps_ended_is_left_out(phantom_store, tmp_path):
    train_store(phantom_store, tmp_path, epochs=-1, steps=4)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.warns(UserWarning, match="ended after 1 batch of epoch 1; the rest of it is left"):
        train_store(phantom_store, tmp_path, epochs=3, resume=last)


class Nested(StudentModule):
    """Has an optimizer and schedules of its own."""

    def __init__(self, rate=0.1, **kwargs):
        self.rate = rate
        super().__init__(**kwargs)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate)
        parts = [ExponentialLR(optimizer, 0.5), ExponentialLR(optimizer, 0.9)]
        return [optimizer], [SequentialLR(optimizer, parts, milestones=[1])]


def test_nested_schedules_go_on(tmp_path):
    def run(folder, lr, epochs, resume=None):
        rates = Rates()
        trainer = quiet_trainer(
            folder,
            max_epochs=epochs,
            enable_checkpointing=True,
            limit_val_batches=0,
            callbacks=[rates, RunCheckpoint(folder)],
        )
        module = Nested(lr, backbone=tiny(levels=2))
        trainer.fit(module, MemoryData(), ckpt_path=resume, weights_only=True)
        return [row[0]["lr"] for row in rates.rows]

    whole = run(tmp_path / "a", 0.02, 4)
    run(tmp_path / "b", 0.1, 2)
    assert run(tmp_path / "b", 0.02, 4, tmp_path / "b" / "checkpoints" / "last.ckpt") == whole[4:]


def test_a_training_without_a_step_says_so(tmp_path):
    with pytest.warns(
        UserWarning, match="nothing was trained: this training has made 0 steps in 0 ep"
    ):
        train(tmp_path, sgd(), epochs=0)


def test_the_rest_of_an_epoch_is_the_rest_of_its_batches(phantom_store, tmp_path):
    # A scheduler of jobs stops a training anywhere; Lightning would begin with the first batch.
    whole = train_store(phantom_store, tmp_path, epochs=2, save_at=4)
    rest = train_store(phantom_store, tmp_path, epochs=2, resume=tmp_path / "within.ckpt")
    for name, value in whole.items():
        assert torch.equal(value, rest[name]), name


def test_weights_that_were_averaged_are_told_where_nothing_averages_any_more(tmp_path):
    averaged = EMAWeightAveraging(decay=0.5)
    train(tmp_path, sgd(), epochs=1, callbacks=[averaged])
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.warns(UserWarning, match="goes on from the averaged weights; give EMAWeightAver"):
        train(tmp_path, sgd(), epochs=2, resume=last)
