"""On a card: what a CPU computes, in half precision, compiled, resumed, segmented."""

import copy

import nibabel as nib
import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging

from pmixseg.callbacks import PmixAlignment
from pmixseg.cli import main
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.splits import WholeCohort
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.evaluation.records.records import Records
from pmixseg.modules import StudentModule
from tests.callbacks.memory_data import MemoryData, quiet_trainer, tiny
from tests.inference.tiny_models import BACKBONES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CARD, TRAINER = "cuda", {"accelerator": "gpu", "devices": 1}
UNEQUAL = ((True,) * 4, (True, False, False, False), (False, True, True, False), (True,) * 4)


@pytest.fixture(autouse=True)
def same_noise(monkeypatch):
    """Noise that does not depend on the device."""
    monkeypatch.setattr(
        torch,
        "randn_like",
        lambda x: torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape).to(x.device),
    )


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "demoseg"])
def test_forward_loss_and_gradients_are_those_of_a_cpu(name):
    """In float64, which no tensor core rounds."""
    make, criterion, side = BACKBONES[name]
    side = 32 if name == "early" else side
    torch.manual_seed(0)
    here = make().double().train()
    there = copy.deepcopy(here).to(CARD)
    shown = torch.tensor([[True, True, False, True], [False, True, True, True]])
    image = torch.randn(2, 4, side, side, side).double() * shown[:, :, None, None, None]
    label = torch.randint(0, 4, (2, side, side, side))
    losses = []
    for net, device in ((here, "cpu"), (there, CARD)):
        flags = shown.to(device)
        batch = {"image": image.to(device), "label": label.to(device)}
        batch |= {"present": flags, "acquired": flags}
        output = net(batch["image"], flags)
        loss = criterion()(output, batch, 0)
        loss.backward()
        losses.append((output.logits.cpu(), loss.cpu()))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-8)
    theirs = dict(there.named_parameters())
    for key, parameter in here.named_parameters():
        zero = torch.zeros_like(parameter)
        one = zero if parameter.grad is None else parameter.grad
        other = zero if theirs[key].grad is None else theirs[key].grad.cpu()
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-8, msg=key)


def trained(folder, *, epochs=2, resume=None, setting=False, more=(), **arguments):
    """A module and the loss of every step."""
    losses = []
    seed_everything(0, verbose=False)
    module = StudentModule(backbone=tiny(), compile=setting)
    step = module.training_step
    module.training_step = lambda *batch: losses.append(step(*batch)) or losses[-1]
    trainer = quiet_trainer(
        folder,
        max_epochs=epochs,
        gradient_clip_val=1.0,
        callbacks=[PmixAlignment(weight=0.1), *more],
        **{**TRAINER, **arguments},
    )
    trainer.fit(module, MemoryData(UNEQUAL), ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module.cpu(), torch.stack([loss.detach().cpu() for loss in losses])


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_half_precision_trains_and_stays_finite(tmp_path, precision):
    module, losses = trained(tmp_path, epochs=4, precision=precision)
    assert losses.isfinite().all()
    assert losses[-2:].mean() < losses[:2].mean()
    for parameter in module.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.isfinite().all()


def test_a_training_follows_that_of_a_cpu(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "card").mkdir()
    here = trained(tmp_path / "cpu", accelerator="cpu")[1]
    there = trained(tmp_path / "card")[1]
    torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-2)  # TF32


def test_the_same_seed_gives_the_same_training(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = (trained(tmp_path / name)[1] for name in ("one", "two"))
    # A card adds in no fixed order: equal up to rounding is what is promised.
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_compiled_training_follows_the_plain_one(tmp_path, precision):
    (tmp_path / "plain").mkdir()
    plain, expected = trained(tmp_path / "plain", precision=precision)
    module, losses = trained(tmp_path, precision=precision, setting=True)
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=2e-2)
    assert module.state_dict().keys() == plain.state_dict().keys()


def averaging():
    return EMAWeightAveraging(decay=0.5, update_every_n_steps=1)


@pytest.mark.parametrize(
    ("settings", "callbacks"),
    [({"accumulate_grad_batches": 2}, list), ({}, lambda: [averaging()])],
    ids=["accumulated", "averaged"],
)
def test_a_compiled_training_accumulates_and_averages(tmp_path, settings, callbacks):
    (tmp_path / "plain").mkdir()
    plain, expected = trained(tmp_path / "plain", more=callbacks(), **settings)
    module, losses = trained(tmp_path, more=callbacks(), setting=True, **settings)
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-2)  # TF32
    theirs = plain.state_dict()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=5e-2, atol=5e-3, msg=name)


def test_a_training_resumes_on_a_card_and_its_checkpoint_on_a_cpu(tmp_path):
    for name in ("whole", "first", "card", "cpu"):
        (tmp_path / name).mkdir()
    whole = trained(tmp_path / "whole")[1]
    trained(tmp_path / "first", epochs=1)
    last = tmp_path / "first" / "last.ckpt"
    rest = trained(tmp_path / "card", resume=last)[1]
    torch.testing.assert_close(rest, whole[2:], rtol=1e-2, atol=1e-2)
    on_cpu = trained(tmp_path / "cpu", resume=last, accelerator="cpu")[1]
    torch.testing.assert_close(on_cpu, whole[2:], rtol=1e-2, atol=1e-2)


def test_records_of_a_card_are_those_of_a_cpu(tmp_path, phantom_store):
    torch.manual_seed(0)
    module = StudentModule(
        backbone=tiny(), evaluation=EvaluationSettings(window=(24, 24, 16), examples=1)
    )
    tables = []
    for name, machine in (("cpu", {"accelerator": "cpu"}), ("card", TRAINER)):
        trainer = quiet_trainer(tmp_path / name, limit_test_batches=2, **machine)
        data = BraTSDataModule(phantom_store, patch_size=16, split=WholeCohort())
        trainer.test(module, data, verbose=False)
        tables.append(Records.read(tmp_path / name).table)
    here, there = tables
    assert here["combination"].tolist() == there["combination"].tolist()
    assert (here["dice"] - there["dice"]).abs().max() < 5e-3  # TF32 moves single voxels


def test_segment_on_a_card_gives_the_labels_of_a_cpu(tmp_path, phantom_root):
    module = StudentModule(backbone=tiny(), evaluation=EvaluationSettings(window=(24, 24, 16)))
    trainer = quiet_trainer(tmp_path, max_steps=1, accelerator="cpu")
    trainer.fit(module, MemoryData())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    case = sorted(path for path in phantom_root.iterdir() if path.is_dir())[0]
    labels = []
    for device in ("cpu", CARD):
        out = tmp_path / device
        command = ["segment", str(tmp_path / "model.ckpt"), str(case), "-o", str(out)]
        assert main([*command, "--device", device]) == 0
        labels.append(np.asarray(nib.load(next(out.rglob("*_seg.nii.gz"))).dataobj))
    assert (labels[0] == labels[1]).mean() > 0.99
