"""``last.ckpt`` is the latest epoch, ``best.ckpt`` the best; a training goes on from the last."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from pmixseg.callbacks import RunCheckpoint
from pmixseg.callbacks import run as run_module
from pmixseg.errors import InputError
from pmixseg.modules import StudentModule
from pmixseg.modules.checkpoint import write_checkpoint
from tests.callbacks.memory_data import MemoryData, Samples, quiet_trainer, tiny

STEPS = 2
"""Steps of one epoch of :class:`Data`."""


class Data(MemoryData):
    """As a user writes one: without the parts of a split."""

    def val_dataloader(self):
        return DataLoader(Samples(self.acquired[:1]))


class Falling(StudentModule):
    """Validates in its own way, and worse from epoch to epoch."""

    def validation_step(self, batch, batch_idx):
        self.log("val/dice", 1 / (1 + self.global_step), batch_size=1)


class Seen(Callback):
    """What happened, in order, and what the last checkpoint held when an epoch began."""

    def __init__(self, last):
        self.last, self.events, self.held = last, [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.events.append(f"epoch {trainer.current_epoch}")
        self.held.append(read(self.last)["global_step"] if self.last.is_file() else None)

    def on_validation_start(self, trainer, pl_module):
        self.events.append("validation")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.events.append((batch_idx, batch["key"].tolist()))


def read(path):
    return torch.load(path, weights_only=True)


def fit(folder, *callbacks, resume=None, **arguments):
    torch.manual_seed(4)
    module = Falling(backbone=tiny(levels=2))
    seen = Seen(folder / "checkpoints" / "last.ckpt")
    settings = {"enable_checkpointing": True, "num_sanity_val_steps": 0, **arguments}
    every = [seen, *callbacks, RunCheckpoint(folder)]
    trainer = quiet_trainer(folder, callbacks=every, **settings)
    trainer.fit(module, Data(), ckpt_path=resume, weights_only=True)
    return module.state_dict(), seen


def assert_equal(weights, path):
    kept = read(path)["state_dict"]
    assert all(torch.equal(value, kept[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("arguments", "best"),
    [
        ({}, STEPS),
        ({"check_val_every_n_epoch": 2}, 2 * STEPS),
        ({"check_val_every_n_epoch": 9}, None),
        ({"limit_val_batches": 0}, None),
        ({"val_check_interval": 0.5}, 1),
    ],
)
def test_the_last_is_the_latest_epoch_whether_or_not_it_is_the_best(tmp_path, arguments, best):
    weights, seen = fit(tmp_path, max_epochs=3, **arguments)
    assert seen.held == [None, STEPS, 2 * STEPS]
    assert read(seen.last)["global_step"] == 3 * STEPS
    assert_equal(weights, seen.last)
    best_file = seen.last.with_name("best.ckpt")
    assert (read(best_file)["global_step"] if best_file.is_file() else None) == best
    names = {"last.ckpt"} if best is None else {"last.ckpt", "best.ckpt"}
    assert {p.name for p in seen.last.parent.iterdir()} == names


@pytest.mark.parametrize("arguments", [{}, {"limit_val_batches": 0}])
def test_a_training_that_ends_within_an_epoch_is_kept(tmp_path, arguments):
    weights, seen = fit(tmp_path, max_steps=STEPS + 1, max_epochs=-1, **arguments)
    assert read(seen.last)["global_step"] == STEPS + 1
    assert_equal(weights, seen.last)


@pytest.mark.parametrize("unit", ["epochs", "steps"])
@pytest.mark.parametrize(
    ("arguments", "best"),
    [({}, STEPS), ({"check_val_every_n_epoch": 2}, 2 * STEPS), ({"limit_val_batches": 0}, None)],
)
def test_resuming_from_the_last_repeats_and_loses_nothing(tmp_path, unit, arguments, best):
    def until(epochs):
        steps = {"max_steps": epochs * STEPS, "max_epochs": -1}
        return {**arguments, **({"max_epochs": epochs} if unit == "epochs" else steps)}

    whole, one = fit(tmp_path / "whole", **until(4))
    for end in (2, 3):
        part = tmp_path / f"part{end}"
        _, first = fit(part, **until(end))
        resumed, rest = fit(part, resume=first.last, **until(4))
        assert first.events + rest.events == one.events
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
        if best is not None:
            assert read(first.last.with_name("best.ckpt"))["global_step"] == best


def test_after_an_epoch_that_was_cut_short_comes_the_next(tmp_path):
    _, first = fit(tmp_path, max_steps=STEPS + 1, max_epochs=-1)
    _, rest = fit(tmp_path, resume=first.last, max_steps=2 * STEPS + 1, max_epochs=-1)
    names = [[e for e in seen.events if isinstance(e, str)] for seen in (first, rest)]
    assert names == [["epoch 0", "validation", "epoch 1"], ["epoch 2", "validation"]]
    assert read(first.last)["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 3
    assert read(first.last)["global_step"] == 2 * STEPS + 1


class Fail(Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2 * STEPS + 1:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine")])
def test_what_stops_a_training_leaves_the_last_whole_epoch(tmp_path, error):
    with pytest.raises((SystemExit, ValueError)):
        fit(tmp_path, Fail(error), max_epochs=3)
    checkpoints = tmp_path / "checkpoints"
    assert read(checkpoints / "last.ckpt")["global_step"] == 2 * STEPS
    assert read(checkpoints / "best.ckpt")["global_step"] == STEPS


def test_an_epoch_writes_its_weights_once(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        run_module,
        "write_checkpoint",
        lambda state, path: (
            written.append(path.rsplit("/", 1)[-1]) or write_checkpoint(state, path)
        ),
    )
    _, seen = fit(tmp_path, max_epochs=1)
    assert written == ["best.ckpt"]
    assert seen.last.samefile(seen.last.with_name("best.ckpt"))
    fit(tmp_path, max_epochs=2, resume=seen.last)  # what is written later leaves the best alone
    assert written == ["best.ckpt", "last.ckpt"]
    assert read(seen.last.with_name("best.ckpt"))["global_step"] == STEPS


def test_a_disk_without_links_gets_two_files(tmp_path, monkeypatch):
    def refused(self, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refused)
    weights, seen = fit(tmp_path, max_epochs=1)
    assert not seen.last.samefile(seen.last.with_name("best.ckpt"))
    assert_equal(weights, seen.last)


class Silent(Falling):
    def validation_step(self, batch, batch_idx): ...


def test_without_the_score_of_the_best_it_says_so(tmp_path):
    trainer = quiet_trainer(
        tmp_path, callbacks=[RunCheckpoint(tmp_path)], enable_checkpointing=True
    )
    with pytest.raises(InputError, match=r"of this Silent logs no val/dice, .* log it, or leave"):
        trainer.fit(Silent(backbone=tiny(levels=2)), Data())


def test_lightning_says_nothing_about_its_checkpoints(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(tmp_path, max_epochs=2)
    assert "weights_only" not in caplog.text
