import pytest
import torch
from torch.nn import functional as F

from pmixseg.backbones import RFNet
from pmixseg.backbones.rfnet import RegionAwareFusion, RegionMap
from pmixseg.testing import check_backbone
from pmixseg.types import Latents


def example(slots=4, width=8, side=6, regions=3):
    torch.manual_seed(0)
    features = torch.randn(2, slots, width, side, side, side)
    present = torch.rand(2, slots) < 0.5
    present[:, 0] = True
    latents = Latents([features], tuple("abcdef"[:slots]), [present])
    return latents, torch.randn(2, regions, side, side, side).softmax(1)


def literal_fusion(module, latents, regions):
    """The published fusion, every modality times every region as volumes."""
    x = torch.where(latents.flags(0), latents.features[0], 0.0).double()
    p = regions.double()
    fused = []
    for r, weigh in enumerate(module.modal_fusion):
        product = x * p[:, None, r : r + 1]
        share = p[:, r].mean((1, 2, 3)) + 1e-7
        descriptor = product.mean((3, 4, 5)) / share[:, None, None]
        vector = torch.cat([descriptor.flatten(1), share[:, None]], 1)
        alpha = weigh.double()(vector)
        fused.append((product * alpha[:, :, None, None, None, None]).sum(1))
    region = module.region_fusion.fusion_layer.double()(torch.cat(fused, 1))
    shortcut = x.flatten(1, 2)
    for part in module.short_cut:
        conv = part.conv.double()
        if conv.kernel_size[0] == 3:
            shortcut = F.pad(shortcut, (1,) * 6, mode="reflect")
        shortcut = F.conv3d(shortcut, conv.weight, conv.bias)
        shortcut = F.leaky_relu(F.instance_norm(shortcut), 0.2)
    return torch.cat([region, shortcut], 1)


@pytest.mark.parametrize(("slots", "width", "regions"), [(4, 8, 4), (3, 4, 2), (1, 6, 3)])
def test_cheap_fusion_equals_the_literal_one(slots, width, regions):
    latents, maps = example(slots, width, regions=regions)
    module = RegionAwareFusion(slots, width, regions)
    with torch.no_grad():
        cheap = torch.cat(module(latents, 0, maps), 1)
    again = Latents(latents.features, latents.modalities, latents.usable)
    trained = torch.cat(module(again, 0, maps), 1)
    expected = literal_fusion(module, latents, maps).float()
    torch.testing.assert_close(cheap, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-5)


def test_no_gradient_flows_into_the_region_map():
    latents, maps = example(width=4, regions=2)
    maps.requires_grad_()
    torch.cat(RegionAwareFusion(4, 4, 2)(latents, 0, maps)).sum().backward()
    assert maps.grad is None


def test_region_map_reads_the_decoder_everywhere_but_at_the_lowest_level():
    latents, _ = example()
    below = torch.randn(2, 8, 6, 6, 6)
    joins, lowest = RegionMap(4, 8, 3, True), RegionMap(4, 8, 3, False)
    assert not torch.equal(joins(latents, 0, below), joins(latents, 0, 2 * below + 1))
    assert lowest(latents, 0, None).shape == (2, 3, 6, 6, 6)


@pytest.mark.parametrize(
    "net",
    [RFNet(width=4), RFNet(("pet", "ct"), num_classes=2, width=4, separate="none")],
    ids=["four", "two"],
)
def test_it_holds_the_contract(net):
    check_backbone(net)


def test_parameter_counts_of_the_published_network():
    assert sum(p.numel() for p in RFNet().parameters()) == 8_984_960
    assert sum(p.numel() for p in RFNet(separate="none").parameters()) == 8_398_572


def test_names_are_those_of_the_published_network():
    names = set(RFNet().state_dict())
    assert {
        "encoders.3.e4_c3.conv.weight",
        "decoder_fuse.d3_c1.conv.bias",
        "decoder_fuse.RFM4.modal_fusion.3.weight_layer.2.weight",
        "decoder_fuse.RFM1.region_fusion.fusion_layer.2.conv.weight",
        "decoder_fuse.RFM2.short_cut.0.conv.weight",
        "decoder_fuse.prm_generator1.embedding_layer.0.conv.weight",
        "decoder_fuse.prm_generator4.prm_layer.1.bias",
        "decoder_fuse.seg_layer.weight",
        "decoder_sep.d1_out.conv.weight",
        "decoder_sep.seg_layer.bias",
    } <= names


def test_separate_outputs_are_the_shared_decoder_on_what_was_encoded():
    torch.manual_seed(0)
    net = RFNet(("a", "b", "c"), num_classes=2, width=4).train()
    image = torch.randn(2, 3, 16, 16, 16)
    acquired = torch.tensor([[True, True, True], [True, False, True]])
    shown = torch.tensor([[True, False, False], [True, False, False]])
    with torch.no_grad():
        latents = net.encode(image, acquired)
        extras = net.decode(latents.restrict(shown)).extras
        assert torch.equal(extras["separate_slots"], acquired)
        for b, m in acquired.nonzero().tolist():
            alone = net.decoder_sep([f[b : b + 1, m] for f in latents.features])
            decoded = extras["separate"][b : b + 1, m]
            torch.testing.assert_close(decoded, alone, rtol=1e-4, atol=1e-4)
        assert not extras["separate"][1, 1].any()
    assert [tuple(extras[f"ds{k}"].shape[2:]) for k in (1, 2, 3, 4)] == [
        (16, 16, 16),
        (8, 8, 8),
        (4, 4, 4),
        (2, 2, 2),
    ]
    assert (
        "separate" not in RFNet(("a",), width=4, separate="none")(image[:, :1], shown[:, :1]).extras
    )


def test_a_fill_does_not_reach_the_separate_decoder():
    torch.manual_seed(0)
    net = RFNet(("a", "b"), num_classes=2, width=4).train()
    present = torch.tensor([[True, False]])
    latents = net.encode(torch.randn(1, 2, 16, 16, 16), present)
    full = [torch.where(latents.flags(k), f, 0.5) for k, f in enumerate(latents.features)]
    flags = [torch.ones_like(present)] * 4
    plain = net.decode(latents)
    filled = net.decode(latents.with_features(full, flags))
    assert torch.equal(plain.extras["separate"], filled.extras["separate"])
    assert not torch.allclose(plain.logits, filled.logits)


def test_region_means_of_a_large_window_in_float16():
    """110592 voxels of 1 in one region: their sum is beyond float16, their mean is 1."""
    torch.manual_seed(0)
    module = RegionAwareFusion(2, 4, 3)
    features = torch.ones(1, 2, 4, 48, 48, 48)
    latents = Latents([features.half()], ("a", "b"), [torch.ones(1, 2, dtype=torch.bool)])
    regions = torch.zeros(1, 3, 48, 48, 48)
    regions[:, 0] = 1.0
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        half = torch.cat(module(latents, 0, regions), 1)
    with torch.no_grad():
        plain = torch.cat(module(latents.with_features([features]), 0, regions), 1)
    assert bool(half.isfinite().all())
    torch.testing.assert_close(half.float(), plain, rtol=0.02, atol=0.02)
