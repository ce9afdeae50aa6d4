import pytest
import torch
from torch import nn

from pmixseg.backbones.slots import SlotConv, check_input, decode_slots, encode_slots
from pmixseg.errors import InputError
from pmixseg.types import Latents


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
    features = encode_slots(encoders, image, present)
    assert [e.seen for e in encoders] == [[2], [1], []]
    assert [tuple(f.shape) for f in features] == [(2, 3, 1, 4, 4, 4), (2, 3, 1, 2, 2, 2)]
    expected = image * torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0]])[:, :, None, None, None]
    torch.testing.assert_close(features[0][:, :, 0], expected, rtol=0, atol=0)
    torch.testing.assert_close(features[1], features[0][..., ::2, ::2, ::2], rtol=0, atol=0)


def test_nothing_present_at_all_is_refused():
    with pytest.raises(InputError, match="at least one"):
        encode_slots([nn.Identity()], torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1).bool())


def test_slot_conv_is_the_convolution_of_the_concatenated_masked_slots():
    torch.manual_seed(0)
    conv = SlotConv(3, 5, 7)
    features = torch.randn(2, 3, 5, 3, 4, 2)
    present = torch.tensor([[True, True, False], [False, False, True]])
    latents = Latents([features], ("a", "b", "c"), [present])
    masked = (features * present[:, :, None, None, None, None]).reshape(2, 15, 3, 4, 2)
    wanted = nn.functional.conv3d(masked, conv.weight, conv.bias)
    torch.testing.assert_close(conv(latents, 0, "f"), wanted)
    assert not latents.cache, "with gradients nothing is kept"
    with torch.no_grad():
        torch.testing.assert_close(conv(latents, 0, "f"), wanted)
        assert set(latents.cache) == {"f"}
        # The kept terms serve every restriction; the features themselves are not read again.
        latents.features[0] = torch.full_like(features, torch.nan)
        few = latents.restrict(torch.tensor([True, False, True]))
        masked = torch.where(few.flags(0), features, 0.0).reshape(2, 15, 3, 4, 2)
        wanted = nn.functional.conv3d(masked, conv.weight, conv.bias)
        torch.testing.assert_close(conv(few, 0, "f"), wanted)


def test_one_decoder_decodes_every_encoded_slot():
    class Last(nn.Module):
        def forward(self, features):
            assert all(len(f) == 3 for f in features), "absent slots are not decoded"
            return 2 * features[-1]

    features = [torch.randn(2, 2, 3, 4, 4, 4), torch.randn(2, 2, 5, 2, 2, 2)]
    encoded = torch.tensor([[True, True], [False, True]])
    decoded = decode_slots(Last(), features, encoded)
    wanted = 2 * features[1] * encoded[:, :, None, None, None, None]
    torch.testing.assert_close(decoded, wanted, rtol=0, atol=0)


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
