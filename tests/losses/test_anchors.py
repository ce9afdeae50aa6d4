"""Anchors against numbers worked by hand, a slow reference, and hidden NaNs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmixseg.describe import build, describe
from pmixseg.errors import InputError
from pmixseg.execution import as_on_gpu
from pmixseg.losses.anchors import (
    MixtureAnchor,
    ModalityAnchor,
    NormalAnchor,
    ProductAnchor,
    WeightedAnchor,
)
from pmixseg.slot_sums import choose_slots, hide, weighted_sum
from tests.losses.scenes import NAMES, bound, flags


def voxel(*values, dtype=torch.float32):
    """One sample, one channel, one voxel, one value per modality."""
    return torch.tensor(values, dtype=dtype).reshape(1, -1, 1, 1, 1, 1)


def randomised(anchor):
    """Give a learned w something other than uniform."""
    for p in anchor.parameters():
        torch.nn.init.normal_(p)
    return anchor


def test_mixture_by_hand():
    anchor = bound(MixtureAnchor())
    f = voxel(1.0, 2.0, 3.0, 6.0)
    assert anchor(f, flags([1, 1, 1, 1]), 0).item() == pytest.approx(3.0)
    with torch.no_grad():  # level 1: softmax(ln 1, ln 2, ln 3, ln 4) = 0.1, 0.2, 0.3, 0.4
        anchor.scores[4:] = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()
    assert anchor(f, flags([1, 1, 1, 1]), 1).item() == pytest.approx(0.1 + 0.4 + 0.9 + 2.4)
    # Over {flair, t2}: w' = 1/5, 4/5.
    assert anchor(f, flags([1, 0, 0, 1]), 1).item() == pytest.approx(0.2 + 4.8)
    assert anchor(f, flags([1, 0, 0, 1]), 0).item() == pytest.approx(3.5)
    assert anchor(f, flags([0, 0, 1, 0]), 1).item() == 3.0  # one modality is copied exactly


def test_fixed_weights_by_hand():
    f = voxel(1.0, 2.0, 3.0, 6.0)
    anchor = bound(MixtureAnchor([1, 0, 0, 3]))
    assert anchor(f, flags([1, 1, 1, 1]), 0).item() == pytest.approx(4.75)
    assert anchor(f, flags([1, 1, 0, 0]), 0).item() == pytest.approx(1.0)
    assert anchor(f, flags([0, 1, 1, 0]), 0).item() == pytest.approx(2.5)  # both weigh 0: equal
    assert bound(MixtureAnchor("uniform"))(f, flags([0, 1, 1, 1]), 1).item() == pytest.approx(
        11 / 3
    )


def test_modality_anchor_falls_back_to_the_mean():
    anchor = bound(ModalityAnchor("t1ce"))
    f = voxel(1.0, 2.0, 3.0, 6.0)
    assert anchor(f, flags([1, 1, 1, 1]), 0).item() == 2.0
    assert anchor(f, flags([1, 0, 0, 1]), 0).item() == pytest.approx(3.5)


def test_normal_anchor_is_zero_and_cannot_fill():
    anchor = bound(NormalAnchor())
    assert anchor(voxel(1.0, math.nan, 3.0, 6.0), flags([1, 0, 1, 1]), 0).item() == 0.0
    mean, log_variance = anchor.gaussian(voxel(1.0), voxel(2.0), flags([1]), 0)
    assert (mean.item(), log_variance.item()) == (0.0, 0.0)
    assert not anchor.can_fill and not anchor.learned


def test_moment_matched_mixture_by_hand():
    anchor = bound(MixtureAnchor([1, 3]), ("a", "b"))
    mean, log_variance = voxel(0.0, 4.0), voxel(1.0, 2.0).log()
    mu, lv = anchor.gaussian(mean, log_variance, flags([1, 1]), 0)
    # μ = 3; Σ w(σ² + μ²) − μ² = ¼·1 + ¾·(2 + 16) − 9 = 4.75
    assert mu.item() == pytest.approx(3.0)
    assert lv.exp().item() == pytest.approx(4.75)
    mu, lv = anchor.gaussian(mean, log_variance, flags([0, 1]), 0)
    assert (mu.item(), lv.exp().item()) == (4.0, pytest.approx(2.0))


def test_product_of_gaussians_by_hand():
    anchor = bound(ProductAnchor(), ("a", "b"))
    mean, log_variance = voxel(2.0, 4.0), voxel(0.5, 0.25).log()
    mu, lv = anchor.gaussian(mean, log_variance, flags([1, 1]), 0)
    # Precisions 1 (prior), 2, 4: mean (0 + 4 + 16)/7, variance 1/7.
    assert mu.item() == pytest.approx(20 / 7)
    assert lv.exp().item() == pytest.approx(1 / 7)
    mu, lv = anchor.gaussian(mean, log_variance, flags([1, 0]), 0)
    assert (mu.item(), lv.exp().item()) == (pytest.approx(4 / 3), pytest.approx(1 / 3))
    with pytest.raises(InputError, match="kl"):
        anchor(mean, flags([1, 1]), 0)
    assert not anchor.can_fill


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31), st.booleans())
@settings(max_examples=40)
def test_mixture_equals_a_loop_over_samples(modalities, samples, seed, shared):
    torch.manual_seed(seed)
    names = [f"m{i}" for i in range(modalities)]
    anchor = randomised(bound(MixtureAnchor(shared=shared), names, 3))
    f = torch.randn(samples, modalities, 2, 2, 1, 3)
    subset = torch.rand(samples, modalities) < 0.6
    hidden = torch.where(subset[:, :, None, None, None, None], f, torch.nan)
    actual = anchor(hidden, subset, 2)
    row = anchor.scores.detach().view(-1, modalities)[0 if shared else 2]
    for b in range(samples):
        chosen = subset[b].nonzero().flatten().tolist()
        expected = torch.zeros(2, 2, 1, 3)
        total = sum(math.exp(row[m]) for m in chosen)
        for m in chosen:
            expected += math.exp(row[m]) / total * f[b, m]
        assert torch.allclose(actual[b], expected, atol=1e-5)


ANCHORS = [
    MixtureAnchor(),
    MixtureAnchor(shared=True),
    MixtureAnchor([1, 2, 3, 4]),
    MixtureAnchor("uniform"),
    ModalityAnchor("t1"),
]


@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda a: f"{type(a).__name__}-{a.init_args}")
def test_nothing_leaks_from_hidden_slots_and_empty_rows_are_zero(anchor):
    torch.manual_seed(0)
    anchor = randomised(bound(anchor))
    subset = flags([1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0])
    f = torch.randn(3, 4, 2, 1, 2, 2)
    f[~subset] = torch.nan
    f.requires_grad_()
    weights = anchor.weights(subset, 1)
    assert torch.allclose(weights.sum(1), torch.tensor([1.0, 0.0, 1.0]))
    out = anchor(f, subset, 1)
    mean, log_variance = anchor.gaussian(f, torch.where(f.isnan(), f, f * 0), subset, 1)
    assert torch.equal(out[1], torch.zeros(2, 1, 2, 2)) and torch.equal(mean, out)
    assert torch.equal(log_variance[1], torch.zeros(2, 1, 2, 2))
    (out.sum() + mean.square().sum() + log_variance.sum()).backward()
    assert torch.isfinite(f.grad).all() and (f.grad[~subset] == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in anchor.parameters())


def test_product_leaks_nothing_from_hidden_slots():
    anchor = bound(ProductAnchor())
    subset = flags([1, 0, 1, 0], [0, 0, 0, 0])
    mean, log_variance = torch.randn(2, 2, 4, 2, 1, 1, 1).unbind(0)
    mean[~subset], log_variance[~subset] = torch.nan, torch.nan
    mean.requires_grad_(), log_variance.requires_grad_()
    mu, lv = anchor.gaussian(mean, log_variance, subset, 0)
    assert (mu[1] == 0).all() and (lv[1] == 0).all()
    (mu.square().sum() + lv.sum()).backward()
    for grad in (mean.grad, log_variance.grad):
        assert torch.isfinite(grad).all() and (grad[~subset] == 0).all()


@pytest.mark.parametrize("anchor", [MixtureAnchor(), MixtureAnchor(shared=True)])
def test_gradients_are_right(anchor):
    torch.manual_seed(0)
    anchor = randomised(bound(anchor, NAMES[:3], 2)).double()
    subset = flags([1, 1, 1], [1, 0, 1], [0, 1, 0])
    f = torch.randn(3, 3, 2, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    lv = torch.randn(3, 3, 2, 1, 1, 2, dtype=torch.float64, requires_grad=True)

    def through(scores, f, lv):
        anchor.scores.data, anchor._parameters["scores"] = scores.data, scores
        return anchor(f, subset, 1), *anchor.gaussian(f, lv, subset, 1)

    assert torch.autograd.gradcheck(through, (anchor.scores, f, lv))


def test_product_gradients_are_right():
    torch.manual_seed(0)
    f, lv = torch.randn(2, 2, 3, 1, 1, 1, 2, dtype=torch.float64).unbind(0)
    subset = flags([1, 1, 1], [1, 0, 1])
    anchor = bound(ProductAnchor(), NAMES[:3])
    assert torch.autograd.gradcheck(
        lambda a, b: anchor.gaussian(a, b, subset, 0), (f.requires_grad_(), lv.requires_grad_())
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("side_by_side", [True, False])
def test_a_cpu_sums_and_chooses_slots_as_masks_do(dtype, side_by_side):
    """No slot, one, several and all are shown; what is not holds NaN."""
    subset = flags([0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 1, 1])
    torch.manual_seed(0)
    raw = torch.randn(4, 3 * 2, 2, 3, 2, dtype=dtype)
    if side_by_side:
        raw = raw.contiguous(memory_format=torch.channels_last_3d)
    raw = raw.view(4, 3, 2, 2, 3, 2)
    raw[~subset] = torch.nan
    leaves = raw, torch.randn(4, 1, 2, 2, 3, 2, dtype=dtype), torch.rand(4, 3, dtype=dtype)

    def values(on_gpu):
        features, other, weights = (leaf.clone().requires_grad_() for leaf in leaves)
        with as_on_gpu(on_gpu):
            total = weighted_sum(features, weights, subset)
            chosen, hidden = choose_slots(subset, features, other), hide(features, subset, 7.0)
            (total.square().sum() + chosen.square().sum() + hidden.square().sum()).backward()
        return total, chosen, hidden, features.grad, other.grad, weights.grad

    for lean, masked in zip(values(False), values(True), strict=True):
        assert lean.stride() == masked.stride()
        torch.testing.assert_close(lean, masked)


def test_detached_weights_leave_the_features_gradient():
    anchor = randomised(bound(MixtureAnchor()))
    f = torch.randn(1, 4, 1, 1, 1, 2, requires_grad=True)
    anchor(f, flags([1, 1, 1, 1]), 0, detach_weights=True).sum().backward()
    assert anchor.scores.grad is None
    assert torch.allclose(f.grad[0, :, 0, 0, 0, 0], anchor.weights(flags([1, 1, 1, 1]), 0)[0])


def test_parameters_are_created_once_and_reach_every_level():
    anchor = bound(MixtureAnchor(), NAMES, 3)
    scores = anchor.scores
    anchor.bind(list(NAMES), 3)
    assert anchor.scores is scores and scores.shape == (12,) and anchor.learned
    assert bound(MixtureAnchor(shared=True), NAMES, 3).scores.shape == (4,)
    assert not list(bound(MixtureAnchor("uniform")).parameters())
    assert not bound(MixtureAnchor("uniform")).state_dict()
    with pytest.raises(InputError, match="already belongs"):
        anchor.bind(NAMES, 2)
    with pytest.raises(InputError, match="already belongs"):
        anchor.bind(NAMES[:3], 3)


@pytest.mark.parametrize("weights", ["equal", [0, 0], [1, -1], [1, math.nan], []])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(InputError, match="weights"):
        MixtureAnchor(weights)


def test_names_and_counts_are_checked_when_bound():
    with pytest.raises(InputError, match="give one each"):
        bound(MixtureAnchor([1, 2, 3]))
    with pytest.raises(InputError, match="'pet' is not among"):
        bound(ModalityAnchor("pet"))


@pytest.mark.parametrize("anchor", [*ANCHORS, NormalAnchor(), ProductAnchor()])
def test_anchors_can_be_described(anchor):
    again = build(describe(anchor))
    assert type(again) is type(anchor) and again.init_args == anchor.init_args


def test_half_precision_features_keep_their_dtype():
    for anchor in (MixtureAnchor(), MixtureAnchor("uniform"), NormalAnchor()):
        f = torch.randn(2, 4, 1, 1, 1, 1, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert bound(anchor)(f, flags([1, 1, 0, 1], [0, 1, 0, 0]), 0).dtype == torch.bfloat16
            assert bound(anchor)(f.float(), flags([1, 1, 0, 1])[[0, 0]], 0).dtype == torch.float32


def test_weighted_anchors_share_one_interface():
    assert issubclass(MixtureAnchor, WeightedAnchor) and issubclass(ModalityAnchor, WeightedAnchor)
