"""Precisions, strategies and loaders of a user: they work, or one sentence refuses them."""

import copy
import pickle
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
)
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch.utils.data import DataLoader, Subset

from pmixseg.callbacks import Distillation, PmixAlignment
from pmixseg.cli import main
from pmixseg.data import BraTSDataModule
from pmixseg.data.splits import Fractions
from pmixseg.errors import InputError
from pmixseg.losses import ContrastiveMatch
from pmixseg.modules import Polynomial, StudentModule, TeacherModule, load
from pmixseg.modules.training.compilation import compiled
from pmixseg.modules.training.trainer_checks import check_machine
from pmixseg.task import BRATS
from tests.callbacks.memory_data import MemoryData, fit, quiet_trainer, tiny

TRUE = ("bf16-true", "16-true", "64-true")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machine")
    module = StudentModule(backbone=tiny(levels=2))
    trainer = fit(folder, module, precision="bf16-mixed", max_steps=1)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.parametrize("kind", ["half", "bfloat16", "double"])
def test_weights_that_were_turned_into_another_type_are_refused(tmp_path, kind):
    module = StudentModule(backbone=tiny(levels=2))
    getattr(module.backbone, kind)()
    sentence = r"weights of this StudentModule were turned into \w+; turn them back by .float\(\)"
    for precision in ("32-true", "bf16-mixed"):
        with pytest.raises(InputError, match=sentence):
            quiet_trainer(tmp_path, precision=precision).fit(module, MemoryData())
    with pytest.raises(InputError, match=sentence):
        module.segment({"flair": "f.nii.gz"})


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
    assert said.startswith(
        f"pmixseg: precision {precision} (--trainer.precision) turns the weights"
    )
    assert "use 32-true, or bf16-mixed and 16-mixed" in said
    assert ("half precision loses" in said) == (precision != "64-true")


@pytest.mark.parametrize("precision", TRUE)
def test_a_model_in_python_is_refused_alike(tmp_path, precision):
    with pytest.raises(InputError, match=rf"{precision} \(--trainer.precision\) turns the weights"):
        fit(tmp_path, StudentModule(backbone=tiny(levels=2)), precision=precision)


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
        fit(tmp_path, module)


def test_a_compiler_round_a_part_of_the_module_is_refused(tmp_path):
    module = StudentModule(backbone=tiny(levels=2))
    module.backbone = torch.compile(module.backbone, backend="eager")
    with pytest.raises(InputError, match=r"around backbone, whose weights.*\(compile=True\)"):
        fit(tmp_path, module)


def test_a_copy_of_a_compiled_model_uses_its_own_weights(monkeypatch):
    compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **how: lambda *a: function(*a))
    module = StudentModule(backbone=tiny(levels=2), compile=True).eval()
    copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    image, present = torch.ones(1, 4, 8, 8, 8), torch.ones(1, 4, dtype=torch.bool)
    for other in copies:
        torch.nn.init.zeros_(next(other.backbone.parameters()))
        assert not torch.equal(other(image, present).logits, module(image, present).logits)
    compiled.cache_clear()


@pytest.mark.ddp
def test_a_training_in_processes_of_its_own_tells_all_that_it_found(tmp_path, checkpoint):
    module = load(checkpoint)
    trainer = quiet_trainer(
        tmp_path, callbacks=[PmixAlignment(weight=0.1, levels=[1])], strategy="ddp_fork", devices=2
    )
    data = MemoryData(batch_size=1)
    data.patch_size = (32, 32, 32)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "here.ckpt")
    for one in (module, load(tmp_path / "here.ckpt")):
        assert one.preparation.patch == (32, 32, 32)
        assert one.fill_levels == [1]
    assert module.identity is module.loaded_from is None  # of the weights that it began with


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
    part = DataLoader(Subset(cases.dataset, [0]), batch_size=None)
    parts = ("val_dataset", "test_dataset", "predict_dataset")
    around = LightningDataModule.from_datasets(**dict.fromkeys(parts, cases.dataset))
    around.spacing, around.normalisation = None, data.normalisation
    around.patch_size, around.split_name = (16, 16, 16), "mine"
    for run in ("validate", "test", "predict"):
        for given in (cases, part, around):
            with pytest.raises(InputError, match=refused):
                getattr(quiet_trainer(tmp_path), run)(module, given)


def test_a_data_module_that_does_not_say_how_it_was_prepared_is_refused(tmp_path):
    class Silent(LightningDataModule):
        spacing, patch_size = None, (16, 16, 16)

    with pytest.raises(InputError, match="Silent does not say normalisation, split_name"):
        quiet_trainer(tmp_path).fit(StudentModule(backbone=tiny()), Silent())


def test_a_class_that_no_checkpoint_can_name_is_refused_before_the_first_step(tmp_path):
    class Local(StudentModule):
        def training_step(self, batch, batch_idx):
            raise AssertionError("a step was made")

    with pytest.raises(InputError, match="Local is defined inside a function"):
        fit(tmp_path, Local(backbone=tiny(levels=2)), enable_checkpointing=True)


def test_a_finetuning_and_a_schedule_over_all_steps_are_refused(tmp_path):
    module = StudentModule(backbone=tiny(levels=2), scheduler=Polynomial())
    with pytest.raises(InputError, match=r"BackboneFinetuning adds parameters .* Polynomial"):
        fit(tmp_path, module, BackboneFinetuning(1))


@pytest.mark.parametrize(
    "callbacks",
    [
        [ModelCheckpoint(monitor="step", mode="max", save_top_k=2)],
        [
            LambdaCallback(on_train_epoch_end=lambda _, module: module.log("mine", 1.0)),
            EarlyStopping("mine"),
        ],
    ],
    ids=["counted", "logged by a function"],
)
def test_a_metric_that_a_training_has_may_be_watched(tmp_path, callbacks):
    module = StudentModule(backbone=tiny(levels=2))
    trainer = fit(tmp_path, module, *callbacks, enable_checkpointing=True)
    assert trainer.state.finished


