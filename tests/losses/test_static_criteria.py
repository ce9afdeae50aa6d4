"""On a GPU a criterion computes in another form; the loss and its gradient are the same."""

import pytest
import torch

from pmixseg.backbones import UHVED, MultiEncoderUNet, RFNet, ShaSpec
from pmixseg.execution import as_on_gpu
from pmixseg.losses import DiceCE
from pmixseg.losses.rfnet import RFNetCriterion, stacked_ce_dice, weighted_ce_dice
from pmixseg.losses.shaspec import ShaSpecCriterion
from pmixseg.losses.uhved import UHVEDCriterion

PRESENT = torch.tensor([[True, False, True, True], [True, False, False, False]])


@pytest.mark.parametrize(
    ("make", "criterion", "epoch"),
    [
        (lambda: RFNet(width=4), RFNetCriterion(), 0),
        (lambda: RFNet(width=4), RFNetCriterion(fusion_start_epoch=3), 2),
        (lambda: RFNet(width=4, separate="none"), RFNetCriterion(), 0),
        (lambda: MultiEncoderUNet(width=4, levels=3, deep_supervision=True), DiceCE(), 0),
        (lambda: MultiEncoderUNet(width=4, levels=2), DiceCE(False, 0.3, 2.0, True), 0),
        (lambda: UHVED(width=4), UHVEDCriterion(), 0),
        (lambda: ShaSpec(width=4, levels=2), ShaSpecCriterion(), 0),
    ],
    ids=["rfnet", "rfnet-early", "rfnet-none", "deep", "batch-dice", "uhved", "shaspec"],
)
def test_static_and_lean_criteria_agree(make, criterion, epoch):
    torch.manual_seed(0)
    net = make().double().train()
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
    found = stacked_ce_dice(probabilities, label, rows)
    wanted = [weighted_ce_dice(probabilities[0], label)]
    wanted.append(weighted_ce_dice(probabilities[1, 1:2], label[1:2]))
    torch.testing.assert_close(found, torch.stack(wanted))
