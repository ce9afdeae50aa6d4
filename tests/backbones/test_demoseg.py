import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pmixseg.backbones import DeMoSeg
from pmixseg.backbones.demoseg import ChannelOrder
from pmixseg.errors import InputError
from pmixseg.execution import as_on_gpu
from pmixseg.task import BRATS, all_combinations
from pmixseg.testing import check_backbone
from pmixseg.types import Latents

# What the published code takes for the places of T1, T1ce, T2, FLAIR: modality and its own group.
PUBLISHED = {
    "t1": "t1 0, t1 1, t1 2, t1 3",
    "t1ce": "t1ce 1, t1ce 0, t1ce 3, t1ce 2",
    "t2": "t2 2, t2 3, t2 0, t2 1",
    "flair": "flair 3, flair 2, flair 1, flair 0",
    "t1 t1ce": "t1 0, t1ce 0, t1 2, t1ce 2",
    "t1 t2": "t1 0, t1 1, t2 0, t2 1",
    "t1 flair": "t1 0, t1 1, flair 1, flair 0",
    "t1ce t2": "t1ce 1, t1ce 0, t2 0, t2 1",
    "t1ce flair": "t1ce 1, t1ce 0, flair 1, flair 0",
    "t2 flair": "t2 2, flair 2, t2 0, flair 0",
    "t1 t1ce t2": "t1 0, t1ce 0, t2 0, t2 1",
    "t1 t1ce flair": "t1 0, t1ce 0, flair 1, flair 0",
    "t1 t2 flair": "t1 0, t1 1, t2 0, flair 0",
    "t1ce t2 flair": "t1ce 1, t1ce 0, t2 0, flair 0",
    "t1 t1ce t2 flair": "t1 0, t1ce 0, t2 0, flair 0",
}


def test_every_combination_is_compensated_as_published():
    net = DeMoSeg(width=4, levels=2)
    # Channel c of modality m holds 10 m + c, so that what was taken can be read off.
    codes = 10.0 * torch.arange(4)[:, None] + torch.arange(4)
    features = codes[None, :, :, None, None, None].expand(15, -1, -1, 2, 2, 2)
    combinations = [c.split() for c in PUBLISHED]
    assert len({frozenset(c) for c in combinations}) == 15 == len(all_combinations(net.modalities))
    rows = [[m in c for m in BRATS.modalities] for c in combinations]
    latents = Latents([features], BRATS.modalities, [torch.tensor(rows)])
    taken = net.compensated(latents)[:, :, 0, 0, 0]
    for row, text in zip(taken, PUBLISHED.values(), strict=True):
        expected = []
        for part in text.split(", "):
            name, group = part.split()
            expected.append(10.0 * BRATS.modalities.index(name) + int(group))
        assert row.tolist() == expected


def test_it_keeps_the_contract():
    check_backbone(DeMoSeg(width=8, levels=3), compile="eager")


@pytest.mark.parametrize("names", [("flair",), ("flair", "t2"), ("a", "b", "c"), tuple("abcde")])
def test_it_holds_the_contract_for_any_modalities(names):
    check_backbone(DeMoSeg(names, 2, width=8, levels=2), skip=["bf16", "sizes"])


def test_the_published_network_has_its_widths_and_fixed_sorting():
    net = DeMoSeg()
    assert [d[0][0].out_channels for d in net.downs] == [64, 128, 256, 320, 320]
    fixed = [n for n, p in net.named_parameters() if not p.requires_grad]
    assert fixed and all(".weigh." in n for n in fixed)


def test_the_whole_network_is_the_published_one():
    """A slow reference in plain torch: stems sort downwards but that of T1, all others upwards."""
    torch.manual_seed(0)
    net = DeMoSeg(width=8, levels=4).double().train()
    for norm in (p for n, p in net.named_parameters() if "weigh." not in n and p.ndim == 1):
        nn.init.normal_(norm)

    def normed(x, *affine):
        return F.leaky_relu(F.instance_norm(x, None, None, *affine), 0.01)

    def block(x, layers, downwards=False):
        (conv, _, norm), order = layers
        x = F.conv3d(x, conv.weight, stride=conv.stride, padding=1)
        y = normed(F.conv3d(normed(x, norm.weight, norm.bias), order.conv.weight, padding=1))
        places = order.weigh(y.mean((2, 3, 4))).argsort(1, descending=downwards)[0]
        return normed(y + y[:, places], order.norm.weight, order.norm.bias)

    image = torch.randn(1, 4, 8, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        output = net(image, torch.ones(1, 4, dtype=torch.bool))
        stems = dict(zip(net.modalities, enumerate(net.stems), strict=True))
        own = []
        for name in ("t1", "t1ce", "t2", "flair"):
            m, stem = stems[name]
            own.append(block(image[:, m : m + 1], stem, downwards=name != "t1")[:, :2])
        # Three halvings leave two voxels of 16: the first side is padded.
        maps = [F.pad(torch.cat(own, 1), (0, 0, 0, 0, 0, 8))]
        for down in net.downs:
            maps.append(block(maps[-1], down))
        x, logits = maps.pop(), []
        for up, decoder, skip in zip(net.ups[::-1], net.decoders[::-1], maps[::-1], strict=True):
            both = torch.cat([F.conv_transpose3d(x, up.weight, stride=2), skip], 1)
            x = block(both, decoder)
            logits.append(x[:, :, : x.shape[3] // 2])
        assert set(output.extras) == {"ds1"}, "all levels but the coarsest"
        for actual, x, head in zip(
            (output.extras["ds1"], output.logits), logits[1:], net.heads[::-1], strict=True
        ):
            torch.testing.assert_close(actual, F.conv3d(x, head.weight))


def test_wrong_arguments_are_refused():
    with pytest.raises(InputError, match="multiple of 4"):
        DeMoSeg(width=6)
    with pytest.raises(InputError, match="name each of"):
        DeMoSeg(order=["t1", "t2"])
    with pytest.raises(InputError, match="levels"):
        DeMoSeg(levels=1)


def test_a_cpu_adds_the_ordered_channels_as_everywhere():
    torch.manual_seed(0)
    part = ChannelOrder(8).double()
    x = torch.randn(3, 8, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    ours = part(x)
    with as_on_gpu():
        theirs = part(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(ours)
    mine, others = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(mine, others, rtol=1e-10, atol=1e-12)
