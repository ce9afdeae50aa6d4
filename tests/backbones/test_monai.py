import pytest
import torch
from monai.networks.nets import DynUNet, SegResNet, SegResNetVAE, UNet
from torch import nn

from pmixseg.backbones import EarlyFusion
from pmixseg.backbones.monai import Uncut, cut
from pmixseg.describe import build, describe
from pmixseg.errors import InputError
from pmixseg.testing import check_backbone
from tests.inference import tiny_models as small

MONAI = "monai.networks.nets."
DYNUNET = small.DYNUNET | {"deep_supervision": True}
NETWORKS = [
    ("SegResNet", small.SEGRESNET),
    ("UNet", small.UNET),
    ("UNet", {"channels": [3, 4], "strides": [2], "act": None, "norm": None}),
    ("DynUNet", DYNUNET),
    pytest.param("SwinUNETR", small.SWIN, marks=pytest.mark.slow),
]


def network(name, arguments):
    return {"class_path": MONAI + name, "init_args": arguments}


class Own(nn.Module):
    """A network that says itself where it is cut."""

    channels, strides = (2, 3), (1, 2)

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.first = nn.Conv3d(in_channels, 2, 3, padding=1)
        self.down = nn.Conv3d(2, 3, 2, 2)
        self.up = nn.ConvTranspose3d(3, 2, 2, 2)
        self.head = nn.Conv3d(2, out_channels, 1)

    def encode(self, x):
        first = self.first(x)
        return [first, self.down(first.relu())]

    def decode(self, features):
        return self.head(features[0] + self.up(features[1].relu()))

    def forward(self, x):
        return self.decode(self.encode(x))


class Plain(nn.Module):
    """A network that cannot be cut and returns deep supervision as a list."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv3d(4, 4, 3, padding=1)

    def forward(self, x):
        y = self.body(x)
        return [y, y[..., ::2, ::2, ::2]] if self.training else y


@pytest.mark.parametrize(("name", "arguments"), NETWORKS)
def test_networks_of_monai_hold_the_contract(name, arguments):
    check_backbone(EarlyFusion(network(name, arguments), ("pet", "ct", "mr"), num_classes=2))


@pytest.mark.parametrize("cls", [Own, Plain])
def test_contract_of_networks_that_monai_does_not_have(cls):
    check_backbone(EarlyFusion({"class_path": f"{__name__}.{cls.__name__}", "init_args": {}}))


@pytest.mark.parametrize(("name", "arguments"), NETWORKS)
def test_the_halves_compute_what_the_network_computes(name, arguments):
    torch.manual_seed(0)
    net = EarlyFusion(network(name, arguments)).eval()
    side = 64 if name == "SwinUNETR" else 16
    image = torch.randn(2, 4, side, side, side)
    present = torch.tensor([[True, False, True, False], [False, True, False, False]])
    with torch.no_grad():
        logits = net(image, present).logits
        whole = net.network(torch.where(present[:, :, None, None, None], image, 0.0))
    torch.testing.assert_close(logits, whole, rtol=0, atol=0)
    assert type(net.halves) is not Uncut


def test_deep_supervision_of_dynunet_is_that_of_the_network_before_it_is_upsampled():
    torch.manual_seed(0)
    net = EarlyFusion(network("DynUNet", DYNUNET | {"deep_supr_num": 1})).train()
    image, present = torch.randn(1, 4, 16, 16, 16), torch.ones(1, 4).bool()
    with torch.no_grad():
        extras = net(image, present).extras
        whole = net.network(image)
    assert {k: tuple(v.shape) for k, v in extras.items()} == {"ds1": (1, 4, 8, 8, 8)}
    upsampled = nn.functional.interpolate(extras["ds1"], size=(16, 16, 16))
    torch.testing.assert_close(upsampled, whole[:, 1])


def test_lists_become_deep_supervision_and_the_rest_of_a_tuple_is_dropped():
    image, present = torch.randn(1, 4, 16, 16, 16), torch.ones(1, 4).bool()
    assert list(EarlyFusion(Plain())(image, present).extras) == ["ds1"]
    vae = network("SegResNetVAE", {"input_image_size": [16, 16, 16], "init_filters": 8})
    assert not EarlyFusion(vae)(image, present).extras


@pytest.mark.parametrize("parent", [SegResNet, DynUNet, UNet])
def test_a_subclass_with_its_own_forward_is_not_cut(parent):
    class Changed(parent):
        def forward(self, x):
            return super().forward(x) + 1

    arguments = {SegResNet: {}, DynUNet: DYNUNET, UNet: {"channels": [2, 3], "strides": [2]}}
    settings = {"in_channels": 4, "out_channels": 4, "spatial_dims": 3} | arguments[parent]
    assert type(cut(Changed(**settings), 4)) is Uncut
    assert type(cut(SegResNetVAE([16] * 3, 0.0), 4)) is Uncut


def test_a_modality_cannot_be_hidden_after_encoding():
    net = EarlyFusion(network("SegResNet", {}))
    assert not net.shares_encoding and net.slots == ("fused",)
    latents = net.encode(torch.zeros(1, 4, 16, 16, 16), torch.ones(1, 4).bool())
    with pytest.raises(ValueError, match="encode again"):
        latents.restrict(torch.ones(1, 4).bool())


def test_description_is_rebuilt_and_an_instance_is_refused_there():
    net = EarlyFusion(network("SegResNet", {"init_filters": 8}), ("pet",), num_classes=2)
    assert describe(net)["init_args"]["network"] == network("SegResNet", {"init_filters": 8})
    twin = build(describe(net))
    assert twin.state_dict().keys() == net.state_dict().keys()
    with pytest.raises(InputError, match="network"):
        describe(EarlyFusion(SegResNet(in_channels=4, out_channels=4)))


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (network("SegResNet", {"in_channels": 3}), "in_channels 3.*needs 4"),
        (network("SegResNet", {"out_channels": 3}), "out_channels 3.*needs 4"),
        (network("DynUNet", DYNUNET | {"strides": [2, 2, 2]}), "set it to 1"),
        (network("NoSuchNet", {}), "cannot be imported"),
        ({"class_path": "subprocess.Popen", "init_args": {"args": ["true"]}}, "nn.Module"),
        ({}, "None"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(network, words):
    with pytest.raises(InputError, match=words):
        EarlyFusion(network)


def test_wrong_output_is_refused_when_it_shows():
    with pytest.raises(InputError, match="logits are"):
        EarlyFusion(nn.Sequential(nn.Conv3d(4, 3, 1)))(
            torch.zeros(1, 4, 8, 8, 8), torch.ones(1, 4).bool()
        )
