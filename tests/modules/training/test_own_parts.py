"""A fit has the terms, rates and schedules of its own module and callbacks, and no others."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning
from torch.optim.lr_scheduler import StepLR

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.callbacks import Distillation, PmixAlignment, RunCheckpoint
from pmixseg.errors import InputError
from pmixseg.modules import StudentModule, TeacherModule
from pmixseg.modules.pretraining import MaskedPretraining
from pmixseg.task import BRATS
from tests.callbacks.memory_data import MemoryData, fit, quiet_trainer, tiny


def logged(folder, module, *callbacks, **arguments):
    trainer = fit(folder, module, *callbacks, **arguments)
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
    names, _ = logged(tmp_path, module, make(5.0))
    assert f"train/{kind}" in names
    names, metrics = logged(tmp_path, module)
    assert (names, list(module.terms), module.term_weights) == (set(), [], {})
    assert metrics["train/loss"] == pytest.approx(metrics["train/seg"])
    fit(tmp_path, module, make(5.0))
    names, _ = logged(tmp_path, module, make(0.0))
    assert names == set()
    fit(tmp_path, module, make(5.0))
    fit(tmp_path, module, make(1.0, name="other"))
    assert list(module.terms) == ["other"]
    assert not any("terms.align" in name for name in module.state_dict())


def test_a_callback_whose_weight_is_set_to_zero_lends_nothing(tmp_path):
    module, callback = StudentModule(backbone=tiny()), PmixAlignment(weight=1.0)
    trainer = fit(tmp_path, module, callback)
    callback.weight = 0.0
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, MemoryData())
    assert list(module.terms) == []


def test_a_training_that_failed_at_once_lends_nothing(tmp_path):
    class Fails(Callback):
        def setup(self, trainer, module, stage):
            raise RuntimeError("no disk")

    module = StudentModule(backbone=tiny())
    with pytest.raises(RuntimeError, match="no disk"):
        fit(tmp_path, module, PmixAlignment(weight=1.0), Fails())
    assert list(module.terms) == ["align"]
    fit(tmp_path, module)
    assert list(module.terms) == []


def test_the_same_callback_keeps_its_place_and_a_save_after_a_fit_keeps_its_term(tmp_path):
    module, callback = StudentModule(backbone=tiny()), PmixAlignment(weight=1.0)
    trainer = fit(tmp_path, module, callback)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = PmixAlignment(weight=1.0)
    again = fit(tmp_path, module, other, resume=tmp_path / "a.ckpt", max_epochs=2)
    assert list(module.terms) == ["align"]
    assert again.global_step == 4


def test_a_modules_own_term_stays(tmp_path):
    module = MaskedPretraining(backbone=tiny())
    for _ in range(2):
        names, _ = logged(tmp_path, module, limit_val_batches=0)
        assert names == {"train/reconstruct"}


class Manual(StudentModule):
    """Steps its optimizer itself, and its schedule at every batch."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.automatic_optimization = False

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return [optimizer], [StepLR(optimizer, 1, 0.8)]

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()


class Seldom(StudentModule):
    """Steps its schedule at every second batch, by Lightning's count once in an epoch of three."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        schedule = {"scheduler": StepLR(optimizer, 1, 0.8), "interval": "step", "frequency": 2}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Thaw(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.backbone.encoders)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.backbone.encoders, optimizer, lr=1e-4)


class Once(StudentModule):
    """Changes its rate without a schedule."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            for group in self.optimizers().param_groups:
                group["lr"] = 0.08


def trained(kind, folder, epochs, resume=None, callbacks=()):
    """Weights and the learning rate at the end."""
    torch.manual_seed(0)
    module = kind(backbone=tiny(levels=2))
    keep = [RunCheckpoint(folder), *callbacks]
    trainer = quiet_trainer(folder, max_epochs=epochs, enable_checkpointing=True, callbacks=keep)
    trainer.fit(module, MemoryData(((True,) * 4,) * 6), ckpt_path=resume, weights_only=True)
    return [*module.state_dict().values(), trainer.optimizers[0].param_groups[0]["lr"]]


@pytest.mark.parametrize(
    ("kind", "rate"), [(Manual, 0.1 * 0.8**9), (Seldom, 0.1 * 0.8**3), (Once, 0.08), (None, 1e-3)]
)
def test_what_a_users_own_code_has_done_is_gone_on_with(tmp_path, kind, rate):
    def run(*where):
        callbacks = [Thaw()] if kind is None else []
        return trained(kind or StudentModule, *where, callbacks=callbacks)

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "part", 2)
    resumed = run(tmp_path / "part", 3, tmp_path / "part" / "checkpoints" / "last.ckpt")
    assert whole[-1] == pytest.approx(rate)
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.parametrize("other", [{"levels": 2}, {"modalities": ("t1", "t2")}, {"num_classes": 2}])
def test_a_backbone_put_in_place_of_another_fits_its_module(tmp_path, other):
    module = StudentModule(backbone=tiny())
    module.backbone = MultiEncoderUNet(
        **{"modalities": BRATS.modalities, "num_classes": 4, "width": 4, "levels": 3, **other}
    )
    with pytest.raises(InputError, match=r"was replaced by one with .*; make a new StudentModule"):
        fit(tmp_path, module)
    module.backbone = tiny()
    fit(tmp_path, module)


def test_a_lazy_layer_that_nothing_uses_is_one_sentence(tmp_path):
    module = StudentModule(backbone=tiny())
    module.backbone.unused = torch.nn.LazyConv3d(3, 1)
    with pytest.raises(InputError, match="a lazy layer of the network was not used"):
        fit(tmp_path, module)
