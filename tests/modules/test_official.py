"""The public snippets (docs/method/snippets.md): formulas by hand, a step against a loop."""

import math

import pytest
import torch

from experiments.official.compare import channel_mixing
from pmixseg.backbones import EarlyFusion, MultiEncoderUNet
from pmixseg.backbones.april2025 import April2025Network
from pmixseg.callbacks import PmixAlignment
from pmixseg.errors import InputError
from pmixseg.losses.alignment import AlignmentLoss
from pmixseg.losses.anchors import MixtureAnchor
from pmixseg.losses.official import (
    April2025Alignment,
    July2025Alignment,
    July2025Anchor,
    fill_july_2025,
)
from pmixseg.losses.term import TermWeight
from pmixseg.modules import July2025Student
from pmixseg.task import BRATS
from pmixseg.types import Latents

NAMES = ("flair", "t1ce", "t1", "t2")
WEIGHTS = (0.1, 0.2, 0.3, 0.4)
VALUES = (1.0, 2.0, 3.0, 6.0)
EVERY = torch.ones(1, 4, dtype=torch.bool)


def july():
    """w = 0.1, 0.2, 0.3, 0.4 and one voxel with 1, 2, 3, 6: P = 0.1 + 0.4 + 0.9 + 2.4 = 3.8."""
    anchor = July2025Anchor()
    anchor.bind(NAMES, 2)
    anchor.double().scores.data = torch.tensor(WEIGHTS, dtype=torch.float64).log()
    f = torch.tensor(VALUES, dtype=torch.float64).reshape(1, 4, 1, 1, 1, 1).requires_grad_()
    return anchor, f, Latents([f, f * 10], NAMES, [EVERY, EVERY])


def test_july_loss_by_hand():
    anchor, _, latents = july()
    # (2.8² + 1.8² + 0.8² + 2.2²) / 8 = (7.84 + 3.24 + 0.64 + 4.84) / 8
    loss = July2025Alignment()(latents, anchor, EVERY, EVERY)
    assert loss.item() == pytest.approx(2.07)


def test_july_loss_without_a_modality_by_hand():
    anchor, _, latents = july()
    acquired = torch.tensor([[True, True, False, False]])
    # P = (0.1 · 1 + 0.2 · 2) / 0.3 = 5/3; what is lacking has no term, and 1/8 stays.
    loss = July2025Alignment()(latents, anchor, acquired, acquired)
    assert loss.item() == pytest.approx(((2 / 3) ** 2 + (1 / 3) ** 2) / 8)


def test_july_gradients_by_hand():
    anchor, f, latents = july()
    July2025Alignment()(latents, anchor, EVERY, EVERY).backward()
    # dL/df_m = ¼ [(f_m - P) - w_m Σ(f_j - P)], Σ(f_j - P) = 12 - 15.2 = -3.2.
    expected = [0.25 * ((x - 3.8) + 3.2 * w) for x, w in zip(VALUES, WEIGHTS, strict=True)]
    assert f.grad.flatten().tolist() == pytest.approx(expected)
    assert expected[0] == pytest.approx(-0.62)
    # dL/dw_m = 0.8 f_m; through the softmax 0.8 w_m (f_m - P).
    expected = [0.8 * w * (x - 3.8) for x, w in zip(VALUES, WEIGHTS, strict=True)]
    assert anchor.scores.grad.tolist() == pytest.approx(expected)
    assert expected[0] == pytest.approx(-0.224)


def test_july_counts_hidden_modalities_and_the_default_does_not():
    anchor, _, latents = july()
    shown = torch.tensor([[True, False, False, True]])
    assert July2025Alignment()(latents, anchor, shown, EVERY).item() == pytest.approx(2.07)
    default = AlignmentLoss("mse", [1, 1], NAMES, [0])
    # ½ · (7.84 + 4.84)/2 over the two that are shown.
    assert default(latents, anchor, shown, EVERY).item() == pytest.approx(3.17)


def test_july_equals_the_default_mse_on_complete_samples_but_for_the_gradients():
    anchor, _, latents = july()
    default = AlignmentLoss("mse", [1, 1], NAMES, [0])
    assert default(latents, anchor, EVERY, EVERY).item() == pytest.approx(2.07)


