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
