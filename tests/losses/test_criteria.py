"""Segmentation criteria: golden numbers, the published losses, and the form that a GPU computes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.losses import DiceCELoss
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from pmixseg.backbones import UHVED, RFNet
from pmixseg.describe import build, describe
from pmixseg.errors import InputError
from pmixseg.execution import as_on_gpu
from pmixseg.gaussians import gaussian_kl
from pmixseg.losses import DiceCE
from pmixseg.losses.rfnet import RFNetCriterion, stacked_ce_dice, weighted_ce_dice
from pmixseg.losses.segmentation import area_fractions
from pmixseg.losses.uhved import UHVEDCriterion
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
    actual = DiceCE()(output(logits), batch(label), 0)
    assert actual.item() == pytest.approx(dice + ce, abs=2e-5)
    actual = DiceCE(include_background=False, ce_weight=0.0)(output(logits), batch(label), 0)
    assert actual.item() == pytest.approx(1 - 1.2 / 1.8, abs=2e-5)


def test_deep_supervision_weights_are_powers_of_one_half_and_normalised():
    logits, label = two_voxels(0.2, 0.6)
    coarse = torch.zeros(1, 2, 1, 1, 1)  # p = 1/2 against the fraction 1/2
    criterion = DiceCE(dice_weight=0.0)
    fine = -(math.log(0.8) + math.log(0.6)) / 2
    actual = criterion(
        output(logits, ds1=coarse, ds2=coarse, other=coarse * torch.nan), batch(label), 0
    )
    expected = (fine + 0.5 * math.log(2) + 0.25 * math.log(2)) / 1.75
    assert actual.item() == pytest.approx(expected, rel=1e-6)


def test_soft_labels_reach_the_dice_term():
    coarse = torch.zeros(1, 2, 1, 1, 1)
    logits, label = two_voxels(0.2, 0.6)
    criterion = DiceCE(ce_weight=0.0, deep_supervision_decay=1.0)
    fine = 1 - (1.2 / 1.8 + 1.6 / 2.2) / 2
    actual = criterion(output(logits, ds1=coarse), batch(label), 0)
    # 2·½·½ / (½ + ½) = ½ for both classes.
    assert actual.item() == pytest.approx((fine + 0.5) / 2, abs=2e-5)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_dice_and_cross_entropy_are_monais(background, together):
    torch.manual_seed(0)
    logits, coarse = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64), torch.randn(2, 3, 2, 2, 2)
    label = torch.randint(0, 3, (2, 4, 4, 4))
    options = {"include_background": background, "softmax": True, "batch": together}
    options |= {"lambda_dice": 0.7, "lambda_ce": 1.3}
    ours = DiceCE(background, dice_weight=0.7, ce_weight=1.3, batch_dice=together)
    expected = DiceCELoss(to_onehot_y=True, **options)(logits, label[:, None])
    torch.testing.assert_close(ours(output(logits), batch(label), 0), expected)
    # Coarser logits, against the share of each class.
    expected = DiceCELoss(**options)(coarse, area_fractions(label, 3, (2, 2, 2)))
    torch.testing.assert_close(ours(output(coarse), batch(label), 0), expected)


def test_batch_dice_joins_samples():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, 4)
    label = torch.randint(0, 3, (2, 4, 4, 4))
    apart, joined = DiceCE(ce_weight=0), DiceCE(ce_weight=0, batch_dice=True)
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
    actual = area_fractions(label, classes, shape)
    onehot = torch.nn.functional.one_hot(label, classes).float()
    expected = onehot.reshape(2, shape[0], stride, shape[1], stride, shape[2], stride, classes)
    assert torch.allclose(actual, expected.mean((2, 4, 6)).movedim(-1, 1), atol=1e-6)


def test_a_grid_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiples"):
        area_fractions(torch.zeros(1, 5, 4, 4, dtype=torch.int64), 2, (2, 2, 2))


def test_negative_weights_are_refused_and_arguments_survive_a_description():
    with pytest.raises(InputError, match="dice_weight"):
        DiceCE(dice_weight=-1)
    again = build(describe(DiceCE(batch_dice=True, ce_weight=0.5)))
    assert again.init_args["ce_weight"] == 0.5 and again.batch_dice


def reference(probabilities, label):
    """The sums of the published loss, voxel by voxel."""
    samples, classes = probabilities.shape[:2]
    p, y = probabilities.double().flatten(2), label.flatten(1)
    voxels = y.shape[1]
    entropy = 0.0
    for b in range(samples):
        share = [(y[b] == c).double().mean().item() for c in range(classes)]
        for v in range(voxels):
            c = int(y[b, v])
            entropy -= (1 - share[c]) * math.log(max(float(p[b, c, v]), 0.005))
    dice = 0.0
    for c in range(classes):
        hit = y == c
        dice += 2 * p[:, c][hit].sum().item() / (p[:, c].sum().item() + hit.sum().item() + 1e-7)
    return entropy / (samples * voxels) + 1 - dice / classes


def draw(*shape):
    return torch.randn(2, 3, *shape)


def test_weighted_ce_dice_is_as_computed_by_hand():
    # One voxel of each class, p of the right class 0.8 and 0.001 (clamped to 0.005):
    # CE = -(0.5 ln 0.8 + 0.5 ln 0.005) / 2; Dice 1.6 / 2.799 and 0.002 / 1.201.
    p = torch.tensor([[0.8, 0.999], [0.2, 0.001]]).reshape(1, 2, 2, 1, 1)
    label = torch.tensor([0, 1]).reshape(1, 2, 1, 1)
    entropy = -(0.5 * math.log(0.8) + 0.5 * math.log(0.005)) / 2
    dice = (1.6 / 2.799 + 0.002 / 1.201) / 2
    assert weighted_ce_dice(p, label).item() == pytest.approx(entropy + 1 - dice, rel=1e-6)


def test_equals_the_reference_with_a_class_that_is_absent():
    torch.manual_seed(0)
    p = (5 * draw(3, 2, 4)).softmax(1)
    label = torch.randint(0, 2, (2, 3, 2, 4))
    assert weighted_ce_dice(p, label).item() == pytest.approx(reference(p, label), rel=1e-5)


def test_sum_of_all_outputs_and_the_late_start_of_the_fused_one():
    torch.manual_seed(0)
    label = torch.randint(0, 3, (2, 4, 4, 4))
    logits, fine, coarse, separate = draw(4, 4, 4), draw(4, 4, 4), draw(2, 2, 2), None
    separate = torch.randn(2, 2, 3, 4, 4, 4)
    slots = torch.tensor([[True, True], [True, False]])
    out = output(logits, ds1=fine, ds2=coarse, separate=separate, separate_slots=slots, other=fine)
    batch = {"label": label}
    up = F.interpolate(coarse.softmax(1), (4, 4, 4), mode="trilinear", align_corners=True)
    expected = (
        reference(fine.softmax(1), label)
        + reference(up, label)
        + reference(separate[:, 0].softmax(1), label)
        + 0.5 * reference(separate[:1, 1].softmax(1), label[:1])
    )
    criterion = RFNetCriterion(fusion_start_epoch=2)
    assert criterion(out, batch, 1).item() == pytest.approx(expected, rel=1e-5)
    fused = reference(logits.softmax(1), label)
    assert criterion(out, batch, 2).item() == pytest.approx(expected + fused, rel=1e-5)
    assert criterion(output(logits), batch, 0).item() == pytest.approx(fused, rel=1e-5)


def test_slots_that_were_not_decoded_have_no_influence():
    label = torch.randint(0, 3, (2, 4, 4, 4))
    separate = torch.randn(2, 2, 3, 4, 4, 4)
    slots = torch.tensor([[True, False], [False, False]])
    values = []
    for noise in (0.0, torch.nan):
        separate = torch.where(slots[:, :, None, None, None, None], separate, noise)
        out = output(draw(4, 4, 4).zero_(), separate=separate, separate_slots=slots)
        values.append(RFNetCriterion()(out, {"label": label}, 0))
    assert values[0] == values[1]


def test_every_parameter_of_rfnet_learns_and_bf16_gives_float32():
    torch.manual_seed(0)
    net = RFNet(("a", "b"), num_classes=3, width=4).train()
    image, present = torch.randn(2, 2, 24, 24, 24), torch.tensor([[True, True], [True, False]])
    batch = {"label": torch.randint(0, 3, (2, 24, 24, 24))}
    with torch.autocast("cpu", torch.bfloat16):
        loss = RFNetCriterion()(net(image, present), batch, 0)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_negative_start_is_refused():
    with pytest.raises(InputError, match="0 or more"):
        RFNetCriterion(-1)


def test_kl_is_that_of_torch():
    torch.manual_seed(0)
    a, b = ((torch.randn(2, 3, 2, 2, 2), torch.randn(2, 3, 2, 2, 2)) for _ in range(2))
    expected = kl_divergence(*(Normal(mean, (log / 2).exp()) for mean, log in (a, b)))
    torch.testing.assert_close(gaussian_kl(*a, *b), expected)


def train_step(present, **weights):
    torch.manual_seed(0)
    net = UHVED(width=4).train()
    image = torch.randn(1, 4, 16, 16, 16)
    everything = torch.ones(1, 4, dtype=torch.bool)
    output = net.decode(net.encode(image, everything).restrict(present))
    batch = {"image": image, "label": torch.randint(0, 4, (1, 16, 16, 16)), "present": present}
    return output, batch, UHVEDCriterion(**weights)(output, batch, 0)


def test_the_loss_is_the_sum_of_its_parts():
    present = torch.tensor([[True, False, False, True]])
    output, batch, loss = train_step(present)
    rebuilt = (output.extras["reconstruction"] - batch["image"]).square().mean()
    expected = DiceCE()(output, batch, 0) + 0.1 * (rebuilt + output.extras["divergence"].mean())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    # Of what was not encoded there is no error, and the mean is over the other two.
    output.extras["reconstruction_slots"] = present
    errors = (output.extras["reconstruction"] - batch["image"])[present].square().mean()
    expected = DiceCE()(output, batch, 0) + 0.1 * errors
    torch.testing.assert_close(UHVEDCriterion(kl_weight=0.0)(output, batch, 0), expected)


def test_shown_everything_only_the_prior_is_left():
    everything = torch.ones(1, 4, dtype=torch.bool)
    few = torch.tensor([[False, False, True, False]])
    all_shown = train_step(everything)[0]
    parts = []
    for level in range(4):
        precision = 1 + (-all_shown.latents.log_variance[level]).exp().sum(1)
        mean = ((-all_shown.latents.log_variance[level]).exp()
                * all_shown.latents.features[level]).sum(1) / precision  # fmt: skip
        prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
        parts.append(kl_divergence(Normal(mean, precision.rsqrt()), prior).mean())
    torch.testing.assert_close(all_shown.extras["divergence"][0], torch.stack(parts).sum())
    assert train_step(few)[0].extras["divergence"] > 0


def test_a_student_of_some_modalities_is_refused():
    output, batch, _ = train_step(torch.ones(1, 4, dtype=torch.bool))
    batch["image"] = batch["image"][:, :2]
    with pytest.raises(InputError, match="reconstruct: false"):
        UHVEDCriterion()(output, batch, 0)


PRESENT = torch.tensor([[True, False, True, True], [True, False, False, False]])


@pytest.mark.parametrize(
    ("separate", "criterion", "epoch"),
    [
        ("encoded", RFNetCriterion(), 0),
        ("encoded", RFNetCriterion(fusion_start_epoch=3), 2),
        ("none", RFNetCriterion(), 0),
    ],
)
def test_static_and_lean_criteria_agree(separate, criterion, epoch):
    torch.manual_seed(0)
    net = RFNet(width=4, separate=separate).double().train()
    batch = {
        "image": torch.randn(2, 4, 16, 16, 16, dtype=torch.float64),
        "label": torch.randint(0, 4, (2, 16, 16, 16)),
    }
    output = net(batch["image"], PRESENT)
    logits = output.logits
    lean = criterion(output, batch, epoch)
    with as_on_gpu():
        static = criterion(output, batch, epoch)
    torch.testing.assert_close(static, lean)
    ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True) for x in (static, lean))
    torch.testing.assert_close(ours, theirs)


def test_stacked_losses_are_those_of_the_samples_that_count():
    torch.manual_seed(0)
    label = torch.randint(0, 3, (3, 4, 4, 4))
    probabilities = torch.randn(2, 3, 3, 4, 4, 4, dtype=torch.float64).softmax(2)
    rows = torch.tensor([[True, True, True], [False, True, False]])
    losses = stacked_ce_dice(probabilities, label, rows)
    expected = [weighted_ce_dice(probabilities[0], label)]
    expected.append(weighted_ce_dice(probabilities[1, 1:2], label[1:2]) / 3)
    torch.testing.assert_close(losses, torch.stack(expected))