def test_july_fill_in_training_by_hand():
    anchor, _, latents = july()
    shown = torch.tensor([[True, False, False, True]])
    filled = fill_july_2025(latents, shown, anchor, training=True)
    assert filled.features[0].flatten().tolist() == pytest.approx([1.0, 3.8, 3.8, 6.0])
    assert filled.usable[0].all() and torch.equal(filled.usable[1], shown)
    assert filled.features[1] is latents.features[1]


def test_july_fill_at_test_by_hand():
    anchor, _, latents = july()
    shown = torch.tensor([[True, False, False, True]])
    filled = fill_july_2025(latents, shown, anchor, training=False)
    # w' = 0.2, 0.8: P = 0.2 + 4.8 = 5; slots 0.1·1, 0.2·5, 0.3·5, 0.4·6.
    assert filled.features[0].flatten().tolist() == pytest.approx([0.1, 1.0, 1.5, 2.4])
    complete = fill_july_2025(latents, EVERY, anchor, training=False)
    assert complete.features[0].flatten().tolist() == pytest.approx([0.1, 0.4, 0.9, 2.4])


def test_july_fill_at_test_does_not_read_hidden_slots():
    anchor, f, _ = july()
    shown = torch.tensor([[True, False, False, True]])
    dirty = f.detach().clone()
    dirty[0, 1:3] = math.nan
    filled = fill_july_2025(Latents([dirty], NAMES, [EVERY]), shown, anchor, training=False)
    assert filled.features[0].flatten().tolist() == pytest.approx([0.1, 1.0, 1.5, 2.4])


def test_july_works_on_samples_with_different_masks():
    """The snippet reads only the first row of its mask; this does not."""
    anchor, f, _ = july()
    two = Latents([f.expand(2, -1, -1, -1, -1, -1)], NAMES, [EVERY.expand(2, 4)])
    shown = torch.tensor([[True, False, False, True], [False, True, True, True]])
    filled = fill_july_2025(two, shown, anchor, training=True).features[0]
    assert filled[1].flatten().tolist() == pytest.approx([3.8, 2.0, 3.0, 6.0])


def test_july_anchor_starts_at_random_and_is_shared():
    torch.manual_seed(0)
    anchor = July2025Anchor()
    anchor.bind([f"m{i}" for i in range(1000)], 3)
    assert anchor.scores.shape == (1000,)
    assert anchor.scores.std().item() == pytest.approx(0.1, abs=0.01)
    assert isinstance(anchor, MixtureAnchor) and anchor.learned and anchor.init_args == {}


def test_april_loss_and_gradients_by_hand():
    alignment = April2025Alignment(4).double()
    alignment.scores.data = torch.tensor([1.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    z = torch.tensor(VALUES, dtype=torch.float64).reshape(1, 1, 4, 1, 1, 1).requires_grad_()
    loss = alignment(Latents([z], ("fused",), [torch.ones(1, 1, dtype=torch.bool)]))
    # P = (1 + 2 + 6 + 24)/8 = 4.125; (3.125² + 2.125² + 1.125² + 1.875²)/4
    assert loss.item() == pytest.approx(4.765625)
    loss.backward()
    assert z.grad.flatten().tolist() == pytest.approx([0.5 * (x - 4.125) for x in VALUES])
    # dL/dP = -½ Σ(z - P) = 2.25; dP/da_k = (z_k - P)/8.
    expected = [2.25 * (x - 4.125) / 8 for x in VALUES]
    assert alignment.scores.grad.tolist() == pytest.approx(expected)


def test_april_weights_may_be_negative():
    alignment = April2025Alignment(4)
    alignment.scores.data = torch.tensor([-1.0, 1.0, 1.0, 1.0])
    z = torch.tensor(VALUES).reshape(1, 1, 4, 1, 1, 1)
    # P = (-1 + 2 + 3 + 6)/2 = 5: (16 + 9 + 4 + 1)/4
    assert alignment(Latents([z], ("fused",), [EVERY[:, :1]])).item() == pytest.approx(7.5)


def test_april_needs_one_channel_per_modality():
    alignment = April2025Alignment(4)
    for shape in ((1, 1, 8, 1, 1, 1), (1, 4, 4, 1, 1, 1)):
        with pytest.raises(InputError, match="one fused latent"):
            alignment(Latents([torch.zeros(shape)], ("fused",), [EVERY[:, :1]]))


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
