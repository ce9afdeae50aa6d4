"""Learning rates, optimizers and schedules, and the metrics that schedules watch."""

import functools
import inspect
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import ReduceLROnPlateau as LightningPlateau
from lightning.pytorch.tuner import Tuner
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from pmixseg import backbones, losses
from pmixseg.backbones import Backbone
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.losses import AlignmentLoss, DistillationLoss
from pmixseg.losses.distances import DISTANCES
from pmixseg.losses.projections import SlotLinear
from pmixseg.modules import OneCycle, Polynomial, StudentModule
from pmixseg.modules.checkpoint import read_checkpoint
from pmixseg.modules.training.optimization import parameter_groups, regroup
from pmixseg.task import BRATS
from tests.callbacks.memory_data import MemoryData, fit, quiet_trainer, tiny


def many():
    return MemoryData(((True,) * 4,) * 40)


def student(**arguments):
    torch.manual_seed(0)
    return StudentModule(backbone=tiny(levels=2), **arguments)


def rates_of(optimizer, scheduler, total):
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def rates(total, share):
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return rates_of(optimizer, OneCycle(share)(optimizer, total), total)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"optimizer": partial(AdamW, lr="1e-3")},
            "AdamW: lr is '1e-3'; give a number or a tensor.",
        ),
        (
            {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": "1"}}},
            "SGD: lr is '1'",
        ),
        ({"optimizer": partial(AdamW, betas="0.9")}, "betas is '0.9'; give a list of 2."),
        ({"scheduler": partial(StepLR, step_size="3")}, "step_size is '3'; give a whole number."),
        ({"optimizer": torch.optim.LBFGS}, r"optimizer LBFGS cannot be made \(LBFGS doesn't"),
        ({"optimizer": partial(SGD, lr=-1)}, r"SGD cannot be made \(Invalid learning"),
        (
            {"optimizer": partial(SGD, rate=1)},
            "unexpected keyword .* correct its arguments, or take",
        ),
        ({"scheduler": StepLR}, r"schedule StepLR cannot be made \(.*missing"),
    ],
)
def test_what_torch_makes_no_optimizer_or_schedule_of_is_one_sentence(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        student(**arguments).configure_optimizers()


def test_a_network_may_have_complex_parameters(tmp_path):
    module = student()
    module.phase = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    assert fit(tmp_path, module).global_step == 2


def test_a_training_that_nobody_steps_is_refused(tmp_path):
    module = student()
    module.automatic_optimization = False
    with pytest.raises(InputError, match="nothing would be trained; leave it True, or override"):
        fit(tmp_path, module)


@pytest.mark.parametrize("total", range(13))
@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.3, 0.5, 1.0])
def test_one_cycle_has_any_number_of_steps(total, share):
    seen = rates(total, share)
    assert len(seen) == total
    assert all(0 < rate <= 1 for rate in seen)


def test_a_long_cycle_is_that_of_pytorch():
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=40)
    assert rates(40, OneCycle().warmup_fraction) == rates_of(optimizer, oracle, 40)
    assert rates(10, 0.1)[1] == 1.0  # a warm-up of one step


@pytest.mark.parametrize("schedule", [OneCycle(), Polynomial()])
def test_a_schedule_of_a_training_without_end_is_one_sentence(tmp_path, schedule):
    with pytest.raises(
        InputError, match=r"needs its length; give max_epochs or max_steps \(--trainer"
    ):
        fit(tmp_path, student(scheduler=schedule), max_epochs=-1)


class WithRate(StudentModule):
    def __init__(self, lr=0.125, **arguments):
        self.lr = lr
        super().__init__(**arguments)


def test_a_rate_that_a_subclass_sets_first_is_that_of_its_optimizer():
    assert WithRate(backbone=tiny(levels=2)).configure_optimizers().defaults["lr"] == 0.125


# Of the default power; from 0 in four steps, of which the first is taken, and down over five.
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Polynomial(), [2, 2 * 0.75**0.9, 2 * 0.5**0.9, 2 * 0.25**0.9]),
        (Polynomial(power=1.0, warmup_steps=3), [0.5, 1, 1.5, 2, 1.6, 1.2, 0.8, 0.4]),
    ],
)
def test_a_polynomial_by_hand(schedule, expected):
    optimizer = SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    scheduler = schedule(optimizer, total := len(expected))
    assert rates_of(optimizer, scheduler, total) == pytest.approx(expected)


def test_a_schedule_without_a_trainer_is_one_sentence():
    with pytest.raises(InputError, match="Polynomial needs the length of the training"):
        student(scheduler=Polynomial()).configure_optimizers()


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
    module = Own(backbone=tiny(levels=2))
    assert module.lr == 0.125
    trainer = fit(tmp_path, module)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.125


def test_an_optimizer_that_no_checkpoint_would_name_is_refused(tmp_path):
    module = student()
    module.configure_optimizers = lambda: SGD(module.parameters(), lr=0.1)  # as LightningCLI does
    with pytest.raises(InputError, match=r"was replaced, .* give --model\.optimizer"):
        fit(tmp_path, module)


@pytest.mark.parametrize("make", [student, functools.partial(Own, backbone=tiny(levels=2))])
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
    rate = finder.optimal_lr.suggestion()
    assert module.lr == rate != 1e-3
    assert seen.seen[-40:] == pytest.approx([rate * (1 - step / 40) for step in range(40)])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    assert checkpoint["pmixseg"]["init_args"]["optimizer"]["init_args"]["lr"] == rate
    assert "hyper_parameters" not in checkpoint


