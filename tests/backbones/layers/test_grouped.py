"""Encoders of all modalities as one, where a GPU would run them so."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from pmixseg.backbones import UHVED, DeMoSeg, MMFormer, MultiEncoderUNet, RFNet, ShaSpec
from pmixseg.backbones.layers.grouped import encode_together
from pmixseg.backbones.layers.lean import LeanConv3d
from pmixseg.backbones.slots import encode_slots
from pmixseg.execution import as_on_gpu

NETWORKS = {
    "unet": lambda: MultiEncoderUNet(width=4, levels=3),
    "stem": lambda: MultiEncoderUNet(width=4, levels=3, stem=2, modalities=("a", "b")),
    "rfnet": lambda: RFNet(width=4),
    "recompute": lambda: MultiEncoderUNet(width=4, levels=3, recompute=True),
    "mmformer": lambda: MMFormer(width=4, patch_size=32, embedding=8, heads=2, hidden=8, dropout=0),
    "uhved": lambda: UHVED(width=4),
    "shaspec": lambda: ShaSpec(width=4, levels=2),
    "demoseg": lambda: DeMoSeg(width=8, levels=2),
}
SIDES = {"mmformer": 32}


def encoders_of(name):
    torch.manual_seed(0)
    net = NETWORKS[name]().double()
    for part in net.modules():
        for own in part.parameters(recurse=False):
            torch.nn.init.normal_(own)  # norms too, else all of them would be alike
    return net


def image_for(name, net):
    sides = [SIDES.get(name, 16)] * 3
    return torch.randn(2, len(net.modalities), *sides, dtype=torch.float64)


def convolutions_of(net):
    if isinstance(net, MMFormer):
        return [encoder.convolutions.value for encoder in net.encoders]
    parts = {ShaSpec: "specific", DeMoSeg: "stems"}
    return list(getattr(net, parts.get(type(net), "encoders")))


@pytest.mark.parametrize("name", NETWORKS)
def test_one_pass_gives_what_a_loop_gives(name):
    net = encoders_of(name)
    image = image_for(name, net)
    encoders = convolutions_of(net)
    with as_on_gpu():
        together = encode_together(encoders, image)
        loop = [e(image[:, m : m + 1]) for m, e in enumerate(encoders)]
    for level, maps in enumerate(together):
        expected = torch.cat([levels[level] for levels in loop], 1)
        torch.testing.assert_close(maps, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_and_latents_are_those_of_a_cpu(name):
    net = encoders_of(name)
    image = image_for(name, net)
    present = torch.ones(2, len(net.modalities), dtype=torch.bool)

    def step():
        net.zero_grad()
        latents = net.encode(image, present)
        sum(f.square().mean() for f in latents.features).backward()
        return latents.features, [p.grad for p in net.parameters()]

    lean, keys = step(), list(net.state_dict())
    with as_on_gpu():
        static = step()
    for ours, theirs in zip(static, lean, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert list(net.state_dict()) == keys


def test_pruned_encoders_run_one_by_one():
    net = MultiEncoderUNet(width=4, levels=2).double()
    for part in net.modules():
        if isinstance(part, LeanConv3d):
            prune.l1_unstructured(part, "weight", 0.5)
    image = image_for("unet", net)
    present = torch.ones(2, 4, dtype=torch.bool)
    expected = net.encode(image, present).features
    with as_on_gpu():
        for one, other in zip(net.encode(image, present).features, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


class Convolutions(TorchDispatchMode):
    """Counts convolutions: their groups, channels and strides."""

    def __init__(self):
        super().__init__()
        self.groups, self.channels, self.strides = [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ == "convolution":
            self.groups.append(args[8])
            self.channels.append(args[0].shape[1])
            self.strides.append(args[3][0])
        return function(*args, **(kwargs or {}))


def test_a_gpu_starts_one_convolution_for_all_encoders_and_a_cpu_skips_absent_ones():
    net = MultiEncoderUNet(width=4, levels=3)
    image, present = torch.randn(1, 4, 16, 16, 16), torch.tensor([[True, False, False, True]])
    with as_on_gpu(), Convolutions() as counted:
        net.encode(image, present)
    # The first reads one channel of each, the second four; the next levels begin with a stride.
    assert counted.groups == [1, 1, 1, 1, 1, 4]
    runs = []
    for m, encoder in enumerate(net.encoders):
        encoder.register_forward_hook(lambda *call, m=m: runs.append(m))
    net.encode(image, present)
    assert runs == [0, 3]


@pytest.mark.parametrize("name", ["rfnet", "mmformer", "uhved", "shaspec", "demoseg"])
def test_encoders_of_published_networks_are_one_on_a_gpu(name):
    net = NETWORKS[name]()
    image, present = image_for(name, net).float(), torch.ones(2, 4, dtype=torch.bool)
    with as_on_gpu(), torch.no_grad(), Convolutions() as counted:
        net.encode(image, present)
    encoder = convolutions_of(net)[0]
    layers = [part for part in encoder.modules() if isinstance(part, torch.nn.Conv3d)]
    dense = sum(layer.stride[0] > 1 or 4 * layer.in_channels <= 32 for layer in layers)
    assert counted.groups.count(4) == len(layers) - dense
    # ShaSpec's shared encoder and its residual layers see all modalities as samples.
    shared = len(layers) + len(net.residual) if name == "shaspec" else 0
    assert counted.groups.count(1) == dense + shared


def test_encoders_of_other_layers_stay_a_loop():
    class Mixing(nn.Conv3d):
        def forward(self, x):
            return [super().forward(x).softmax(1)]

    encoders = [Mixing(1, 2, 3, padding=1) for _ in range(4)]
    image, present = torch.randn(1, 4, 8, 8, 8), torch.ones(1, 4, dtype=torch.bool)
    with as_on_gpu(), torch.no_grad(), Convolutions() as counted:
        encode_slots(encoders, image, present)
    assert counted.groups == [1] * 4


def test_a_volume_of_other_channels_is_still_refused():
    with pytest.raises(RuntimeError, match="channels"), as_on_gpu():
        LeanConv3d(2, 4)(torch.randn(1, 4, 8, 8, 8))


@pytest.mark.parametrize("name", NETWORKS)
def test_no_convolution_of_groups_is_one_that_a_gpu_runs_slowly(name):
    """Depthwise ones, those with a stride and narrow ones."""
    net = encoders_of(name)
    image = image_for(name, net)
    with as_on_gpu(), Convolutions() as counted:
        encode_together(convolutions_of(net), image)
    assert counted.groups
    for groups, channels, stride in zip(
        counted.groups, counted.channels, counted.strides, strict=True
    ):
        assert groups == 1 or (channels > max(32, groups) and stride == 1)


@pytest.mark.parametrize("stride", [1, 2])
def test_kernels_of_all_encoders_are_one_kernel_with_zeros(stride):
    """Worked by hand: encoder m's kernel is the number m + 1 at its own two channels."""
    conv = LeanConv3d(2, 1, 1, bias=False)
    conv.stride = (stride,) * 3
    conv.weight = nn.Parameter(
        torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(2).view(3, 2, 1, 1, 1)
    )
    image = torch.tensor([1.0, 10.0, 2.0, 20.0, 3.0, 30.0])[None, :, None, None, None]
    with as_on_gpu(), Convolutions() as counted:
        y = conv(image.expand(1, 6, 4, 4, 4))
    assert counted.groups == [1]
    expected = torch.tensor([11.0, 44.0, 99.0])[None, :, None, None, None]
    torch.testing.assert_close(y, expected.expand(1, 3, *[4 // stride] * 3))
