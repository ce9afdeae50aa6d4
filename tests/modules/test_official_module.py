"""``official-2025-07`` in a training step and at test, against a loop over slots."""

import pytest
import torch

from pmixseg.backbones import EarlyFusion, MultiEncoderUNet
from pmixseg.backbones.april2025 import April2025Network, channel_mixing
from pmixseg.callbacks import PmixAlignment
from pmixseg.errors import InputError
from pmixseg.losses import July2025Alignment
from pmixseg.losses.term import TermWeight
from pmixseg.modules import July2025Student
from pmixseg.task import BRATS


@pytest.fixture
def module(batch):
    torch.manual_seed(0)
    made = July2025Student(backbone=MultiEncoderUNet(BRATS.modalities, 4, width=4, levels=2))
    made.log_dict = made.log = lambda *args, **kwargs: None
    batch["acquired"][:] = True
    batch["image"].normal_(generator=torch.Generator().manual_seed(1))
    return made


def decoded(module, run):
    """The latents that the backbone's decoder was given while ``run()`` ran."""
    seen, inner = [], module._decode

    def spy(latents):
        seen.append(latents)
        return inner(latents)

    module._decode = spy
    run()
    module._decode = inner
    return seen[-1]


def test_a_training_step_fills_hidden_slots_with_a_mixture_that_saw_them(module, batch):
    present = module.draw_present(batch)
    assert not present.all()
    latents = decoded(module, lambda: module.training_step(batch, 0))
    f = module.encode(batch["image"], batch["acquired"]).features[0]
    w = module.anchor.scores.softmax(0)
    for b in range(2):
        mixed = sum(w[j] * f[b, j] for j in range(4))
        for m in range(4):
            expected = f[b, m] if present[b, m] else mixed
            torch.testing.assert_close(latents.features[0][b, m], expected)
    assert latents.usable[0].all()
    assert torch.equal(latents.usable[1], present)


def test_at_test_every_slot_is_times_its_unnormalised_weight(module, batch):
    module.eval()
    present = torch.tensor([[True, False, True, False]] * 2)
    encoded = module.encode(batch["image"], batch["acquired"]).restrict(present)
    latents = decoded(module, lambda: module.decode(encoded))
    f, w = encoded.features[0], module.anchor.scores.softmax(0)
    mixed = (w[0] * f[:, 0] + w[2] * f[:, 2]) / (w[0] + w[2])
    for m in range(4):
        expected = w[m] * (f[:, m] if m in (0, 2) else mixed)
        torch.testing.assert_close(latents.features[0][:, m], expected)


def test_the_term_is_the_sum_of_mse_over_eight_and_reaches_w(module, batch):
    callback = PmixAlignment(weight=1.0, official=July2025Alignment())
    term = callback.build_term(module)
    module.add_term("align", term, TermWeight(1.0))
    f = module.encode(batch["image"], batch["acquired"]).features[0]
    mixed = torch.einsum("m,bmcdhw->bcdhw", module.anchor.scores.softmax(0), f)
    expected = sum((f[:, m] - mixed).square().mean() for m in range(4)) / 8
    output = module(batch["image"], batch["acquired"])
    loss = term(output, {**batch, "present": batch["acquired"]})
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert module.anchor.scores.grad.abs().sum() > 0


def test_backbones_that_mix_modalities_are_refused():
    network = {"class_path": "pmixseg.backbones.April2025Network"}
    with pytest.raises(InputError, match="mixes modalities"):
        July2025Student(backbone=EarlyFusion(network))


def test_channels_of_the_april_latent_are_not_modalities():
    torch.manual_seed(0)
    network = April2025Network(4, 4).eval()
    mixing = channel_mixing(network, torch.randn(1, 4, 8, 8, 8))
    assert mixing.shape == (4, 4)
    assert (mixing > 0.01).sum() > 8  # removing one modality moves channels of others
    for part in (network.embed[0], network.latent[0]):
        torch.nn.init.zeros_(part.weight)
        part.weight.data[range(4), range(4), 1, 1, 1] = 1.0
    apart = channel_mixing(network, torch.rand(1, 4, 8, 8, 8))
    assert (apart - apart.diag().diag()).abs().max() == 0


def test_april_network_cut_equals_the_whole():
    network = April2025Network(4, 4).eval()
    image = torch.randn(1, 4, 16, 16, 16)
    torch.testing.assert_close(network(image), network.decode(network.encode(image)))
    net = EarlyFusion({"class_path": "pmixseg.backbones.April2025Network"})
    assert net.slots == ("fused",) and net.channels[0] == 4
