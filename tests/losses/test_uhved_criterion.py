import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pmixseg.backbones import UHVED
from pmixseg.errors import InputError
from pmixseg.gaussians import gaussian_kl
from pmixseg.losses import DiceCE
from pmixseg.losses.uhved import UHVEDCriterion


def test_kl_is_that_of_torch():
    torch.manual_seed(0)
    a, b = ((torch.randn(2, 3, 2, 2, 2), torch.randn(2, 3, 2, 2, 2)) for _ in range(2))
    expected = kl_divergence(*(Normal(mean, (log / 2).exp()) for mean, log in (a, b)))
    torch.testing.assert_close(gaussian_kl(*a, *b), expected)


def train_step(present, **weights):
    torch.manual_seed(0)
    net = UHVED(width=4).train()
    image = torch.randn(1, 4, 16, 16, 16)
    everything = torch.ones(1, 4, dtype=torch.bool)
    output = net.decode(net.encode(image, everything).restrict(present))
    batch = {"image": image, "label": torch.randint(0, 4, (1, 16, 16, 16)), "present": present}
    return output, batch, UHVEDCriterion(**weights)(output, batch, 0)


def test_sum_of_its_parts():
    present = torch.tensor([[True, False, False, True]])
    output, batch, loss = train_step(present)
    rebuilt = (output.extras["reconstruction"] - batch["image"]).square().mean()
    wanted = DiceCE()(output, batch, 0) + 0.1 * (rebuilt + output.extras["divergence"].mean())
    torch.testing.assert_close(loss, wanted)
    loss.backward()


def test_shown_everything_only_the_prior_is_left():
    everything = torch.ones(1, 4, dtype=torch.bool)
    few = torch.tensor([[False, False, True, False]])
    all_shown = train_step(everything)[0]
    parts = []
    for level in range(4):
        precision = 1 + (-all_shown.latents.log_variance[level]).exp().sum(1)
        mean = ((-all_shown.latents.log_variance[level]).exp()
                * all_shown.latents.features[level]).sum(1) / precision  # fmt: skip
        prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
        parts.append(kl_divergence(Normal(mean, precision.rsqrt()), prior).mean())
    torch.testing.assert_close(all_shown.extras["divergence"][0], torch.stack(parts).sum())
    assert train_step(few)[0].extras["divergence"] > 0


def test_a_student_of_some_modalities_is_refused():
    output, batch, _ = train_step(torch.ones(1, 4, dtype=torch.bool))
    batch["image"] = batch["image"][:, :2]
    with pytest.raises(InputError, match="reconstruct: false"):
        UHVEDCriterion()(output, batch, 0)
