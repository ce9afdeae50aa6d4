import math

import pytest
import torch
from torch.nn import functional as F

from pmixseg.backbones import RFNet
from pmixseg.errors import InputError
from pmixseg.losses.rfnet import RFNetCriterion, weighted_ce_dice
from pmixseg.types import Latents, SegOutput


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


def output(logits, **extras):
    return SegOutput(logits, Latents([], (), []), extras)


def draw(*shape):
    return torch.randn(2, 3, *shape)


def test_golden_value():
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
    wanted = (
        reference(fine.softmax(1), label)
        + reference(up, label)
        + reference(separate[:, 0].softmax(1), label)
        + 0.5 * reference(separate[:1, 1].softmax(1), label[:1])
    )
    criterion = RFNetCriterion(fusion_start_epoch=2)
    assert criterion(out, batch, 1).item() == pytest.approx(wanted, rel=1e-5)
    fused = reference(logits.softmax(1), label)
    assert criterion(out, batch, 2).item() == pytest.approx(wanted + fused, rel=1e-5)
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