DESCRIBED = {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau", "init_args": {}}


def student_of(scheduler=None):
    settings = EvaluationSettings(window=(32, 40, 32))
    return StudentModule(backbone=tiny(levels=2), scheduler=scheduler, evaluation=settings)


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
        module = student_of(scheduler)
        told = module.payload().to_dict()["init_args"]["scheduler"]
        assert told["init_args"]["mode"] == mode
    else:  # which no checkpoint could hold, so it is put in place afterwards
        module = student_of()
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
        student_of(schedule),
        data=cohort(phantom_store),
        max_epochs=5,
        limit_train_batches=1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=2,
    )
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2


def test_a_plateau_without_any_validation_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"watches val/dice, but this training validates nothing"):
        fit(tmp_path, student_of(DESCRIBED), limit_val_batches=0)


def test_a_lambda_in_the_wrong_direction_is_one_sentence(phantom_store, tmp_path):
    module = StudentModule(backbone=tiny(levels=2))
    module.make_scheduler = lambda optimizer: ReduceLROnPlateau(optimizer)
    with pytest.raises(InputError, match="better higher; give it mode: max"):
        fit(tmp_path, module, data=cohort(phantom_store))


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
@pytest.mark.parametrize(
    ("monitor", "mode", "right"),
    [("val/dice", "min", "max"), ("val/dice/ET", "min", "max"), ("train/loss", "max", "min")],
)
def test_a_metric_watched_upside_down_is_refused(tmp_path, kind, monitor, mode, right):
    with pytest.raises(InputError, match=f"{kind.__name__} watches {monitor}.*mode: {right}"):
        fit(tmp_path, student_of(), kind(monitor=monitor, mode=mode), enable_checkpointing=True)


def test_a_metric_of_the_users_own_is_theirs(tmp_path):
    stop = EarlyStopping("mine", mode="min", strict=False)
    fit(tmp_path, student_of(), stop)


def test_averaged_weights_that_reach_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(InputError, match="EMAWeightAveraging"):
        fit(tmp_path, student_of(), StochasticWeightAveraging(1e-2))


def test_averaged_weights_are_those_of_the_checkpoint(tmp_path):
    average = EMAWeightAveraging(decay=0.5)
    trainer = fit(tmp_path, student_of(), average, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    own = trainer.lightning_module.state_dict()
    assert all(torch.equal(state["state_dict"][name], own[name]) for name in own)


BACKBONES = {
    "MMFormer": {"width": 4, "patch_size": 16, "embedding": 8, "heads": 2, "hidden": 8},
    "EarlyFusion": {
        "network": {
            "class_path": "monai.networks.nets.SwinUNETR",
            "init_args": {"in_channels": 4, "out_channels": 4, "feature_size": 12},
        }
    },
}


def modules_with_parameters():
    """Every backbone, every distance and every distillation loss, by listing."""
    for name in backbones.__all__:
        cls = getattr(backbones, name)
        if issubclass(cls, Backbone) and not inspect.isabstract(cls):
            yield name, cls(**BACKBONES.get(name, {}))
    for name in DISTANCES:
        yield name, AlignmentLoss(name, [3], BRATS.modalities, [0], "linear")
    slots = BRATS.modalities
    net = SimpleNamespace(modalities=slots, slots=slots, channels=(3,), strides=(1,), num_classes=4)
    for name in losses.__all__:
        cls = getattr(losses, name)
        if (
            inspect.isclass(cls)
            and issubclass(cls, DistillationLoss)
            and cls is not DistillationLoss
        ):
            term = cls()
            term.bind(net, net)
            yield name, term


def test_weights_decay_and_nothing_else_does():
    biases = 0
    for name, module in modules_with_parameters():
        decayed, spared = set(), set()
        for group in parameter_groups(module):
            (spared if "weight_decay" in group else decayed).update(group["params"])
        trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
        assert decayed | spared == set(trained.values())
        for key, parameter in trained.items():
            last = key.rpartition(".")[2]
            kept = "bias" in last or last in ("pos", "scores") or parameter.ndim == 1
            biases += parameter.ndim > 1 and "bias" in last
            assert (parameter in spared) == kept, f"{name}: {key} {tuple(parameter.shape)}"
    assert biases > 3


def test_a_training_goes_on_whose_biases_had_weight_decay():
    def stepped(groups):
        optimizer = torch.optim.AdamW(groups, lr=0.1)
        for index, parameter in enumerate(module.parameters()):
            parameter.grad = torch.full_like(parameter, index + 1.0)
        optimizer.step()
        return optimizer

    module = torch.nn.ModuleList([SlotLinear(2, 3, 3, bias=True), torch.nn.Conv3d(1, 2, 1)])
    every = list(module.parameters())
    old = [p for p in every if p.ndim > 1], [p for p in every if p.ndim <= 1]
    before = stepped([{"params": old[0]}, {"params": old[1], "weight_decay": 0.0}])
    averages = {p: before.state[p]["exp_avg"].clone() for p in every}
    state = before.state_dict()
    for _ in range(2):  # a state in today's groups stays what it is
        regroup(state, module)
        after = torch.optim.AdamW(parameter_groups(module))
        after.load_state_dict(state)
        for parameter in every:
            assert torch.equal(after.state[parameter]["exp_avg"], averages[parameter])
        state = after.state_dict()


def test_a_schedule_knows_of_an_accumulation_that_changes(tmp_path):
    """8 batches an epoch: 2 steps in the first, 8 in the second and third."""
    changing = GradientAccumulationScheduler({0: 4, 1: 1})
    trainer = quiet_trainer(tmp_path, max_epochs=3, limit_val_batches=0, callbacks=[changing])
    module = student(scheduler=Polynomial(power=1.0))
    trainer.fit(module, MemoryData(((True,) * 4,) * 8, batch_size=1))
    assert trainer.global_step == 18
    (schedule,) = trainer.lr_scheduler_configs
    assert schedule.scheduler.lr_lambdas[0].keywords == {"total_steps": 18}
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0
