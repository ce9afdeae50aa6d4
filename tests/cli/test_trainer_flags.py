"""Flags of a training: they work, win over a checkpoint when it is resumed, or are one sentence."""

import os
import re
from typing import Optional, Union

import pytest
import yaml
from lightning.pytorch import Callback

from pmixseg.argument_checks import nearest
from pmixseg.cli import main
from pmixseg.cli.arguments import repeated, split_class, with_split_class
from pmixseg.cli.training import TrainingCLI
from pmixseg.cli.training_parser import whole_numbers_first
from pmixseg.errors import InputError
from pmixseg.files import lock_folder
from pmixseg.modules.checkpoint import read_checkpoint
from tests.cli.presets import last_of_each
from tests.cli.test_training import TINY

ADAM = "--model.optimizer=torch.optim.AdamW"
ONE_CYCLE = "--model.scheduler=pmixseg.modules.OneCycle"
PLATEAU = "--model.scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau"


def fit(store, run, *flags):
    command = ["fit", f"--run={run}", f"--data.store={store}", "--model=StudentModule"]
    return main([*command, *last_of_each([*TINY, *flags])])


def trained(store, run, *flags):
    """The checkpoint of one step, and what the run's configuration says of the model."""
    assert fit(store, run, "--trainer.limit_train_batches=1", *flags) == 0
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    config = yaml.safe_load((run / "config.yaml").read_text())
    return checkpoint, config["model"]["init_args"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.overfit_batches=1", "--data.batch_size=1"],
        ["--trainer.overfit_batches=1.0", "--trainer.max_epochs=2"],
        ["--trainer.callbacks=LearningRateMonitor", "--trainer.limit_train_batches=1"],
        [ONE_CYCLE, "--trainer.max_steps=1"],
        [ONE_CYCLE, "--trainer.fast_dev_run=true"],
        ["--trainer.callbacks=Timer", "--trainer.callbacks.duration=00:00:10:00"],
    ],
)
def test_flags_of_the_trainer_work(phantom_store, tmp_path, flags, recwarn):
    assert fit(phantom_store, tmp_path, *flags) == 0
    assert not [w for w in recwarn if "overfit" in str(w.message) or "is 0" in str(w.message)]


@pytest.mark.parametrize(
    ("flags", "tried"),
    [([], True), (["--trainer.benchmark=false"], False), (["--trainer.deterministic=true"], False)],
)
def test_cudnn_tries_its_kernels_unless_a_run_shall_be_the_same_each_time(
    phantom_store, tmp_path, monkeypatch, flags, tried
):
    settings = []

    def stop(cli, config, callbacks):
        settings.append(config["benchmark"])
        raise InputError("enough")

    monkeypatch.setattr(TrainingCLI, "_instantiate_trainer", stop)
    assert fit(phantom_store, tmp_path, *flags) == 1
    assert [bool(setting) for setting in settings] == [tried]


@pytest.mark.parametrize("number", ["1", "1.0", "3", "0.5"])
def test_one_batch_is_not_all_of_them(number, capsys):
    parts = ("train", "val", "test", "predict")
    with pytest.raises(SystemExit):
        main(["fit", "--print_config", *(f"--trainer.limit_{p}_batches={number}" for p in parts)])
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    limits = [trainer[f"limit_{part}_batches"] for part in parts]
    assert [repr(limit) for limit in limits] == [number] * 4


def test_whole_numbers_are_tried_first_however_a_hint_is_spelt():
    swapped = Union[float, int, None]  # noqa: UP007  # the two that Python takes for the same
    assert swapped == Optional[Union[int, float]]  # noqa: UP007, UP045
    assert whole_numbers_first(swapped).__args__ == (int, float, type(None))
    assert whole_numbers_first(float) is float
    assert whole_numbers_first(Union[float, str]).__args__ == (float, str)  # noqa: UP007


def test_another_rate_is_said_stored_and_used(phantom_store, tmp_path, capsys):
    quick = "--trainer.limit_val_batches=0"
    trained(phantom_store, tmp_path, quick, ADAM)
    resume = f"--ckpt_path={tmp_path}/checkpoints/last.ckpt"
    rates = ["--model.optimizer.lr=1e-6", "--model.optimizer.weight_decay=0.5"]
    capsys.readouterr()
    checkpoint, config = trained(
        phantom_store, tmp_path, quick, ADAM, *rates, resume, "--trainer.max_epochs=2"
    )
    said = capsys.readouterr().err
    assert "optimizer.init_args.lr is 1e-06, the checkpoint had 0.001 (the flags win)" in said
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-6, 0.5), (1e-6, 0.0)]
    for told in (checkpoint["pmixseg"]["init_args"], config):
        assert told["optimizer"]["init_args"]["lr"] == 1e-6
        assert told["optimizer"]["init_args"]["weight_decay"] == 0.5


