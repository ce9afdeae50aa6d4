"""Slots of a backbone: which are read, and what the decoder makes of them at each level."""

from functools import partial

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pmixseg.backbones import (
    UHVED,
    DeMoSeg,
    MMFormer,
    MultiEncoderUNet,
    RFNet,
    ShaSpec,
)
from pmixseg.backbones.slots import (
    EncodedLatents,
    SlotConv,
    check_input,
    decode_slots,
    encode_slots,
    join_levels,
    join_slots,
)
from pmixseg.errors import InputError
from pmixseg.execution import as_on_gpu
from pmixseg.types import Latents
from tests.inference import tiny_models as small


class Counting(nn.Module):
    """Multiplies by a constant, remembers how many samples it saw."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.seen = factor, []

    def forward(self, x):
        self.seen.append(len(x))
        return [self.factor * x, (self.factor * x)[..., ::2, ::2, ::2]]


def test_encoders_see_only_the_samples_that_have_the_modality():
    encoders = [Counting(k) for k in (1.0, 2.0, 3.0)]
    image = torch.randn(2, 3, 4, 4, 4)
    present = torch.tensor([[True, True, False], [True, False, False]])
    pieces = encode_slots(encoders, image, present)
    assert [e.seen for e in encoders] == [[2], [1], []]
    assert pieces[2] is None
    features = join_levels(pieces, present, 2)
    assert [tuple(f.shape) for f in features] == [(2, 3, 1, 4, 4, 4), (2, 3, 1, 2, 2, 2)]
    expected = image * torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0]])[:, :, None, None, None]
    torch.testing.assert_close(features[0][:, :, 0], expected, rtol=0, atol=0)
    torch.testing.assert_close(features[1], features[0][..., ::2, ::2, ::2], rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_joined_slots_lie_side_by_side(layout):
    present = torch.tensor([[False, True], [True, True]])
    pieces = [torch.randn(n, 3, 2, 4, 5).contiguous(memory_format=layout) for n in (1, 2)]
    joined = join_slots(pieces, present)
    assert joined.flatten(1, 2).data_ptr() == joined.data_ptr()
    assert joined.flatten(1, 2).is_contiguous(memory_format=layout)
    assert torch.equal(joined[1, 0], pieces[0][0]) and not joined[0, 0].any()
    assert torch.equal(joined[:, 1], pieces[1])


def test_nothing_present_at_all_is_refused():
    with pytest.raises(InputError, match="at least one"):
        encode_slots([nn.Identity()], torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1).bool())


def test_slot_conv_is_the_convolution_of_the_concatenated_masked_slots():
    torch.manual_seed(0)
    conv = SlotConv(3, 5, 7)
    features = torch.randn(2, 3, 5, 3, 4, 2)
    present = torch.tensor([[True, True, False], [False, False, True]])
    latents = Latents([features], ("a", "b", "c"), [present])

    def wanted(some):
        masked = torch.where(some.flags(0), features, 0.0).flatten(1, 2)
        return nn.functional.conv3d(masked, conv.weight, conv.bias)

    torch.testing.assert_close(conv(latents, 0, "f"), wanted(latents))
    assert not latents.cache, "with gradients nothing is kept"
    with torch.no_grad():
        torch.testing.assert_close(conv(latents, 0, "f"), wanted(latents))
        assert set(latents.cache) == {"f.0", "f.1", "f.2"}
        # The kept terms serve every restriction; the features themselves are not read again.
        latents.features[0] = torch.full_like(features, torch.nan)
        for shown in ([True, False, True], [True, True, True]):
            few = latents.restrict(torch.tensor(shown))
            torch.testing.assert_close(conv(few, 0, "f"), wanted(few))
        same = Latents(latents.features, latents.modalities, [present[:1].expand(2, -1)])
        same.cache = latents.cache
        torch.testing.assert_close(conv(same, 0, "f"), wanted(same))


def test_slots_that_are_all_usable_are_one_product_on_a_cpu():
    torch.manual_seed(0)
    conv = SlotConv(2, 3, 4)
    latents = Latents([torch.randn(1, 2, 3, 2, 2, 2)], ("a", "b"), [torch.ones(1, 2).bool()])
    with torch.no_grad():
        product = conv(latents, 0, "f")
        assert not latents.cache
        with as_on_gpu():
            torch.testing.assert_close(conv(latents, 0, "f"), product)
        assert set(latents.cache) == {"f.0", "f.1"}


@pytest.mark.parametrize("layout", ["slots", "channels"])
def test_slot_conv_has_the_gradients_of_the_masked_convolution(layout):
    torch.manual_seed(0)
    conv = SlotConv(2, 3, 4).double()
    features = torch.randn(2, 2, 3, 2, 3, 4, dtype=torch.float64)
    if layout == "channels":
        features = features.permute(0, 3, 4, 5, 1, 2).contiguous().permute(0, 4, 5, 1, 2, 3)
    features.requires_grad_()
    latents = Latents([features], ("a", "b"), [torch.tensor([[True, True], [False, True]])])
    weight = torch.randn(2, 4, 2, 3, 4, dtype=torch.float64)
    inputs = (features, conv.weight, conv.bias)
    ours = torch.autograd.grad((conv(latents, 0, "f") * weight).sum(), inputs)
    plain = nn.functional.conv3d(latents.masked(0).flatten(1, 2), conv.weight, conv.bias)
    for mine, theirs in zip(ours, torch.autograd.grad((plain * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_one_decoder_decodes_every_encoded_slot():
    class Last(nn.Module):
        def forward(self, features):
            assert len(features) == 1
            return 2 * features[0]

    image, encoded = torch.randn(2, 2, 4, 4, 4), torch.tensor([[True, True], [False, True]])
    pieces = encode_slots([Counting(1.0), Counting(3.0)], image, encoded)
    latents = EncodedLatents([], ("a", "b"), [], encoded=encoded, pieces=pieces)
    decoded = decode_slots(Last(), latents, [1])
    expected = (
        image[..., ::2, ::2, ::2] * torch.tensor([[2.0, 6.0], [0.0, 6.0]])[..., None, None, None]
    )
    torch.testing.assert_close(decoded[:, :, 0], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 8, 8, 8), "one channel per modality"),
        ((1, 2, 8, 8, 6), "multiples of 4"),
        ((1, 2, 4, 4, 4), "8 or more"),
        ((2, 2, 8, 8, 8), "flags"),
    ],
)
def test_check_input_says_what_does_not_fit(shape, words):
    with pytest.raises(InputError, match=words):
        check_input(torch.zeros(shape), torch.ones(1, 2).bool(), ("pet", "ct"), (1, 2, 4))
    flat = torch.zeros(1, 2, 4, 4, 8), torch.ones(1, 2).bool(), ("pet", "ct"), (1, 2, 4)
    check_input(*flat)
    with pytest.raises(InputError, match="8 or more\\."):
        check_input(*flat, least=2)


IMAGE, FLAGS = torch.zeros(1, 2, 8, 8, 8), torch.ones(1, 2).bool()


@pytest.mark.parametrize(
    ("image", "flags", "got"),
    [
        (IMAGE, FLAGS.float(), r"got float32 \[1, 2, 8, 8, 8\] and float32 \[1, 2\]"),
        (IMAGE, FLAGS.long(), "and int64"),
        (IMAGE, FLAGS[0], r"and bool \[2\]"),
        (IMAGE, [True, False], "and list"),
        (IMAGE, ("pet",), "and tuple"),
        (IMAGE, None, "and NoneType"),
        (IMAGE, FLAGS.numpy(), "and ndarray"),
        (IMAGE.numpy(), FLAGS, "got ndarray and bool"),
        (IMAGE.byte(), FLAGS, "got uint8"),
        (IMAGE[0], FLAGS, r"got float32 \[2, 8, 8, 8\]"),
        (IMAGE.movedim(1, -1), FLAGS, r"got float32 \[1, 8, 8, 8, 2\]"),
    ],
)
def test_what_is_no_image_or_no_flags_of_presence_is_named(image, flags, got):
    with pytest.raises(InputError, match=got):
        check_input(image, flags, ("pet", "ct"), (1, 2))


@pytest.mark.parametrize("kind", [MultiEncoderUNet, RFNet, MMFormer])
def test_recomputed_encoders_give_the_same_gradients_and_keep_less(kind):
    torch.manual_seed(0)
    small = {"embedding": 8, "heads": 2, "hidden": 8, "dropout": 0.0, "patch_size": 32}
    args = {"width": 4, **(small if kind is MMFormer else {})}
    net, image = kind(**args).train(), torch.randn(2, 4, 32, 32, 32)
    present = torch.tensor([[True, False, True, True], [False, False, True, False]])
    steps = {}
    for net.recompute in (False, True):
        kept = []
        hooks = torch.autograd.graph.saved_tensors_hooks
        net.zero_grad()
        with hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            latents = net.encode(image, present)
        net.decode(latents).logits.square().mean().backward()
        steps[net.recompute] = sum(kept), [p.grad for p in net.encoders.parameters()]
    assert steps[True][0] < steps[False][0] / 2
    for ours, theirs in zip(steps[True][1], steps[False][1], strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("make", [partial(MultiEncoderUNet, levels=2), RFNet])
def test_decoding_without_gradients_is_one_graph_for_every_combination(make):
    torch.manual_seed(0)
    torch.compiler.reset()
    net = make(("t1", "t2"), width=4).double().eval()
    image = torch.randn(2, 2, 16, 16, 16, dtype=torch.float64)
    shown = torch.tensor([[True, True], [True, False]])
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(net.decode, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        latents = net.encode(image, shown)
        plain = net.encode(image, shown)
        for flags in ([[1, 1], [1, 0]], [[0, 1], [1, 0]], [[0, 1]] * 2):
            subset = torch.tensor(flags, dtype=torch.bool)
            torch.testing.assert_close(
                compiled(latents.restrict(subset)).logits,
                net.decode(plain.restrict(subset)).logits,
            )
    assert counter.frame_count <= 2  # the first decode makes what the others find


# The backbone, and channels and strides of its maps, coarsest first.
MAPS = {
    "unet": (lambda: MultiEncoderUNet(width=4, levels=3), [(8, 2), (4, 1)]),
    "unet at half": (lambda: MultiEncoderUNet(width=4, levels=3, stem=2), [(8, 4), (4, 2)]),
    "rfnet": (lambda: RFNet(width=4), [(16, 4), (8, 2), (4, 1)]),
    "mmformer": (lambda: MMFormer(**small.MMFORMER), [(32, 8), (16, 4), (8, 2), (4, 1)]),
    "uhved": (lambda: UHVED(width=4), [(8, 4), (4, 2), (2, 1)]),
    "shaspec": (lambda: ShaSpec(width=4, levels=3), [(8, 2), (4, 1)]),
    "demoseg": (lambda: DeMoSeg(width=4, levels=4), [(16, 4), (8, 2), (4, 1)]),
    "segresnet": (lambda: small.early("SegResNet", **small.SEGRESNET), [(16, 2), (8, 1)]),
    # The last block of MONAI's UNet makes the logits, so the finest map is the one before it.
    "monai unet": (lambda: small.early("UNet", **small.UNET), [(3, 1)]),
    "dynunet": (lambda: small.early("DynUNet", **small.DYNUNET), [(4, 2), (3, 1)]),
    "swin": (
        lambda: small.early("SwinUNETR", **small.SWIN),
        [(96, 16), (48, 8), (24, 4), (12, 2), (12, 1)],
    ),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_have_their_strides_and_the_logits_follow_from_them(name):
    make, expected = MAPS[name]
    torch.manual_seed(0)
    net, side = make().eval(), 64 if name == "swin" else 32
    present = torch.tensor([[True, False, True, True]])
    output = net(torch.randn(1, 4, side, side, side), present)
    sizes = [(m.shape[1], side // m.shape[2]) for m in output.decoder]
    assert sizes == expected
    (gradient,) = torch.autograd.grad(output.logits.square().mean(), output.decoder[-1])
    assert gradient.isfinite().all() and gradient.any()


def test_the_finest_map_is_what_the_last_convolution_reads():
    net = MultiEncoderUNet(width=4, levels=3).eval()
    output = net(torch.randn(2, 4, 16, 16, 16), torch.ones(2, 4, dtype=torch.bool))
    torch.testing.assert_close(net.heads[0](output.decoder[-1]), output.logits)


def test_segresnet_decodes_as_its_own_decode_does():
    net = small.early("SegResNet", **small.SEGRESNET).eval()
    image = torch.randn(1, 4, 16, 16, 16)
    output = net(image, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(output.logits, net.network(image))


class Types(TorchDispatchMode):
    """Collects the types of real numbers that operations return, and which operations those are."""

    def __init__(self):
        super().__init__()
        self.of = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, torch.Tensor) and part.is_floating_point() and part.numel() > 1:
                self.of.setdefault(part.dtype, []).append(str(function))
        return result


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", [name for name in small.BACKBONES if name != "early"])
def test_a_network_in_double_precision_computes_in_it_throughout(name, gpu):
    make, _, side = small.BACKBONES[name]
    net = make().double().train()
    image = torch.randn(1, 4, side, side, side, dtype=torch.float64)
    with as_on_gpu(gpu), Types() as types:
        net(image, torch.tensor([[True, False, True, True]]))
    assert set(types.of) == {torch.float64}, types.of.get(torch.float32)
