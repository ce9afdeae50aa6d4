"""The lean layers against torch's own, in double precision and in both layouts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pmixseg.backbones.layers import lean
from pmixseg.backbones.layers import norm as norm_module
from pmixseg.backbones.layers import regions as regions_module
from pmixseg.backbones.layers.lean import (
    AS_IT_IS,
    CONCATENATED,
    UPSAMPLED,
    LeanConv3d,
    fast_layout,
    is_channels_last,
    leaves_onednn,
    mix_channels,
    voxel_rows,
)
from pmixseg.backbones.layers.norm import NormAct, norm_act
from pmixseg.backbones.layers.regions import mix_regions
from pmixseg.execution import as_on_gpu

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]
INPUTS = [(AS_IT_IS, (3,)), (CONCATENATED, (2, 1)), (UPSAMPLED, (3,))]


def draw(channels, *sides, samples=2, dtype=torch.float64):
    return torch.randn(samples, channels, *sides, dtype=dtype).requires_grad_()


class ShapesOf(TorchDispatchMode):
    """Shapes of the first operand of one of torch's operations."""

    def __init__(self, name):
        super().__init__()
        self.name, self.shapes = name, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == self.name:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def close_gradients(ours, theirs, inputs):
    weight = torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs)
    mine = torch.autograd.grad((ours * weight).sum(), inputs)
    for a, b in zip(mine, torch.autograd.grad((theirs * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("slab", [None, 1 << 21, 3 * 2 * 20 * 8, 1])
def test_norm_act_is_instance_norm_and_leaky_relu(layout, samples, affine, slab, monkeypatch):
    if slab is not None:  # all at once, two slices (the last slab one), one
        monkeypatch.setattr(norm_module, "SMALL", 0)
        monkeypatch.setattr(lean, "SLAB", slab)
    torch.manual_seed(0)
    x = draw(3, 5, 4, 5, samples=samples)
    layer = NormAct(3, 0.1).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    leaf = x.contiguous(memory_format=layout)
    ours = layer(leaf) if affine else norm_act(leaf, 0.1)
    scale = (layer.weight, layer.bias) if affine else (None, None)
    plain = F.leaky_relu(F.instance_norm(x, weight=scale[0], bias=scale[1]), 0.1)
    close_gradients(ours, plain, (x, *(s for s in scale if s is not None)))


@pytest.mark.parametrize("small", [0, norm_module.SMALL])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("affine", [False, True])
def test_norm_act_passes_gradcheck(affine, layout, small, monkeypatch):
    monkeypatch.setattr(lean, "SLAB", 100)
    monkeypatch.setattr(norm_module, "SMALL", small)
    torch.manual_seed(0)
    factors = [torch.randn(2, dtype=torch.float64).requires_grad_() for _ in range(2)]
    inputs = (draw(2, 3, 2, 2), *(factors if affine else ()))

    def normed(x, *some):
        return norm_act(x.contiguous(memory_format=layout), 0.1, *some)

    assert torch.autograd.gradcheck(normed, inputs)


def test_a_small_batch_and_slabs_give_the_same_norm_in_half_precision(monkeypatch):
    torch.manual_seed(0)
    x = fast_layout((torch.randn(3, 8, 6, 5, 4) + 1).bfloat16()).requires_grad_()
    layer, weight = NormAct(8, 0.1), torch.randn(3, 8, 6, 5, 4)
    norms = []
    for small in (norm_module.SMALL, 0):
        monkeypatch.setattr(norm_module, "SMALL", small)
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert is_channels_last(y)
        norms.append((y, *torch.autograd.grad((y * weight).sum(), (x, *layer.parameters()))))
    rounding = 2**-9 * (3 * 6 * 5 * 4) ** 0.5  # of a sum over 360 products in bfloat16
    for a, b, atol in zip(*norms, (2**-6, 2**-6, 3 * rounding, 3 * rounding), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=atol)


@pytest.mark.parametrize("affine", [False, True])
def test_norm_act_may_take_the_memory_of_its_input(affine, monkeypatch):
    monkeypatch.setattr(norm_module, "SMALL", 0)
    torch.manual_seed(0)
    image = torch.randn(2, 3, 4, 4, 4)
    conv, layer = LeanConv3d(3, 4), NormAct(4, 0.1, reuse=True)
    scale = (layer.weight, layer.bias) if affine else (None, None)
    with torch.no_grad():
        x = conv(image)
        plain = F.leaky_relu(F.instance_norm(x, weight=scale[0], bias=scale[1]), 0.1)
        y = layer(x) if affine else norm_act(x, 0.1, reuse=True)
        assert y.data_ptr() == x.data_ptr()
        torch.testing.assert_close(y, plain)
    x = conv(image)
    y = layer(x) if affine else norm_act(x, 0.1, reuse=True)
    assert (y.data_ptr() == x.data_ptr()) is not affine  # its backward pass needs x
    close_gradients(y, F.leaky_relu(F.instance_norm(conv(image)), 0.1), (conv.weight,))


def test_bf16_sums_are_made_in_float32():
    torch.manual_seed(0)
    x = fast_layout((torch.randn(1, 4, 40, 40, 40) + 3).bfloat16())
    exact = F.leaky_relu(F.instance_norm(x.double()), 0.2)
    torch.testing.assert_close(norm_act(x, 0.2).double(), exact, rtol=2**-8, atol=2e-3)


def test_a_sample_or_slot_of_a_larger_tensor_is_convolved_the_same():
    torch.manual_seed(0)
    conv = LeanConv3d(3, 2)
    whole = fast_layout(torch.randn(2, 6, 4, 4, 4))
    for some in (whole[1:, :3], whole[:1, 3:], whole[:, 3:], whole[::2, :3]):
        plain = nn.Conv3d.forward(conv, some.contiguous())
        torch.testing.assert_close(conv(some), plain, rtol=1e-4, atol=1e-5)
        mixed = mix_channels(some, conv.weight[:, :, 0, 0, 0])
        plain = F.conv3d(some.contiguous(), conv.weight[:, :, :1, :1, :1])
        torch.testing.assert_close(mixed, plain, rtol=1e-4, atol=1e-5)


def test_norm_of_many_channels_last_voxels_is_exact_where_torch_s_is_not():
    torch.manual_seed(0)
    x = (torch.randn(1, 16, 64, 64, 64) + 1).contiguous(memory_format=torch.channels_last_3d)
    exact = F.leaky_relu(F.instance_norm(x.double()), 0.2)
    ours = norm_act(x, 0.2)
    assert is_channels_last(ours)
    assert (ours - exact).abs().max() < 5e-6
    assert (F.leaky_relu(F.group_norm(x, 16), 0.2) - exact).abs().max() > 5e-5, "torch has improved"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("prepare", "channels"), INPUTS, ids=["one", "cat", "up"])
def test_a_lean_convolution_is_the_plain_one(layout, padding, stride, prepare, channels):
    torch.manual_seed(0)
    conv = LeanConv3d(3, 2, stride=stride, padding=padding).double()
    inputs = [draw(c, 2, 4, 6) for c in channels]
    ours = conv(*(x.contiguous(memory_format=layout) for x in inputs), prepare=prepare)
    plain = nn.Conv3d.forward(conv, prepare.plain(*inputs))
    close_gradients(ours, plain, (*inputs, conv.weight, conv.bias))


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("stride", [1, 2])
def test_samples_one_by_one_have_the_gradients_of_their_batch(padding, stride):
    """A single small sample goes another way backwards."""
    torch.manual_seed(0)
    conv = LeanConv3d(4, 6, 3, stride, padding)
    batch = torch.randn(2, 4, 8, 10, 12)
    assert leaves_onednn(batch[:1]) and not leaves_onednn(batch)

    def gradients(parts):
        conv.zero_grad()
        parts = [part.clone().requires_grad_() for part in parts]
        sum(conv(part).square().sum() for part in parts).backward()
        to_x = torch.cat([part.grad for part in parts])
        return to_x, conv.weight.grad.clone(), conv.bias.grad.clone()

    for apart, together in zip(gradients(batch.split(1)), gradients([batch]), strict=True):
        torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("prepare", "channels"), INPUTS, ids=["one", "cat", "up"])
def test_a_lean_pointwise_convolution_is_the_plain_one(prepare, channels):
    torch.manual_seed(0)
    conv = LeanConv3d(3, 5, 1).double()
    inputs = [draw(c, 2, 2, 3) for c in channels]
    plain = F.conv3d(prepare.plain(*inputs), conv.weight, conv.bias)
    close_gradients(conv(*inputs, prepare=prepare), plain, (*inputs, conv.weight, conv.bias))


@pytest.mark.parametrize("out", [2, 7])
def test_every_sample_can_be_mixed_by_its_own_weights(out):
    torch.manual_seed(0)
    x = draw(4, 2, 3, 2)
    weight = torch.randn(2, out, 4, dtype=torch.float64).requires_grad_()
    bias = torch.randn(out, dtype=torch.float64).requires_grad_()
    plain = torch.einsum("boc,bcdhw->bodhw", weight, x) + bias[:, None, None, None]
    close_gradients(mix_channels(x, weight, bias), plain, (x, weight, bias))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gpu_mixes_every_sample_in_pieces(layout, bias, monkeypatch):
    monkeypatch.setattr(lean, "LONG", 1)
    torch.manual_seed(0)
    x = draw(4, 2, 4, 3)
    weight = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    shift = torch.randn(3, dtype=torch.float64).requires_grad_() if bias else None
    plain = torch.einsum("boc,bcdhw->bodhw", weight, x)
    plain = plain if shift is None else plain + shift[:, None, None, None]
    with as_on_gpu():
        mixed = mix_channels(x.contiguous(memory_format=layout), weight, shift)
        close_gradients(mixed, plain, (x, weight, *([] if shift is None else [shift])))


def test_a_gpu_shares_a_long_sum_among_its_processors():
    """Seen by the shapes of the matrix products: 2 samples x 128 pieces."""
    a, b = torch.randn(2, 4096, 3), torch.randn(2, 4096, 5)
    with as_on_gpu(), ShapesOf("bmm") as products:
        shared = lean.sum_of_products(a, b)
    assert products.shapes == [(256, 3, 32)]
    with ShapesOf("bmm") as products:
        plain = lean.sum_of_products(a, b)
    assert products.shapes == [(2, 3, 4096)]
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-3)