def test_two_trainings_do_not_share_a_run_folder(phantom_store, tmp_path, capsys):
    held = lock_folder(tmp_path / "checkpoints")
    assert fit(phantom_store, tmp_path) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        f"pmixseg: another training writes into {tmp_path}/checkpoints; wait for its end"
    )
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints"]
    os.close(held)
    one = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0"]
    assert fit(phantom_store, tmp_path, *one) == 0
    os.close(lock_folder(tmp_path / "checkpoints"))  # let go of


def test_a_plateau_is_told_as_it_is(phantom_store, tmp_path):
    checkpoint, config = trained(phantom_store, tmp_path, ADAM, PLATEAU)
    assert checkpoint["pmixseg"]["init_args"]["scheduler"]["init_args"]["mode"] == "max"
    assert config["scheduler"]["init_args"]["mode"] == "max"
    assert checkpoint["lr_schedulers"][0]["mode"] == "max"
    # Written before the schedule is told of this epoch; a resumed training tells it.
    assert 0 <= checkpoint["pending_metrics"]["val/dice"] <= 1


def test_without_model_a_student_is_trained(phantom_store, tmp_path):
    flags = [f for f in TINY if "window" not in f]
    command = ["fit", f"--data.store={phantom_store}", "--trainer.fast_dev_run=true"]
    window = "--model.evaluation.window=[32,40,32]"
    assert main([*command, f"--run={tmp_path}/a", *flags, window]) == 0
    only = ["--model.backbone=MultiEncoderUNet", "--model.backbone.width=4"]
    rest = [f for f in flags if not f.startswith("--model")]
    assert main([*command, f"--run={tmp_path}/b", *only, *rest, window]) == 0


def test_a_split_class_is_guessed_from_its_arguments(tmp_path):
    flags = ["fit", "--data.split.train=a.txt", "--data.split.val", "b.txt"]
    split = "--data.split=pmixseg.data.SplitFiles"
    assert with_split_class(flags) == ["fit", split, *flags[1:]]
    assert split_class({"train": 0.5, "val": 0.5, "test": 0}) == "pmixseg.data.Fractions"
    assert split_class({"path": "a.json", "fold": 1}) == "pmixseg.data.SplitJson"
    assert split_class({"folds": 3}) == "pmixseg.data.KFold"
    assert split_class({"train": "a.txt", "missing": "skip"}) == "pmixseg.data.SplitFiles"
    assert split_class({"path": "a.json", "missing": "skip"}) == "pmixseg.data.SplitJson"
    assert split_class({"train": ["a"], "test": ["b"]}) == "pmixseg.data.SplitLists"
    assert split_class({"part": "val"}) == "pmixseg.data.WholeCohort"
    named = ["fit", "--data.split=KFold", "--data.split.fold=1"]
    assert with_split_class(named) == named
    (tmp_path / "a.yaml").write_text("data: {split: {class_path: KFold}}")
    in_a_file = ["fit", "-c", str(tmp_path / "a.yaml"), "--data.split.fold=1"]
    assert with_split_class(in_a_file) == in_a_file
    with pytest.raises(InputError, match="did you mean train"):
        split_class({"trian": "a.txt"})
    assert nearest("abc", ["xyz"]) == ""


@pytest.mark.parametrize("how", ["flags", "file"])
def test_a_split_is_spelt_the_same_with_or_without_a_file(phantom_store, tmp_path, how):
    names = sorted(p.name for p in (phantom_store / "cases").iterdir())
    for part, cases in {"train": names[:2], "val": names[2:3], "test": names[3:4]}.items():
        (tmp_path / f"{part}.txt").write_text("\n".join(cases))
    split = [f"--data.split.{part}={tmp_path}/{part}.txt" for part in ("train", "val", "test")]
    if how == "file":
        text = "data:\n  split:\n" + "".join(
            f"    {part}: {tmp_path}/{part}.txt\n" for part in ("train", "val", "test")
        )
        (tmp_path / "a.yaml").write_text(text)
        split = ["-c", str(tmp_path / "a.yaml")]
    command = ["fit", f"--run={tmp_path}/r", f"--data.store={phantom_store}", *split, *TINY]
    quick = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0"]
    assert main([*command, *quick]) == 0
    assert "SplitFiles" in (tmp_path / "r" / "config.yaml").read_text()


