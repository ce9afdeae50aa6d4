""""""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from torch import nn

from pmixseg.backbones.base import Backbone
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.evaluation.prediction.scans import SegmentSettings
from pmixseg.evaluation.prediction.windows import iterate_combinations
from pmixseg.types import Latents, SegOutput
from tests.evaluation.made_up import predict_combinations

NAMES = ("a", "b", "c")
ALL = torch.tensor([row for row in itertools.product([False, True], repeat=3) if any(row)])


class Tiny(Backbone):
    """One encoder per modality, two levels, instance norm, mean over what is present."""

    def __init__(self, modalities=NAMES, num_classes=4, shares=True):
        super().__init__(modalities, num_classes, (4, 4), (1, 2))
        self.shares_encoding = shares
        self.fine = nn.ModuleList(nn.Conv3d(1, 4, 3, padding=1) for _ in modalities)
        self.coarse = nn.ModuleList(nn.Conv3d(4, 4, 2, stride=2) for _ in modalities)
        self.norm = nn.InstanceNorm3d(4, affine=True)
        self.up = nn.ConvTranspose3d(4, 4, 2, stride=2)
        self.head = nn.Conv3d(8, num_classes, 3, padding=1)
        self.encoded = [0] * len(modalities)
        self.passes = 0

    def encode(self, image, present):
        self.passes += 1
        fine, coarse = [], []
        for i in range(len(self.modalities)):
            self.encoded[i] += int(present[:, i].any())
            fine.append(self.norm(self.fine[i](image[:, i : i + 1])).relu())
            coarse.append(self.norm(self.coarse[i](fine[-1])).relu())
        features = [torch.stack(fine, 1), torch.stack(coarse, 1)]
        return Latents(features, self.modalities, [present, present])

    def decode(self, latents):
        def mean(level):
            return latents.masked(level).sum(1) / latents.flags(level).sum(1)

        logits = self.head(torch.cat([mean(0), self.up(mean(1))], 1))
        return SegOutput(logits * 3, latents)


class Pointwise(Backbone):
    """Every voxel by itself: however windows are laid, the answer is the same."""

    def __init__(self, shares=True):
        super().__init__(NAMES, 4, (4,), (1,))
        self.shares_encoding = shares
        self.weight = nn.Parameter(torch.randn(3, 4))

    def encode(self, image, present):
        features = torch.einsum("bmdhw,mc->bmcdhw", image, self.weight)
        return Latents([features], NAMES, [present])

    def decode(self, latents):
        return SegOutput(latents.masked(0).sum(1), latents)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Tiny().eval()


def volume(*shape, seed=1):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))


def test_one_encoding_equals_the_plain_loop(tiny):
    image = volume(20, 17, 24)
    args = {"patch": (8, 8, 16), "overlap": 0.5, "batch_size": 3}
    shared = predict_combinations(tiny, image, ALL, **args)
    passes = tiny.passes
    tiny.shares_encoding = False
    looped = predict_combinations(tiny, image, ALL, **args)
    assert tiny.passes - passes == len(ALL) * passes
    torch.testing.assert_close(shared, looped, rtol=0, atol=1e-6)
    assert torch.equal(shared.argmax(1), looped.argmax(1))