@pytest.mark.parametrize(
    ("name", "value"),
    [("accumulate_grad_batches", 0), ("check_val_every_n_epoch", 0), ("gradient_clip_val", -1.0)],
)
def test_numbers_of_the_trainer_that_make_no_sense_are_refused(tmp_path, name, value):
    with pytest.raises(InputError, match=rf"{name} \(--trainer.{name}\) is {value}; give"):
        fit(tmp_path, StudentModule(backbone=tiny()), **{name: value})


def test_data_of_another_task_are_refused(tmp_path, phantom_store):
    """In another order, channels would be taken for others without a word."""
    task = replace(BRATS, modalities=("t1ce", "flair", "t1", "t2"))
    module = StudentModule(task=task, backbone=tiny(levels=2))
    with pytest.raises(InputError, match=r"'brats' \(flair, .* module of 'brats' \(t1ce, "):
        quiet_trainer(tmp_path).test(module, BraTSDataModule(phantom_store, patch_size=16))


@pytest.mark.parametrize("what", ["fit", "test", "predict"])
def test_a_trainer_without_data_says_how_they_are_given(tmp_path, what):
    run = getattr(quiet_trainer(tmp_path), what)
    with pytest.raises(InputError, match=r"no data were given .* trainer.fit\(module, datamodule="):
        run(StudentModule(backbone=tiny(levels=2)))


def loader_of(change):
    """A loader of a user's own, of one batch."""
    batch = next(iter(MemoryData().train_dataloader()))
    return DataLoader([change(batch)], batch_size=None)


WITHOUT = {
    name: lambda batch, name=name: {k: v for k, v in batch.items() if k != name}
    for name in ("image", "label", "acquired", "key", "case_id")
}
WRONG = {
    "gives a list": lambda b: list(b.values())[:2],
    "is float32 [2, 16, 16, 16]; give a dictionary": lambda b: b | {"image": b["image"][:, 0]},
    "image of the loader's batch is float32 [2, 3, 16": lambda b: b | {"image": b["image"][:, :3]},
    "image of the loader's batch is float64": lambda b: b | {"image": b["image"].double()},
    "image of the loader's batch is float16": lambda b: b | {"image": b["image"].half()},
    "image of the loader's batch is list": lambda b: b | {"image": b["image"].tolist()},
    "acquired of the loader's batch is list": lambda b: b | {"acquired": b["acquired"].tolist()},
    "key of the loader's batch is int; give int64 [2]": lambda b: b | {"key": 3},
    "label of the loader's batch is int64 [2, 1, 16": lambda b: b | {"label": b["label"][:, None]},
    "label of the loader's batch is float32": lambda b: b | {"label": b["label"].float()},
    "acquired of the loader's batch is int64": lambda b: b | {"acquired": b["acquired"].long()},
    "key of the loader's batch is int64 []": lambda b: b | {"key": b["key"][0]},
    "reach from 4 to 4": lambda b: b | {"label": b["label"] * 0 + 4},
    "reach from -1 to -1": lambda b: b | {"label": b["label"] * 0 - 1},
} | {f"has no {name}": change for name, change in WITHOUT.items()}


@pytest.mark.parametrize("said", WRONG)
def test_a_batch_of_a_users_own_loader_is_used_or_refused(tmp_path, said):
    module = StudentModule(backbone=tiny(levels=2))
    with pytest.raises(InputError, match=re.escape(said)):
        quiet_trainer(tmp_path).fit(module, loader_of(WRONG[said]))
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, loader_of(dict))
    assert trainer.global_step == 1


class OwnLoader(BraTSDataModule):
    def train_dataloader(self):
        return loader_of(WITHOUT["case_id"])


@pytest.mark.parametrize("callback", [PmixAlignment, Distillation])
def test_a_batch_without_names_of_cases_is_refused_before_any_is_read(
    tmp_path, phantom_store, callback
):
    teacher = TeacherModule(backbone=tiny(levels=2))
    terms = {"contrast": ContrastiveMatch()}
    make = {
        PmixAlignment: {"distance": "case_nce"},
        Distillation: {"teacher": teacher, "terms": terms},
    }
    own = OwnLoader(phantom_store, patch_size=16, num_workers=0, split=Fractions(0.5, 0.25))
    for data in (loader_of(WITHOUT["case_id"]), own):
        callbacks = [callback(weight=1.0, **make[callback])]
        trainer = quiet_trainer(tmp_path, callbacks=callbacks, limit_val_batches=0)
        with pytest.raises(InputError, match=r"has no case_id; give .* case_id, a list of B names"):
            trainer.fit(StudentModule(backbone=tiny(levels=2)), data)


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_a_loader_that_brings_no_case_is_refused(tmp_path, what):
    run = getattr(quiet_trainer(tmp_path), what)
    with pytest.raises(InputError, match="read whole cases of a prepared cohort"):
        run(StudentModule(backbone=tiny(levels=2)), loader_of(dict))


class Unvalidated(MemoryData):
    def val_dataloader(self):
        return []


def test_the_batch_size_that_a_tuner_finds_is_no_interruption(tmp_path, caplog):
    data, finder = Unvalidated(), BatchSizeFinder(max_trials=2, steps_per_trial=1)
    module = StudentModule(backbone=tiny(levels=2))
    with caplog.at_level("INFO"):
        fit(tmp_path, module, finder, data=data, limit_val_batches=0)
    assert data.batch_size == 4
    assert "interruption" not in caplog.text