def test_a_checkpoint_of_a_run_by_name(phantom_store, tmp_path, capsys):
    run = tmp_path / "r"
    command = ["fit", f"--run={run}", f"--data.store={phantom_store}", *TINY]
    assert main([*command, "--trainer.limit_train_batches=1"]) == 0
    for name in ("last", "best"):
        test = ["test", f"--ckpt_path={name}", f"--data.store={phantom_store}"]
        assert main([*test, f"--run={run}", "--trainer.limit_test_batches=1"]) == 0
        (run / "records.csv").unlink()
    capsys.readouterr()
    assert main(test) == 1
    assert "say which one with --run" in capsys.readouterr().err


class Found(Callback):
    # What Lightning's finders of a batch size and of a rate do.
    def on_fit_start(self, trainer, pl_module):
        trainer.datamodule.batch_size, pl_module.lr = 1, 0.125


def test_the_configuration_states_the_batch_size_and_rate_that_were_found(phantom_store, tmp_path):
    flags = ["--import=tests.cli.test_trainer_flags"]
    flags += ["--trainer.callbacks=tests.cli.test_trainer_flags.Found"]
    checkpoint, model = trained(phantom_store, tmp_path / "r", *flags)
    config = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert config["data"]["batch_size"] == 1
    assert model["optimizer"] == checkpoint["pmixseg"]["init_args"]["optimizer"]
    assert model["optimizer"]["init_args"]["lr"] == 0.125


def test_a_barebones_training_keeps_nothing_without_advice(phantom_store, tmp_path, recwarn):
    few = [flag for flag in TINY if "enable_" not in flag]
    flags = [f"--run={tmp_path}", f"--data.store={phantom_store}", "--trainer.barebones=true"]
    assert main(["fit", *flags, *few, "--trainer.limit_train_batches=1"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert not [w for w in recwarn if "barebones" in str(w.message)]


def test_a_command_that_does_nothing_says_so(phantom_store, tmp_path, capsys):
    assert fit(phantom_store, tmp_path, "--trainer.limit_train_batches=1") == 0
    given = [f"--run={tmp_path}", "--ckpt_path=last", "--trainer.accelerator=cpu"]
    for command, part in (("validate", "val"), ("test", "test"), ("predict", "predict")):
        with pytest.warns(UserWarning, match=rf"limit_{part}_batches\) is 0, so there is nothing"):
            assert main([command, *given, f"--trainer.limit_{part}_batches=0"]) == 0
    split = "--data.split=WholeCohort"
    assert main(["validate", *given, split, f"--calibrate={tmp_path}/c.ckpt"]) == 1
    assert "the split has no case in 'val'" in capsys.readouterr().err


def test_a_scheduler_of_two_classes_is_named_by_its_path(phantom_store, tmp_path, capsys):
    assert fit(phantom_store, tmp_path, "--model.scheduler=ReduceLROnPlateau") == 2
    told = capsys.readouterr().err
    assert (
        "several classes are a ReduceLROnPlateau" in told
        and "torch.optim.lr_scheduler.ReduceLROnPlateau" in told
    )


def test_help_begins_with_what_is_used_most(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    usage, _, options = capsys.readouterr().out.partition("options:")
    assert len(usage.splitlines()) < 12
    for flag in re.findall(r"\[(--[\w.]+)", usage.replace("--OPTION", "")):
        assert f" {flag} " in options or flag == "--model.backbone", flag  # of a model's class


def test_help_of_a_test_says_what_it_does_in_whole_sentences(capsys):
    with pytest.raises(SystemExit):
        main(["test", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Score a checkpoint on every combination of sequences. options:" in text
    assert "--align.weight WEIGHT] [--distill.teacher" not in text  # which a test does not read
    assert "never run on your" not in text  # half a sentence of Lightning's
    assert "Checkpoint to read: a path, or last or best, those of --run" in text


def test_help_of_a_split_is_shown(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--data.split.help", "Fractions"])
    assert "Split at random by shares of the cohort" in capsys.readouterr().out


def test_a_list_is_appended_to_by_flags_of_one_name():
    entry = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/dice"]
    assert repeated(["fit", *entry, "-c", "a", "-c", "b", *entry, "--data.seed", "-1"]) is None
    assert repeated(["fit", *entry, entry[1]]) == "--trainer.callbacks.monitor"
    assert repeated(["fit", "--run", "a", "--run=b"]) == "--run"


def test_no_more_processes_are_started_than_cores_can_carry(phantom_store, tmp_path, capsys):
    command = ["fit", f"--run={tmp_path}", f"--data.store={phantom_store}", *TINY]
    assert main([*command, "--trainer.devices=999"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("pmixseg: devices 999 (--trainer.devices) would start as many ")
