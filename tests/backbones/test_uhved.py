import pytest
import torch
from torch.nn import functional as F

from pmixseg.backbones import UHVED
from pmixseg.backbones.uhved import SLOPE, Block, product_of_gaussians
from pmixseg.errors import InputError
from pmixseg.testing import check_backbone
from pmixseg.types import Latents


@pytest.mark.parametrize(
    "net",
    [UHVED(width=2), UHVED(("pet", "ct"), num_classes=2, width=4, reconstruct=False)],
    ids=["four", "two"],
)
def test_it_holds_the_contract(net):
    check_backbone(net)


def gaussians(means, variances, present):
    shape = (1, len(means), 1, 1, 1, 1)
    return Latents(
        [torch.tensor(means).reshape(shape)],
        ("a", "b", "c")[: len(means)],
        [torch.tensor([present])],
        log_variance=[torch.tensor(variances).log().reshape(shape)],
    )


@pytest.mark.parametrize(
    ("present", "mean", "variance"),
    [
        # 1 + 1/2 + 1/4 = 7/4; (3/2 + (-2)/4) / (7/4) = 4/7.
        ((True, True), 4 / 7, 4 / 7),
        # 1 + 1/2 = 3/2; (3/2) / (3/2) = 1.
        ((True, False), 1.0, 2 / 3),
        ((False, False), 0.0, 1.0),
    ],
)
def test_product_of_gaussians_by_hand(present, mean, variance):
    latents = gaussians([3.0, -2.0], [2.0, 4.0], present)
    actual, log_variance = product_of_gaussians(latents, 0)
    assert actual.item() == pytest.approx(mean)
    assert log_variance.exp().item() == pytest.approx(variance)


def test_product_ignores_whatever_stands_in_absent_slots():
    latents = gaussians([3.0, torch.nan], [2.0, torch.inf], (True, False))
    latents.features[0].requires_grad_()
    mean, log_variance = product_of_gaussians(latents, 0)
    (mean + log_variance).sum().backward()
    assert mean.item() == pytest.approx(1.0)
    assert latents.features[0].grad.isfinite().all()


def test_product_is_proportional_to_the_product_of_densities():
    latents = gaussians([0.5, -1.0, 2.0], [0.3, 1.5, 4.0], (True, True, True))
    mean, log_variance = product_of_gaussians(latents, 0)
    x = torch.linspace(-4, 4, 9)
    log_density = -0.5 * x**2
    for m, v in ((0.5, 0.3), (-1.0, 1.5), (2.0, 4.0)):
        log_density = log_density - 0.5 * (x - m) ** 2 / v
    ours = -0.5 * (x - mean.item()) ** 2 / log_variance.exp().item()
    offset = log_density - ours
    torch.testing.assert_close(offset, offset[:1].expand(9), rtol=0, atol=1e-4)


def test_training_samples_the_code_and_rebuilds_every_modality():
    torch.manual_seed(0)
    net = UHVED(("a", "b"), num_classes=3, width=2)
    image, present = torch.randn(1, 2, 16, 16, 16), torch.tensor([[True, False]])
    first, second = net(image, present), net(image, present)
    assert not torch.allclose(first.logits, second.logits)
    assert first.extras["reconstruction"].shape == image.shape
    assert all(lv.abs().max() <= 10 for lv in first.latents.log_variance)
    assert net.needs_acquired and not UHVED(reconstruct=False).needs_acquired
    net.eval()
    assert torch.equal(net(image, present).logits, net(image, present).logits)


def test_latents_without_variances_and_odd_widths_are_refused():
    latents = gaussians([0.0], [1.0], (True,))
    latents.log_variance = None
    with pytest.raises(ValueError, match="UHVED"):
        product_of_gaussians(latents, 0)
    with pytest.raises(InputError, match="even"):
        UHVED(width=3)


def test_block_is_norm_leaky_relu_convolution_twice():
    torch.manual_seed(0)
    block = Block(3, 6, 4)
    x = torch.randn(2, 3, 5, 4, 6, requires_grad=True)
    reference = x
    for conv in block.convs:
        normed = F.leaky_relu(F.instance_norm(reference), SLOPE)
        reference = F.conv3d(normed, conv.weight, conv.bias, padding=1)
    g = torch.randn_like(reference)
    leaves = [x, *block.parameters()]
    expected = torch.autograd.grad(reference, leaves, g)
    actual = block(x)
    torch.testing.assert_close(actual, reference)
    for ours, theirs in zip(torch.autograd.grad(actual, leaves, g), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
