import pytest
import torch
from torch.distributions import Normal, kl_divergence
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


def plain(x, block):
    for conv in block.convs:
        normed = F.leaky_relu(F.instance_norm(x), SLOPE)
        x = F.conv3d(normed, conv.weight, conv.bias, padding=1)
    return x


def test_the_whole_network_by_a_plain_forward():
    torch.manual_seed(0)
    net = UHVED(("a", "b"), num_classes=3, width=2).double().train()
    # One log-variance of the finest level beyond either limit, ±10.
    for encoder, bias in zip(net.encoders, (20.0, -20.0), strict=True):
        torch.nn.init.constant_(encoder.blocks[0].convs[1].bias[1:], bias)
    image, present = torch.randn(1, 2, 16, 16, 16).double(), torch.tensor([[False, True]])

    def encoded(x, encoder):
        x = F.leaky_relu(F.conv3d(x, encoder.first.weight, encoder.first.bias), SLOPE)
        for level, block in enumerate(encoder.blocks):
            x = plain(F.max_pool3d(x, 2) if level else x, block)
            mean, log_variance = x.chunk(2, 1)
            yield Normal(mean, (log_variance.clamp(-10, 10) / 2).exp())

    def decoded(codes, decoder):
        x = codes[-1]
        for block, code in zip(decoder.blocks[::-1], codes[-2::-1], strict=True):
            x = F.interpolate(x, scale_factor=2, mode="trilinear")
            x = plain(torch.cat([x, code], 1), block)
        return F.conv3d(x, decoder.last.weight, decoder.last.bias)

    def product(*experts):
        precision = 1 + sum(q.variance**-1 for q in experts)
        mean = sum(q.mean / q.variance for q in experts) / precision
        return Normal(mean, precision**-0.5)

    with torch.no_grad():
        latents = net.encode(image, torch.ones_like(present)).restrict(present)
        torch.manual_seed(1)
        output = net.decode(latents)
        a, b = (list(encoded(image[:, m : m + 1], e)) for m, e in enumerate(net.encoders))
        shown, full = [product(q) for q in b], [product(*both) for both in zip(a, b, strict=True)]
        torch.manual_seed(1)
        codes = [q.mean + q.stddev * torch.randn_like(q.mean) for q in shown]
        torch.testing.assert_close(output.logits, decoded(codes, net.decoder))
        for m, decoder in enumerate(net.image_decoders):
            rebuilt = decoded(codes, decoder)[:, 0]
            torch.testing.assert_close(output.extras["reconstruction"][:, m], rebuilt)
        divergence = sum(
            kl_divergence(q_all, q).mean() + kl_divergence(q, Normal(0.0, 1.0)).mean()
            for q_all, q in zip(full, shown, strict=True)
        )
        torch.testing.assert_close(output.extras["divergence"], divergence.view(1))


def test_block_is_norm_leaky_relu_convolution_twice():
    torch.manual_seed(0)
    block = Block(3, 6, 4)
    x = torch.randn(2, 3, 5, 4, 6, requires_grad=True)
    reference = plain(x, block)
    g = torch.randn_like(reference)
    leaves = [x, *block.parameters()]
    expected = torch.autograd.grad(reference, leaves, g)
    actual = block(x)
    torch.testing.assert_close(actual, reference)
    for ours, theirs in zip(torch.autograd.grad(actual, leaves, g), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