def test_each_row_is_what_its_combination_alone_gives(tiny):
    image = volume(12, 16, 10)
    together = predict_combinations(tiny, image, ALL, patch=(8, 8, 8))
    for row, expected in zip(ALL, together, strict=True):
        alone = predict_combinations(
            tiny, image * row[:, None, None, None], row[None], patch=(8,) * 3
        )
        torch.testing.assert_close(alone[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("blend", ["gaussian", "uniform"])
@pytest.mark.parametrize("shape", [(21, 18, 30), (16, 16, 16), (5, 20, 7)])
def test_monai_is_the_oracle_for_one_combination(tiny, blend, shape):
    image = volume(*shape)
    shown = torch.tensor([True, False, True])

    def whole(stack):
        return tiny(stack, shown.expand(len(stack), -1)).logits.softmax(1)

    with torch.no_grad():
        expected = sliding_window_inference(
            image[None],
            (16, 16, 16),
            2,
            whole,
            overlap=0.3,
            mode="gaussian" if blend == "gaussian" else "constant",
        )
    predictions = predict_combinations(
        tiny, image, shown[None], patch=(16, 16, 16), overlap=0.3, batch_size=2, blend=blend
    )
    torch.testing.assert_close(predictions, expected, rtol=0, atol=2e-6)


def test_blend_by_hand():
    """Two windows of 4 over 6 voxels: the two in the middle are weighted means."""

    class Position(Pointwise):
        # Logits depend on the place in the window, so that overlaps disagree.
        def decode(self, latents):
            b, _, _, d, h, w = latents.features[0].shape
            logits = torch.zeros(b, 4, d, h, w)
            logits[:, 1] = torch.arange(d).float()[:, None, None]
            return SegOutput(logits, latents)

    prob = torch.stack([torch.arange(4.0) * 0, torch.arange(4.0), *torch.zeros(2, 4)]).softmax(0)[1]
    gauss = torch.exp(-(torch.tensor([-1.5, -0.5, 0.5, 1.5]) ** 2) / (2 * 0.5**2))
    for blend, w in (("uniform", torch.ones(4)), ("gaussian", gauss)):
        expected = torch.cat(
            [prob[:2], (prob[2:] * w[2:] + prob[:2] * w[:2]) / (w[2:] + w[:2]), prob[2:]]
        )
        predictions = predict_combinations(
            Position().eval(), volume(6, 1, 1), ALL[:1], patch=(4, 1, 1), blend=blend
        )
        torch.testing.assert_close(predictions[0, 1, :, 0, 0], expected, rtol=0, atol=1e-6)


@settings(max_examples=25)
@given(
    st.tuples(*[st.integers(1, 11)] * 3),
    st.tuples(*[st.integers(1, 6)] * 3),
    st.floats(0, 0.9),
    st.integers(1, 5),
    st.sampled_from(["gaussian", "uniform"]),
    st.booleans(),
)
def test_a_pointwise_network_gives_its_own_answer_under_any_windows(
    shape, patch, overlap, batch_size, blend, shares
):
    torch.manual_seed(0)
    net = Pointwise(shares).eval()
    image = volume(*shape)
    predictions = predict_combinations(
        net, image, ALL, patch=patch, overlap=overlap, batch_size=batch_size, blend=blend
    )
    stack = image[None].expand(len(ALL), -1, -1, -1, -1)
    with torch.no_grad():
        expected = net(stack, ALL).logits.softmax(1)
    assert predictions.dtype == torch.float32
    torch.testing.assert_close(predictions, expected, rtol=0, atol=1e-5)


def test_a_small_volume_is_the_middle_of_its_padded_self(tiny):
    image = volume(5, 9, 6)
    padded = torch.zeros(3, 8, 16, 8)
    padded[:, 1:6, 3:12, 1:7] = image
    small = predict_combinations(tiny, image, ALL, patch=(8, 16, 8))
    large = predict_combinations(tiny, padded, ALL, patch=(8, 16, 8))
    assert torch.equal(small, large[:, :, 1:6, 3:12, 1:7])


def test_batch_size_changes_nothing(tiny):
    image = volume(20, 12, 18)
    one, many = (
        predict_combinations(tiny, image, ALL, patch=(8, 8, 8), batch_size=n) for n in (1, 7)
    )
    torch.testing.assert_close(one, many, rtol=0, atol=1e-6)


def test_chunks_change_nothing_and_bound_memory(tiny):
    image = volume(12, 12, 12)
    whole = predict_combinations(tiny, image, ALL, patch=(8, 8, 8))
    parts = list(iterate_combinations(tiny, image, ALL, patch=(8, 8, 8), chunk=3))
    assert [list(rows) for rows, _ in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    assert max(len(p) for _, p in parts) == 3
    torch.testing.assert_close(torch.cat([p for _, p in parts]), whole, rtol=0, atol=1e-6)


def test_encoders_of_modalities_in_no_combination_are_not_asked_for(tiny):
    flags = torch.tensor([[True, False, False], [True, False, True]])
    predict_combinations(tiny, volume(8, 8, 8), flags, patch=(8, 8, 8))
    assert tiny.encoded == [1, 0, 1]


def test_progress_counts_windows_and_no_gradient_is_kept(tiny):
    calls = []
    predictions = predict_combinations(
        tiny,
        volume(16, 8, 8),
        ALL,
        patch=(8, 8, 8),
        overlap=0,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 2), (2, 2)]
    assert not predictions.requires_grad
    assert torch.is_grad_enabled()


def test_a_half_precision_network_is_summed_in_float32(tiny):
    image = volume(8, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predictions = predict_combinations(tiny, image, ALL, patch=(8, 8, 8))
    assert predictions.dtype == torch.float32
    torch.testing.assert_close(predictions.sum(1), torch.ones(len(ALL), 8, 8, 8), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch": (8, 7, 8)}, "divisible by 2"),
        ({"patch": (8, 8)}, "three lengths"),
        ({"overlap": 1.0}, "overlap is 1.0"),
        ({"overlap": -0.5}, "overlap is -0.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"blend": "gausian"}, "blend 'gausian' is unknown"),
        ({"present": torch.zeros(1, 3, dtype=torch.bool)}, "a combination is empty"),
        ({"present": torch.ones(1, 2, dtype=torch.bool)}, "one row of 3 flags"),
        ({"image": torch.zeros(2, 8, 8, 8)}, "prepare the case for the same task"),
    ],
)
def test_what_cannot_be_done_is_said(tiny, change, words):
    args = {"image": volume(8, 8, 8), "present": ALL, "patch": (8, 8, 8)} | change
    with pytest.raises(InputError, match=words):
        predict_combinations(tiny, args.pop("image"), args.pop("present"), **args)


def test_a_predictor_in_training_mode_is_refused(tiny):
    with pytest.raises(ValueError, match=r"call \.eval\(\)"):
        predict_combinations(tiny.train(), volume(8, 8, 8), ALL, patch=(8, 8, 8))
    with pytest.raises(InputError, match="chunk is 0"):
        next(iterate_combinations(tiny.eval(), volume(8, 8, 8), ALL, patch=(8, 8, 8), chunk=0))


WRONG = {
    "window": [((0, 0, 0), "give 1 or more"), ((32, 32), "give a list of 3 or null")],
    "overlap": [(1.0, "overlap is 1.0"), (-1.0, "overlap is -1.0"), (np.nan, "overlap is nan")],
    "blend": [("gausian", "blend is 'gausian'; give gaussian or uniform")],
    "batch_size": [
        *((n, "give 1 or more") for n in (0, -3)),
        *((n, "give a whole number or auto") for n in (2.5, np.inf, np.nan, "many")),
    ],
    "postprocess": [(("nope",), "'nope' is unknown"), ("fill_holes", "give a list")],
    "examples": [(-1, "examples is -1; give 0 or more")],
}
CASES = [(name, value, words) for name, several in WRONG.items() for value, words in several]


@pytest.mark.parametrize(("name", "value", "words"), CASES)
def test_settings_that_do_not_exist_are_refused(name, value, words):
    with pytest.raises(InputError, match=words):
        EvaluationSettings(**{name: value})
    with pytest.raises(InputError, match=words):
        EvaluationSettings.of({name: value})
    if name in ("window", "overlap", "postprocess"):
        with pytest.raises(InputError, match=words):
            SegmentSettings(**{name: value})


def test_lists_of_yaml_become_tuples():
    from_yaml = {"window": [32, 32, 16], "postprocess": ["fill_holes"]}
    for made in (EvaluationSettings(**from_yaml), EvaluationSettings.of(from_yaml)):
        assert made == EvaluationSettings(window=(32, 32, 16), postprocess=("fill_holes",))
    assert EvaluationSettings.of({"postprocess": None}) == EvaluationSettings()