def test_first_of_several_steps_needs_no_gradient():
    conv = LeanConv3d(1, 2)
    image = torch.randn(1, 1, 4, 4, 4)
    conv(image).sum().backward()
    assert conv.weight.grad is not None and image.grad is None
    conv.requires_grad_(False)
    assert not conv(image).requires_grad


@pytest.mark.parametrize("size", [1, 3])
def test_autocast_computes_in_bf16_and_gives_float32_gradients(size):
    torch.manual_seed(0)
    conv = LeanConv3d(4, 4, size)
    x = draw(4, 4, 4, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm_act(conv(x), 0.2)
    assert y.dtype == torch.bfloat16
    plain = F.leaky_relu(F.instance_norm(nn.Conv3d.forward(conv, x)), 0.2)
    torch.testing.assert_close(y.float(), plain, rtol=0.1, atol=0.1)
    y.float().square().sum().backward()
    assert x.grad.dtype == conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("padding", "depth"), [("zeros", 1), ("zeros", 2), ("zeros", 3), ("reflect", 2), ("reflect", 3)]
)
def test_weight_gradients_of_few_slices_in_bf16(padding, depth):
    """OneDNN leaves some of them unwritten where the first axis has two voxels."""
    torch.manual_seed(0)
    x = torch.randn(2, 32, depth, 2, 3)
    gradients = {}
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(1)
        conv = LeanConv3d(32, 32, 3, padding=padding)
        # Gradients are allocated where these were.
        junk = [torch.full((n,), float("inf")) for n in (1000, 32 * 32 * 27, 100_000)]
        del junk
        leaf = x.to(dtype).requires_grad_()
        conv.to(dtype)(leaf).square().sum().backward()
        gradients[dtype] = [leaf.grad, conv.weight.grad, conv.bias.grad]
    for half, double in zip(*gradients.values(), strict=True):
        assert (half.double() - double).abs().max() < 0.05 * double.abs().max()


