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
    module.double()
    x = torch.where(latents.flags(0), latents.features[0], 0.0).double()
    p = regions.double()
    fused = []
    for r, weigh in enumerate(module.modal_fusion):
        product = x * p[:, None, r : r + 1]
        share = p[:, r].mean((1, 2, 3)) + 1e-7
        descriptor = product.mean((3, 4, 5)) / share[:, None, None]
        vector = torch.cat([descriptor.flatten(1), share[:, None]], 1)
        alpha = weigh(vector)
        fused.append((product * alpha[:, :, None, None, None, None]).sum(1))
    region = stacked(torch.cat(fused, 1), module.region_fusion.fusion_layer, post_norm)
    return torch.cat([region, stacked(x.flatten(1, 2), module.short_cut, post_norm)], 1)


def convolved(x, conv, mode="reflect"):
    if conv.kernel_size[0] == 3:
        x = F.pad(x, (1,) * 6, mode=mode)
    return F.conv3d(x, conv.weight, conv.bias, conv.stride)


def normed(x):
    return F.leaky_relu(F.instance_norm(x), 0.2)


def post_norm(x, block):
    return normed(convolved(x, block.conv))


def stacked(x, blocks, block):
    for part in blocks:
        x = block(x, part)
    return x


def encoded(x, encoder, block):
    """The published encoders: ``x = c1(x); x = x + c3(c2(x))``, finest first."""
    maps = []
    for level in range(1, encoder.depth + 1):
        first, *others = (encoder[f"e{level}_c{k}"] for k in (1, 2, 3))
        x = block(x, first)
        x = x + stacked(x, others, block)
        maps.append(x)
    return maps


def decoded(x, decoder, block, joined):
    """The published decoders; ``joined`` gives what level and drawn-up map are joined from."""
    for level in range(decoder.depth - 1, 0, -1):
        up = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True)
        maps = joined(level, x, block(up, decoder[f"d{level}_c1"]))
        x = stacked(torch.cat(maps, 1), [decoder[f"d{level}_{k}"] for k in ("c2", "out")], block)
    return convolved(x, decoder["seg_layer"])


def decoded_alone(maps, decoder, block):
    """One modality's maps by the separate decoder: what is drawn up, then the skip connection."""
    return decoded(maps[-1], decoder, block, lambda level, _, up: [up, maps[level - 1]])


def test_the_whole_network_is_the_published_one():
    """A slow reference: every block in plain torch, padded by reflection in all of them."""
    torch.manual_seed(0)
    net = RFNet(("a", "b"), num_classes=3, width=4).double().train()
    image, present = torch.randn(1, 2, 16, 16, 16).double(), torch.tensor([[False, True]])
    acquired = torch.ones_like(present)
    with torch.no_grad():
        output = net.decode(net.encode(image, acquired).restrict(present))
        maps = [encoded(image[:, m : m + 1], net.encoders[m], post_norm) for m in (0, 1)]
        decoder, regions = net.decoder_fuse, {}

        def fused(level, *drawn):
            latents = Latents(
                [torch.stack([maps[0][level - 1], maps[1][level - 1]], 1)], "ab", [present]
            )
            generator = decoder[f"prm_generator{level}"]
            embedding = stacked(
                latents.masked(0).flatten(1, 2), generator.embedding_layer, post_norm
            )
            hidden = post_norm(torch.cat([*drawn, embedding], 1), generator.prm_layer[0])
            regions[f"ds{level}"] = convolved(hidden, generator.prm_layer[1])
            return literal_fusion(decoder[f"RFM{level}"], latents, regions[f"ds{level}"].softmax(1))

        expected = decoded(fused(4), decoder, post_norm, lambda k, _, up: [fused(k, up), up])
        torch.testing.assert_close(output.logits, expected)
        for name, logits in regions.items():
            torch.testing.assert_close(output.extras[name], logits)
        for m in (0, 1):
            alone = decoded_alone(maps[m], net.decoder_sep, post_norm)
            torch.testing.assert_close(output.extras["separate"][:, m], alone)


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
    net = RFNet()
    assert sum(p.numel() for p in net.parameters()) == 8_984_960
    kernel = net.encoders[0]["e4_c2"].conv.weight  # 442,368 weights, drawn as by Kaiming He et al.
    assert kernel.std().item() == pytest.approx((2 / kernel[0].numel()) ** 0.5, rel=0.02)
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
