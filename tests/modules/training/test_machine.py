"""Precisions and strategies of the Trainer: they work, or one sentence refuses them."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from pmixseg.cli import main
from pmixseg.data import BraTSDataModule
from pmixseg.data.splits import Fractions
from pmixseg.errors import InputError
from pmixseg.modules import StudentModule
from pmixseg.modules.training.trainer_checks import check_machine
from tests.callbacks.memory_data import MemoryData, quiet_trainer, tiny

TRUE = ("bf16-true", "16-true", "64-true")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machine")
    trainer = quiet_trainer(folder, precision="bf16-mixed", max_steps=1)
    trainer.fit(StudentModule(backbone=tiny(levels=2)), MemoryData())
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.parametrize(
    ("command", "precision"),
    [*(("fit", p) for p in TRUE), *((c, TRUE[0]) for c in ("validate", "test", "predict"))],
)
def test_weights_of_another_type_are_refused_before_anything_runs(
    phantom_store, checkpoint, tmp_path, capsys, monkeypatch, command, precision
):
    def ran(*arguments):
        raise AssertionError("the network ran")

    monkeypatch.setattr(StudentModule, "encode", ran)
    flags = [f"--run={tmp_path}", f"--data.store={phantom_store}", "--data.patch_size=16"]
    flags += ["--trainer.accelerator=cpu", f"--trainer.precision={precision}"]
    if command != "fit":
        flags.append(f"--ckpt_path={checkpoint}")
    assert main([command, *flags]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"pmixseg: --trainer.precision {precision} turns the weights")
    assert "use 32-true, or bf16-mixed and 16-mixed" in said
    assert ("half precision loses" in said) == (precision != "64-true")


@pytest.mark.parametrize("precision", TRUE)
def test_a_model_in_python_is_refused_alike(tmp_path, precision):
    trainer = quiet_trainer(tmp_path, precision=precision)
    with pytest.raises(InputError, match=f"precision {precision} turns the weights"):
        trainer.fit(StudentModule(backbone=tiny(levels=2)), MemoryData())


def test_mixed_precision_leaves_weights_in_float32(checkpoint):
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_cut_weights_are_refused(kind):
    trainer = SimpleNamespace(precision="32-true", strategy=kind.__new__(kind))
    with pytest.raises(InputError, match=f"{kind.__name__} cuts the weights .*strategy ddp"):
        check_machine(trainer)


@pytest.mark.parametrize("strategy", [DDPStrategy(), SingleDeviceStrategy("cpu")])
def test_strategies_that_keep_weights_whole_are_taken(strategy):
    check_machine(SimpleNamespace(precision="bf16-mixed", strategy=strategy))


def test_a_compiler_round_the_whole_module_is_refused(tmp_path):
    module = torch.compile(StudentModule(backbone=tiny(levels=2)), backend="eager")
    with pytest.raises(InputError, match=r"StudentModule\(compile=True\)"):
        quiet_trainer(tmp_path).fit(module, MemoryData())


def test_loaders_without_their_data_module_are_refused(tmp_path, phantom_store):
    split = Fractions(0.5, 0.25)
    data = BraTSDataModule(phantom_store, patch_size=16, num_workers=0, split=split)
    data.setup("fit"), data.setup("test")
    train, cases = data.train_dataloader(), data.test_dataloader()
    module, refused = StudentModule(backbone=tiny(levels=2)), "give the data module itself"
    with pytest.raises(InputError, match=refused):
        quiet_trainer(tmp_path, limit_val_batches=0).fit(module, train)
    with pytest.raises(InputError, match=refused):
        quiet_trainer(tmp_path).fit(module, train, data.val_dataloader())
    for run in ("validate", "test", "predict"):
        with pytest.raises(InputError, match=refused):
            getattr(quiet_trainer(tmp_path), run)(module, cases)


def test_a_data_module_that_does_not_say_how_it_was_prepared_is_refused(tmp_path):
    class Silent(LightningDataModule):
        spacing, patch_size = None, (16, 16, 16)

    with pytest.raises(InputError, match="Silent does not say normalisation, split_name"):
        quiet_trainer(tmp_path).fit(StudentModule(backbone=tiny()), Silent())


@pytest.mark.parametrize(
    ("name", "value"),
    [("accumulate_grad_batches", 0), ("check_val_every_n_epoch", 0), ("gradient_clip_val", -1.0)],
)
def test_numbers_of_the_trainer_that_make_no_sense_are_refused(tmp_path, name, value):
    with pytest.raises(InputError, match=f"--trainer.{name} is {value}; give"):
        quiet_trainer(tmp_path, **{name: value}).fit(StudentModule(backbone=tiny()), MemoryData())
