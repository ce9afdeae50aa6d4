import pytest
import torch
from torch.nn import functional as F

from pmixseg.backbones.shaspec import ShaSpec
from pmixseg.errors import InputError
from pmixseg.losses import DiceCE
from pmixseg.losses.shaspec import ShaSpecCriterion
from pmixseg.testing import check_backbone


@pytest.mark.parametrize("modalities", [("flair", "t1ce", "t1", "t2"), ("ct", "pet")])
def test_it_holds_the_contract(modalities):
    check_backbone(ShaSpec(modalities, num_classes=3, width=2, levels=3))


def test_a_missing_modality_is_the_mean_of_the_shared_features():
    torch.manual_seed(0)
    net = ShaSpec(width=2, levels=2).eval()
    image = torch.randn(1, 4, 8, 8, 8)
    present = torch.tensor([[True, False, True, False]])
    with torch.no_grad():
        latents = net.encode(image, torch.ones(1, 4, dtype=torch.bool))
        expected = net.decode(latents.restrict(present)).logits
        for level, features in enumerate(latents.features):
            own, shared = features.chunk(2, 2)
            mean = (shared[:, 0] + shared[:, 2]) / 2
            own = torch.stack([own[:, 0], mean, own[:, 2], mean], 1)
            latents.features[level] = torch.cat([own, shared], 2)
        torch.testing.assert_close(net.decode(latents).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_whole_network_by_a_plain_forward():
    """Encoders and decoder blocks are the U-Net's; how they are joined is written out."""
    torch.manual_seed(0)
    net = ShaSpec(("a", "b"), num_classes=3, width=2, levels=3).double().train()
    image, present = torch.randn(1, 2, 8, 8, 8).double(), torch.tensor([[False, True]])
    with torch.no_grad():
        output = net.decode(net.encode(image, torch.ones_like(present)).restrict(present))
        scans = image.split(1, 1)
        shared = [net.shared(scan) for scan in scans]
        specific = [encoder(scan) for encoder, scan in zip(net.specific, scans, strict=True)]
        fused = []
        for level, (mix, (join, norm)) in enumerate(zip(net.residual, net.fusions, strict=True)):
            s, p = shared[1][level], specific[1][level]
            own = s + F.conv3d(torch.cat([s, p], 1), mix.weight, mix.bias)
            # Slot a is not shown: the shared features of b alone stand in its place.
            both = F.instance_norm(F.conv3d(torch.cat([s, own], 1), join.weight))
            assert norm.weight.eq(1).all() and norm.bias.eq(0).all()
            fused.append(F.leaky_relu(both, 0.01))
        x = fused.pop()
        for up, decoder, skip in zip(net.ups[::-1], net.decoders[::-1], fused[::-1], strict=True):
            x = decoder(torch.cat([skip, up(x)], 1))
        torch.testing.assert_close(output.logits, F.conv3d(x, net.head.weight, net.head.bias))
        lowest = torch.stack([maps[-1] for maps in shared], 1)
        torch.testing.assert_close(output.extras["shared"], lowest)
        means = torch.stack([maps[-1].mean((2, 3, 4)) for maps in specific], 1)
        torch.testing.assert_close(output.extras["modality"], net.classifier.linear(means))


def test_shared_encoder_is_one_and_gives_equal_features_for_equal_scans():
    net = ShaSpec(width=2, levels=2).eval()
    image = torch.randn(1, 1, 8, 8, 8).expand(1, 4, 8, 8, 8)
    features = net.encode(image, torch.ones(1, 4, dtype=torch.bool)).features[1]
    own, shared = features.chunk(2, 2)
    torch.testing.assert_close(shared[:, 0], shared[:, 3])
    assert not torch.allclose(own[:, 0], own[:, 3])


def test_criterion_by_hand():
    torch.manual_seed(0)
    net = ShaSpec(width=2, levels=2).train()
    present = torch.tensor([[True, False, True, True], [False, False, True, False]])
    output = net(torch.randn(2, 4, 8, 8, 8), present)
    batch = {"label": torch.randint(0, 4, (2, 8, 8, 8))}
    a, b, c = output.extras["shared"][0, [0, 2, 3]]
    ring = torch.stack([(a - c).abs(), (b - a).abs(), (c - b).abs()]).mean()
    logits = output.extras["modality"]
    several = F.cross_entropy(logits[0, [0, 2, 3]], torch.tensor([0, 2, 3]))
    alone = F.cross_entropy(logits[1, [2]], torch.tensor([2]))
    # The mean over samples: the second shows one modality, which has no neighbour.
    expected = DiceCE()(output, batch, 0) + 0.1 * ring / 2 + 0.02 * (several + alone) / 2
    torch.testing.assert_close(ShaSpecCriterion()(output, batch, 0), expected)
    torch.testing.assert_close(
        ShaSpecCriterion(0.0, 0.0)(net.eval()(torch.zeros(2, 4, 8, 8, 8), present), batch, 0),
        DiceCE()(net(torch.zeros(2, 4, 8, 8, 8), present), batch, 0),
    )
    with pytest.raises(InputError, match="0 or more"):
        ShaSpecCriterion(-1)
