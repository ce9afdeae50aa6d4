"""What serves twice, a callback or a module, begins anew: nothing of one run gets into the next."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from pmixseg.callbacks import GapMonitor, TemperatureFitting
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.evaluation.records.sidecar import checkpoint_identity
from pmixseg.evaluation.scores.calibration import Temperatures
from pmixseg.modules import StudentModule, load
from pmixseg.modules.checkpoint import write_temperatures
from tests.callbacks.memory_data import quiet_trainer, tiny


def data(store):
    return BraTSDataModule(store, patch_size=16, batch_size=2, val_cases=1, seed=2)


def student(seed):
    torch.manual_seed(seed)
    return StudentModule(
        backbone=tiny(levels=2),
        evaluation=EvaluationSettings(window=(32, 40, 32), validation="balanced"),
    )


def fit(store, folder, seed, *callbacks, **arguments):
    settings = {"limit_train_batches": 1, "num_sanity_val_steps": 0, **arguments}
    trainer = quiet_trainer(folder, callbacks=list(callbacks), **settings)
    trainer.fit(student(seed), data(store))
    return trainer


def test_temperatures_are_those_of_one_model(phantom_store, tmp_path):
    for seed in (0, 1):
        trainer = fit(phantom_store, tmp_path, seed, limit_val_batches=0)
        trainer.save_checkpoint(tmp_path / f"{seed}.ckpt")

    def fitted(fitting, seed):
        module = load(tmp_path / f"{seed}.ckpt")
        trainer = quiet_trainer(tmp_path, callbacks=[fitting])
        trainer.validate(module, data(phantom_store), verbose=False)
        return [fitting.fit.cross_entropy(shown, 1.0) for shown in (1, 2, 3, 4)]

    twice = TemperatureFitting(tmp_path / "out.ckpt", voxels_per_case=500)
    first = fitted(twice, 0)
    again = fitted(twice, 1)
    assert again == fitted(TemperatureFitting(tmp_path / "out.ckpt", voxels_per_case=500), 1)
    assert again != first


def test_a_monitor_guards_against_the_start_of_its_own_training(phantom_store, tmp_path):
    def monitor():
        return GapMonitor(cases=1, points=64, pictures=False, every=2)

    twice, once = monitor(), monitor()
    fit(phantom_store, tmp_path, 0, twice)
    first = dict(twice._guard)
    twice._warned.add("gap/level0/rank_within")
    trainer = fit(phantom_store, tmp_path, 1, twice)
    fit(phantom_store, tmp_path, 1, once)
    assert twice._guard == once._guard != first
    assert (twice._validations, twice._warned) == (once._validations, once._warned)
    # The same training, told to go on: nothing is aligned, so the guard goes along.
    trainer.fit_loop.max_epochs = 2
    trainer.fit(student(1), data(phantom_store))
    assert twice._guard.keys() == once._guard.keys() and twice._guard != once._guard
    assert twice._validations == 2


@pytest.mark.parametrize("wrong", [{"points": 1}, {"points": 0}, {"cases": 0}, {"every": 0}])
def test_a_monitor_needs_two_points(wrong):
    with pytest.raises(InputError, match=r"is \d; give [12] or more"):
        GapMonitor(**wrong)
    GapMonitor(points=2, cases=1)


def test_records_name_the_checkpoint_whose_weights_were_tested(phantom_store, tmp_path):
    """Not a file that has since been replaced, nor one whose weights were trained on."""
    first, last, moved = (tmp_path / f"{name}.ckpt" for name in ("first", "last", "moved"))
    fit(phantom_store, tmp_path, 0, limit_val_batches=0).save_checkpoint(first)
    fit(phantom_store, tmp_path, 1, limit_val_batches=0).save_checkpoint(last)

    class Replace(Callback):
        def on_test_batch_start(self, *_):
            shutil.copy(last, moved)

    def tested(module, **arguments):
        trainer = quiet_trainer(tmp_path, callbacks=[Replace()])
        trainer.test(module, data(phantom_store), verbose=False, **arguments)
        return json.loads((tmp_path / "records.json").read_text())["checkpoint"]

    shutil.copy(first, moved)
    name = checkpoint_identity(moved)
    assert (
        tested(student(3), ckpt_path=moved, weights_only=True) == name != checkpoint_identity(moved)
    )
    shutil.copy(first, moved)
    module = load(moved)
    assert tested(module) == name
    assert tested(module, ckpt_path=last, weights_only=True) == checkpoint_identity(last)
    assert tested(module) == checkpoint_identity(last)
    quiet_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(
        module, data(phantom_store)
    )
    assert tested(module) is None


def test_settings_that_are_not_those_of_the_checkpoint_are_told(phantom_store, tmp_path, recwarn):
    path = tmp_path / "a.ckpt"
    fit(phantom_store, tmp_path, 0, limit_val_batches=0).save_checkpoint(path)

    def told(module):
        recwarn.clear()
        trainer = quiet_trainer(tmp_path, limit_val_batches=1)
        trainer.validate(module, data(phantom_store), path, verbose=False, weights_only=True)
        return [str(w.message) for w in recwarn if "own settings" in str(w.message)]

    assert told(student(1)) == []
    other = student(1)
    other.evaluation = replace(other.evaluation, overlap=0.25)
    assert told(other) == [
        "StudentModule.evaluation.overlap is 0.25, the checkpoint had 0.5: the module's own "
        "settings hold; pmixseg.load gives a module with those of the checkpoint."
    ]


def test_temperatures_do_not_outlive_their_weights(phantom_store, tmp_path):
    path = tmp_path / "a.ckpt"
    fit(phantom_store, tmp_path, 0, limit_val_batches=0).save_checkpoint(path)
    module = load(write_temperatures(path, Temperatures(dict.fromkeys((1, 2, 3, 4), 2.0)), path))
    trainer = quiet_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    with pytest.warns(UserWarning, match="temperatures .* were fitted to other weights"):
        trainer.fit(module, data(phantom_store))
    trainer.save_checkpoint(path)
    assert load(path).evaluation.temperatures is None


def test_a_model_that_was_loaded_is_trained_as_one_that_was_made(phantom_store, tmp_path):
    """With its dropout: `load` leaves a model ready to segment, and Lightning keeps it so."""
    fit(phantom_store, tmp_path, 0, limit_val_batches=0).save_checkpoint(tmp_path / "a.ckpt")
    module, seen = load(tmp_path / "a.ckpt"), []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(all(part.training for part in pl_module.modules()))

    quiet_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0, callbacks=[Look()]).fit(
        module, data(phantom_store)
    )
    assert seen == [True]