def test_a_norm_keeps_one_tensor_and_a_padded_convolution_its_input(monkeypatch):
    monkeypatch.setattr(norm_module, "SMALL", 0)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    a, b = (draw(4, 4, 4, 4, dtype=torch.float32) for _ in range(2))
    conv = LeanConv3d(8, 4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = norm_act(conv(a, b, prepare=CONCATENATED), 0.2)
    large = {t.data_ptr() for t in kept if t.numel() >= a.numel() and t is not conv.weight}
    assert large - {conv.weight.data_ptr()} == {a.data_ptr(), b.data_ptr(), y.data_ptr()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_voxel_rows_are_a_view(layout):
    x = torch.randn(2, 3, 2, 3, 4).contiguous(memory_format=layout)
    rows = voxel_rows(x)
    assert rows.shape == (2, 24, 3) and rows.data_ptr() == x.data_ptr()
    assert torch.equal(rows, x.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slab", [1 << 21, 100])
def test_mixing_by_region_is_the_plain_product(layout, slab, monkeypatch):
    monkeypatch.setattr(lean, "SLAB", slab)
    torch.manual_seed(0)
    x, regions = draw(6, 3, 2, 4), draw(3, 3, 2, 4).detach().softmax(1)
    mixing, weight, bias = (
        torch.randn(*shape, dtype=torch.float64).requires_grad_()
        for shape in ((2, 3 * 2, 6), (5, 3 * 2), (5,))
    )

    def plain():
        mixed = torch.einsum("bqn,bndhw->bqdhw", mixing, x).unflatten(1, (3, 2))
        inside = (mixed * regions[:, :, None]).flatten(1, 2)
        return torch.einsum("oq,bqdhw->bodhw", weight, inside) + bias[:, None, None, None]

    inputs = (x, mixing, weight, bias)
    contiguous = [t.contiguous(memory_format=layout) for t in (x, regions)]
    close_gradients(
        mix_regions(contiguous[0], mixing, contiguous[1], weight, bias), plain(), inputs
    )
    monkeypatch.setattr(regions_module, "runs_lean", lambda x: False)
    close_gradients(mix_regions(x, mixing, regions, weight, bias), plain(), inputs)
