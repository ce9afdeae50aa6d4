"""A fit has the terms of its own callbacks and of its module, and no others."""

import pytest

from pmixseg.callbacks import Distillation, PmixAlignment, RunCheckpoint
from pmixseg.modules import StudentModule, TeacherModule
from pmixseg.modules.pretraining import MaskedPretraining
from tests.callbacks.memory_data import MemoryData, quiet_trainer, tiny


def fit(folder, module, *callbacks, **arguments):
    trainer = quiet_trainer(folder, callbacks=list(callbacks), **arguments)
    trainer.fit(module, MemoryData())
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
    return set(metrics) - {"train/loss", "train/seg"}, metrics


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    module = TeacherModule(backbone=tiny())
    fit(folder, module, RunCheckpoint(folder), enable_checkpointing=True, limit_val_batches=0)
    return str(folder / "checkpoints" / "last.ckpt")


def callbacks_of(teacher):
    return {
        "align": lambda weight, **more: PmixAlignment(weight=weight, **more),
        "distill": lambda weight, **more: Distillation(teacher, weight=weight, **more),
    }


@pytest.mark.parametrize("kind", ["align", "distill"])
def test_a_term_of_an_earlier_fit_is_gone(tmp_path, teacher, kind):
    make = callbacks_of(teacher)[kind]
    module = StudentModule(backbone=tiny())
    names, _ = fit(tmp_path, module, make(5.0))
    assert f"train/{kind}" in names
    names, metrics = fit(tmp_path, module)
    assert (names, list(module.terms), module.term_weights) == (set(), [], {})
    assert metrics["train/loss"] == pytest.approx(metrics["train/seg"])
    fit(tmp_path, module, make(5.0))
    names, _ = fit(tmp_path, module, make(0.0))
    assert names == set()
    fit(tmp_path, module, make(5.0))
    fit(tmp_path, module, make(1.0, name="other"))
    assert list(module.terms) == ["other"]
    assert not any("terms.align" in name for name in module.state_dict())


def test_a_callback_whose_weight_is_set_to_zero_lends_nothing(tmp_path):
    module, callback = StudentModule(backbone=tiny()), PmixAlignment(weight=1.0)
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    trainer.fit(module, MemoryData())
    callback.weight = 0.0
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, MemoryData())
    assert list(module.terms) == []


def test_the_same_callback_keeps_its_place_and_a_save_after_a_fit_keeps_its_term(tmp_path):
    module, callback = StudentModule(backbone=tiny()), PmixAlignment(weight=1.0)
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    trainer.fit(module, MemoryData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = quiet_trainer(tmp_path, max_epochs=2, callbacks=[PmixAlignment(weight=1.0)])
    again.fit(module, MemoryData(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert list(module.terms) == ["align"]
    assert again.global_step == 4


def test_a_modules_own_term_stays(tmp_path):
    module = MaskedPretraining(backbone=tiny())
    for _ in range(2):
        names, _ = fit(tmp_path, module, limit_val_batches=0)
        assert names == {"train/reconstruct"}
