import pytest
import torch
from torch import nn

from pmixseg.backbones import MMFormer
from pmixseg.backbones.mmformer import TransformerLayer
from pmixseg.errors import InputError
from pmixseg.losses.rfnet import RFNetCriterion
from pmixseg.testing import check_backbone
from tests.backbones.test_rfnet import convolved, decoded, decoded_alone, encoded, normed, stacked

TINY = {"width": 2, "embedding": 8, "heads": 2, "hidden": 16, "patch_size": 32}


@pytest.mark.parametrize(
    "net",
    [
        MMFormer(("a", "b", "c"), num_classes=3, **TINY),
        MMFormer(("pet", "ct"), num_classes=2, separate="none", official=True, **TINY),
    ],
    ids=["three", "two"],
)
def test_it_holds_the_contract(net):
    check_backbone(net)


def test_parameter_count_of_the_published_network_without_its_unused_layers():
    unused = 4 * (512 * 128 + 128)
    net = MMFormer()
    assert sum(p.numel() for p in net.parameters()) == 36_654_416 - unused
    assert net.multimodal_transformer.drop.p == 0.1


def test_names_are_those_of_the_published_network_or_map_to_them():
    names = set(MMFormer(**TINY).state_dict())
    assert {
        "encoders.0.encoder.e1_c1.weight",
        "encoders.3.encoder.e5_c3.conv.bias",
        "encoders.1.encode_conv.weight",
        "encoders.2.pos",
        "encoders.2.transformer.qkv.weight",
        "multimodal_transformer.feed_out.bias",
        "multimodal_decode_conv.weight",
        "decoder_fuse.RFM5.fusion_layer.0.conv.weight",
        "decoder_fuse.RFM1.fusion_layer.0.conv.bias",
        "decoder_fuse.seg_d4.weight",
        "decoder_fuse.d4_c1.conv.weight",
        "decoder_sep.d1_out.conv.weight",
        "decoder_sep.seg_layer.bias",
    } <= names


def pre_norm(x, block, mode="reflect"):
    return convolved(normed(x), block.conv, mode) if hasattr(block, "conv") else convolved(x, block)


def test_the_whole_network_is_the_published_one():
    """A slow reference in plain torch; fusions alone are padded with zeros."""
    torch.manual_seed(0)
    net = MMFormer(("a", "b"), num_classes=3, dropout=0.0, **TINY).double().train()
    image, present = torch.randn(1, 2, 32, 32, 32).double(), torch.tensor([[False, True]])
    with torch.no_grad():
        output = net.decode(net.encode(image, torch.ones_like(present)).restrict(present))
        maps, tokens = [], []
        for m, encoder in enumerate(net.encoders):
            maps.append(encoded(image[:, m : m + 1], encoder.encoder, pre_norm))
            embedded = convolved(maps[m][4], encoder.encode_conv)
            mixed = encoder.transformer(embedded.flatten(2).mT, encoder.pos)
            tokens.append(mixed.mT.view_as(embedded) * present[0, m])
        decoder, drawn = net.decoder_fuse, {}

        def fused(level, x):
            layers = decoder[f"RFM{level}"].fusion_layer
            return stacked(x, layers, lambda x, block: pre_norm(x, block, "constant"))

        def joined(level, x, up):
            drawn[f"ds{level}"] = convolved(x, decoder[f"seg_d{level}"])
            both = torch.cat([maps[m][level - 1] * present[0, m] for m in (0, 1)], 1)
            return [fused(level, both), up]

        lowest = fused(5, net._between(torch.stack(tokens, 1)))
        torch.testing.assert_close(output.logits, decoded(lowest, decoder, pre_norm, joined))
        for name, logits in drawn.items():
            torch.testing.assert_close(output.extras[name], logits)
        for m in (0, 1):
            alone = decoded_alone(maps[m], net.decoder_sep, pre_norm)
            torch.testing.assert_close(output.extras["separate"][:, m], alone)


class Nothing(nn.Module):
    def forward(self, x, position):
        return x


@pytest.mark.parametrize("official", [False, True])
def test_tokens_return_to_their_voxel_and_modality_unless_official(official):
    net = MMFormer(("a", "b"), num_classes=2, official=official, **TINY)
    net.multimodal_transformer = Nothing()
    net.multimodal_decode_conv = nn.Identity()
    x = torch.randn(1, 2, 8, 2, 3, 2)
    volume = net._between(x)
    if not official:
        assert torch.equal(volume, x.flatten(1, 2))
        return
    # The published code reads the (2·12) x 8 tokens as 2x3x2 voxels of 2·8 channels.
    tokens = torch.cat([x[:, m].permute(0, 2, 3, 4, 1).reshape(1, 12, 8) for m in (0, 1)], 1)
    assert torch.equal(volume, tokens.reshape(1, 2, 3, 2, 16).permute(0, 4, 1, 2, 3))
    assert not torch.equal(volume, x.flatten(1, 2))


def test_transformer_layer_equals_the_formula():
    torch.manual_seed(0)
    layer = TransformerLayer(6, heads=2, hidden=10, dropout=0.5).eval()
    x, position = torch.randn(2, 5, 6), torch.randn(1, 5, 6)
    with torch.no_grad():
        expected = x + position
        q, k, v = layer.qkv(layer.norm_attention(expected)).chunk(3, 2)
        heads = []
        for one in (slice(0, 3), slice(3, 6)):
            scores = q[..., one] @ k[..., one].transpose(1, 2) / 3**0.5
            heads.append(scores.softmax(2) @ v[..., one])
        expected = expected + layer.proj(torch.cat(heads, 2))
        normed = layer.norm_feed(expected)
        expected = expected + layer.feed_out(nn.functional.gelu(layer.feed_in(normed)))
        torch.testing.assert_close(layer(x, position), expected)
    first, second = (layer.train()(x, position) for _ in range(2))
    assert not torch.allclose(first, second), "dropout in training"


def test_positions_are_kept_for_the_patch_and_interpolated_for_others():
    encoder = MMFormer(("a",), **(TINY | {"patch_size": (32, 48, 32)})).encoders[0]
    nn.init.normal_(encoder.pos)
    assert encoder.position((2, 3, 2)) is encoder.pos
    finer = encoder.position((4, 3, 2)).reshape(4, 3, 2, 8)
    corners = encoder.pos.reshape(2, 3, 2, 8)
    torch.testing.assert_close(finer[0], corners[0])
    torch.testing.assert_close(finer[3], corners[1])
    torch.testing.assert_close(finer[1], (2 * corners[0] + corners[1]) / 3)


def test_supervision_in_training_and_every_parameter_learns():
    torch.manual_seed(0)
    net = MMFormer(("a", "b"), num_classes=3, **TINY)
    image, present = torch.randn(2, 2, 32, 32, 32), torch.tensor([[True, True], [True, False]])
    output = net(image, present)
    assert {k: v.shape[-1] for k, v in output.extras.items() if k.startswith("ds")} == {
        "ds1": 16,
        "ds2": 8,
        "ds3": 4,
        "ds4": 2,
    }
    assert output.extras["separate"].shape == (2, 2, 3, 32, 32, 32)
    RFNetCriterion()(output, {"label": torch.randint(0, 3, (2, 32, 32, 32))}, 0).backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [({"patch_size": 40}, "multiples of 16"), ({"heads": 3}, "3 heads do not divide")],
)
def test_arguments_that_do_not_fit_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        MMFormer(**(TINY | change))
