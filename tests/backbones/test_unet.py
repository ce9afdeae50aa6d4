import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pmixseg.backbones import Backbone, MultiEncoderUNet
from pmixseg.backbones.unet import Upsampling, conv_block
from pmixseg.errors import InputError
from pmixseg.testing import check_backbone


@pytest.mark.parametrize(
    "net",
    [
        MultiEncoderUNet(width=3, levels=3, deep_supervision=True, dropout=0.2),
        MultiEncoderUNet(("pet", "ct.venous"), num_classes=2, width=2, levels=2),
        MultiEncoderUNet(("only",), num_classes=3, width=2, levels=4),
        MultiEncoderUNet(width=4, levels=3, stem=2, deep_supervision=True),
    ],
    ids=["four", "two", "one", "stem"],
)
def test_it_holds_the_contract(net):
    check_backbone(net)


def test_a_block_is_convolution_instance_norm_and_leaky_relu():
    block, x = conv_block(1, 2, 2, dropout=0.0), torch.randn(1, 1, 6, 6, 6)
    convolved = F.conv3d(x, block[0].weight, stride=2, padding=1)
    torch.testing.assert_close(block(x), F.leaky_relu(F.instance_norm(convolved), 0.01))


def test_compiled_once_for_every_pattern_of_presence():
    net = MultiEncoderUNet(width=2, levels=2).eval()
    torch.compiler.reset()
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    encode, decode = (torch.compile(f, backend=backend) for f in (net.encode, net.decode))
    image = torch.randn(2, 4, 8, 8, 8)
    patterns = [[[1, 1, 1, 1], [1, 1, 1, 1]], [[1, 0, 0, 1], [0, 1, 0, 0]], [[0, 1, 1, 0]] * 2]
    counts = []
    with torch.no_grad():
        for rows in (*patterns, [[1, 1, 0, 0], [1, 0, 1, 0]], [[0, 0, 0, 1], [1, 1, 1, 0]]):
            present = torch.tensor(rows).bool()
            logits = decode(encode(image, present)).logits
            torch.testing.assert_close(logits, net(image, present).logits, rtol=1e-4, atol=1e-4)
            counts.append(len(frames))
    # One graph with both samples, one with a single sample; new patterns add none.
    assert counts[-1] == counts[1], counts


def test_deep_supervision_at_every_stride_but_the_lowest_in_training_only():
    net = MultiEncoderUNet(width=2, levels=4, deep_supervision=True)
    image, present = torch.randn(1, 4, 16, 16, 16), torch.ones(1, 4).bool()
    extras = net(image, present).extras
    assert {k: tuple(v.shape[1:]) for k, v in extras.items()} == {
        "ds1": (4, 8, 8, 8),
        "ds2": (4, 4, 4, 4),
    }
    assert not net.eval()(image, present).extras


def test_widths_and_strides_double_with_every_level():
    net = MultiEncoderUNet(width=5, levels=3)
    assert (net.channels, net.strides) == ((5, 10, 20), (1, 2, 4))
    assert MultiEncoderUNet(width=5, levels=3, stem=2).strides == (2, 4, 8)
    for levels in (1, 20):
        with pytest.raises(InputError, match=f"levels is {levels}; give 2 to 9"):
            MultiEncoderUNet(levels=levels)
    with pytest.raises(InputError, match="1 or 2"):
        MultiEncoderUNet(stem=3)


def test_a_network_without_channels_is_refused():
    with pytest.raises(InputError, match="MultiEncoderUNet: width is 0; give 1 or more"):
        MultiEncoderUNet(width=0)
    own = MultiEncoderUNet.__new__(MultiEncoderUNet)  # of a class that computes its channels
    with pytest.raises(InputError, match="MultiEncoderUNet: a level would have 0 channels; make"):
        Backbone.__init__(own, ("t1",), 2, channels=(4, 0), strides=(1, 2))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
def test_upsampling_is_the_transposed_convolution_in_the_layout_of_its_input(size, bias, samples):
    torch.manual_seed(0)
    up = Upsampling(6, 5, size, bias)
    x = torch.randn(samples, 6, 4, 3, 5).contiguous(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    plain = nn.functional.conv_transpose3d(x, up.weight, up.bias, size)
    weight = torch.randn_like(plain)
    ours = up(x)
    torch.testing.assert_close(ours, plain)
    assert ours.is_contiguous(memory_format=torch.channels_last_3d)
    inputs = (x, *up.parameters())
    mine, theirs = (torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, plain))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)
