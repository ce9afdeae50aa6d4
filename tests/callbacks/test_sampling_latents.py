"""``align.sample``: the decoder reads latents drawn from their Gaussians, in training only."""

import pytest
import torch

from pmixseg.callbacks import PmixAlignment
from pmixseg.errors import InputError
from pmixseg.losses.term import TermWeight
from pmixseg.modules import StudentModule
from tests.callbacks.memory_data import MemoryData, quiet_trainer, tiny


def build(sample, batch_of=2):
    torch.manual_seed(0)
    module = StudentModule(backbone=tiny())
    module.log = module.log_dict = lambda *args, **kwargs: None
    callback = PmixAlignment(weight=1.0, distance="kl", sample=sample)
    module.add_term("align", callback.build_term(module), TermWeight(0.0))
    batch = next(iter(MemoryData().train_dataloader()))
    return module, batch


def loss(module, batch):
    torch.manual_seed(7)
    return module.training_step(batch, 0)


def test_samples_change_what_is_decoded_and_repeat_with_the_seed():
    plain, batch = build(False)
    sampled, _ = build(True)
    assert loss(sampled, batch) == loss(sampled, batch)
    assert not torch.isclose(loss(sampled, batch), loss(plain, batch), rtol=1e-6)


def test_the_segmentation_loss_reaches_the_variance_heads():
    for sample in (False, True):
        module, batch = build(sample)
        loss(module, batch).backward()
        heads = module.terms["align"].alignment.distance.log_variances.parameters()
        moved = [p.grad.abs().sum().item() > 0 for p in heads]
        assert any(moved) == sample


def test_at_test_the_latents_themselves_are_read():
    module, batch = build(True)
    plain, _ = build(False)
    with torch.no_grad():
        found = [m.eval()(batch["image"], batch["acquired"]).logits for m in (module, plain)]
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_it_trains(tmp_path):
    torch.manual_seed(0)
    module = StudentModule(backbone=tiny())
    align = PmixAlignment(weight=0.1, distance="kl", sample=True)
    quiet_trainer(tmp_path, callbacks=[align]).fit(module, MemoryData())
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_only_kl_has_gaussians(tmp_path):
    module = StudentModule(backbone=tiny())
    with pytest.raises(InputError, match="'kl'"):
        PmixAlignment(weight=0.1, sample=True).build_term(module)
