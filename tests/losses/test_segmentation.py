"""The criterion against numbers worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmixseg.describe import build, describe
from pmixseg.errors import InputError
from pmixseg.losses.segmentation import DiceCE, area_fractions
from pmixseg.types import Batch, Latents, SegOutput


def output(logits, **extras):
    return SegOutput(logits, Latents([], ("a",), []), extras)


def batch(label) -> Batch:
    flags = torch.ones(label.shape[0], 1, dtype=torch.bool)
    return {
        "image": torch.zeros(label.shape[0], 1, *label.shape[1:]),
        "label": label,
        "case_id": ["c"] * label.shape[0],
        "acquired": flags,
        "key": torch.zeros(label.shape[0], dtype=torch.int64),
    }


def two_voxels(p0: float, p1: float):
    """Logits of two voxels whose foreground probabilities are p0 and p1; truth: (0, 1)."""
    logit = torch.tensor([math.log(p0 / (1 - p0)), math.log(p1 / (1 - p1))])
    logits = torch.stack([torch.zeros(2), logit]).reshape(1, 2, 2, 1, 1)
    return logits, torch.tensor([0, 1]).reshape(1, 2, 1, 1)


def test_dice_and_cross_entropy_by_hand():
    logits, label = two_voxels(0.2, 0.6)
    # Foreground: 2·0.6 / (0.8 + 1); background: 2·0.8 / (1.2 + 1); CE: -(ln 0.8 + ln 0.6)/2.
    dice = 1 - (1.2 / 1.8 + 1.6 / 2.2) / 2
    ce = -(math.log(0.8) + math.log(0.6)) / 2
    got = DiceCE()(output(logits), batch(label), 0)
    assert got.item() == pytest.approx(dice + ce, abs=2e-5)
    got = DiceCE(include_background=False, ce_weight=0.0)(output(logits), batch(label), 0)
    assert got.item() == pytest.approx(1 - 1.2 / 1.8, abs=2e-5)


def test_deep_supervision_weights_are_powers_of_one_half_and_normalised():
    logits, label = two_voxels(0.2, 0.6)
    coarse = torch.zeros(1, 2, 1, 1, 1)  # p = 1/2 against the fraction 1/2
    criterion = DiceCE(dice_weight=0.0)
    fine = -(math.log(0.8) + math.log(0.6)) / 2
    got = criterion(
        output(logits, ds1=coarse, ds2=coarse, other=coarse * torch.nan), batch(label), 0
    )
    want = (fine + 0.5 * math.log(2) + 0.25 * math.log(2)) / 1.75
    assert got.item() == pytest.approx(want, rel=1e-6)


def test_soft_labels_reach_the_dice_term():
    coarse = torch.zeros(1, 2, 1, 1, 1)
    logits, label = two_voxels(0.2, 0.6)
    criterion = DiceCE(ce_weight=0.0, deep_supervision_decay=1.0)
    fine = 1 - (1.2 / 1.8 + 1.6 / 2.2) / 2
    got = criterion(output(logits, ds1=coarse), batch(label), 0)
    # 2·½·½ / (½ + ½) = ½ for both classes.
    assert got.item() == pytest.approx((fine + 0.5) / 2, abs=2e-5)


def test_batch_dice_joins_samples_and_says_so():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, 4)
    label = torch.randint(0, 3, (2, 4, 4, 4))
    apart, joined = DiceCE(ce_weight=0), DiceCE(ce_weight=0, batch_dice=True)
    assert not apart.couples_samples and joined.couples_samples
    long = logits.movedim(1, 0).reshape(1, 3, 8, 4, 4), label.reshape(1, 8, 4, 4)
    assert joined(output(logits), batch(label), 0).item() == pytest.approx(
        apart(output(long[0]), batch(long[1]), 0).item(), rel=1e-4
    )


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.zeros(1, 2, 40, 50, 50, dtype=torch.float16)  # 100 000 voxels > 65504
    label = torch.zeros(1, 40, 50, 50, dtype=torch.int64)
    loss = DiceCE()(output(logits), batch(label), 0)
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


def test_gradients_are_right():
    torch.manual_seed(0)
    label = torch.randint(0, 3, (1, 4, 2, 2))
    logits = torch.randn(1, 3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    coarse = torch.randn(1, 3, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    criterion = DiceCE()
    assert torch.autograd.gradcheck(
        lambda a, b: criterion(output(a, ds1=b), batch(label), 0), (logits, coarse)
    )


@given(st.integers(2, 5), st.sampled_from([1, 2, 4]), st.integers(0, 2**31))
def test_area_fractions_are_means_of_one_hot(classes, stride, seed):
    label = torch.randint(0, classes, (2, 4, 8, 4), generator=torch.Generator().manual_seed(seed))
    shape = [s // stride for s in label.shape[1:]]
    got = area_fractions(label, classes, shape)
    onehot = torch.nn.functional.one_hot(label, classes).float()
    want = onehot.reshape(2, shape[0], stride, shape[1], stride, shape[2], stride, classes)
    assert torch.allclose(got, want.mean((2, 4, 6)).movedim(-1, 1), atol=1e-6)


def test_a_grid_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiples"):
        area_fractions(torch.zeros(1, 5, 4, 4, dtype=torch.int64), 2, (2, 2, 2))


def test_negative_weights_are_refused_and_arguments_survive_a_description():
    with pytest.raises(InputError, match="dice_weight"):
        DiceCE(dice_weight=-1)
    again = build(describe(DiceCE(batch_dice=True, ce_weight=0.5)))
    assert again.init_args["ce_weight"] == 0.5 and again.couples_samples
