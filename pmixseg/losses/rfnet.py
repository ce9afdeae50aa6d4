"""The loss that RFNet and mmFormer are trained with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pmixseg.describe import NOT_NEGATIVE, Ranges
from pmixseg.execution import runs_static
from pmixseg.losses.ranks import SharedSums, world_size
from pmixseg.losses.segmentation import DEEP_SUPERVISION, Criterion, enlarged
from pmixseg.types import Batch, Label, Scalar, SegOutput, full_precision

LEAST_PROBABILITY = 0.005
"""Probabilities are clamped here before the logarithm; below it they get no gradient."""
EPSILON = 1e-7
"""Keeps the Dice of an absent class finite."""


def weighted_ce_dice(probabilities: Tensor, label: Label) -> Scalar:
    r"""Compute cross-entropy with weights from the patch, plus soft Dice loss over all classes.

    .. math::
        L = -\frac{1}{BV}\sum_{b,v} (1 - f_{b,y}) \log\max(p_{b,y,v}, 0.005)
            + 1 - \frac{1}{C}\sum_c \frac{2\sum_{b,v} p_{b,c,v} [y_{b,v} = c]}
                                         {\sum_{b,v} p_{b,c,v} + \sum_{b,v} [y_{b,v} = c] + 10^{-7}}

    where y is the label of voxel (b, v) and f its class's share of the voxels of sample b. The Dice
    sums run over the batch. Probabilities are float32.
    """
    classes = probabilities.shape[1]
    of_label = probabilities.gather(1, label[:, None])[:, 0]
    hits = [(label == c).to(probabilities.dtype) for c in range(classes)]
    share = torch.stack([hit.flatten(1).mean(1) for hit in hits], 1)
    weight = (1 - share).gather(1, label.flatten(1)).view_as(of_label)
    entropy = -(weight * of_label.clamp(min=LEAST_PROBABILITY).log()).mean()
    overlap = torch.stack([(of_label * hit).sum() for hit in hits])
    total = probabilities.sum((0, 2, 3, 4)) + torch.stack([hit.sum() for hit in hits])
    return entropy + 1 - (2 * overlap / (total + EPSILON)).mean()


class RFNetCriterion(Criterion):
    """Sum of :func:`weighted_ce_dice` over the fused, the separate and the auxiliary outputs.

    ``L = [epoch ≥ fusion_start_epoch]·L(logits) + Σ_m L(separate_m) + Σ_k L(ds_k)``, where
    ``ds_k`` (RFNet's region maps, mmFormer's deep supervision) are upsampled as probabilities to
    the label's grid. A modality that only some samples have counts by their share of the batch. The
    sums of the Dice term run over the batches of all processes.

    Args:
        fusion_start_epoch: before it, the fused output's loss is multiplied by 0, so that encoders
            and region maps come first (20 of 300 in RFNet's script; 0 in mmFormer's).

    Source: Ding et al., RFNet (ICCV 2021), section 3.4 and published code.
    """

    ranges = Ranges(fusion_start_epoch=NOT_NEGATIVE)

    def __init__(self, fusion_start_epoch: int = 0) -> None:
        super().__init__()
        self.fusion_start_epoch = fusion_start_epoch

    def forward(self, output: SegOutput, batch: Batch, epoch: int | Tensor) -> Scalar:
        """Sum over all outputs; of the fused one alone in eval mode, which has no others."""
        label, sums = batch["label"], SharedSums()
        several = world_size() > 1
        if not output.extras and not several:
            return weighted_ce_dice(_probabilities(output.logits), label)
        # The fused output counts from its first epoch on, region maps and deep outputs always.
        fused: float | Tensor = (
            (epoch >= self.fusion_start_epoch).float()
            if isinstance(epoch, Tensor)
            else float(epoch >= self.fusion_start_epoch)
        )
        single = [
            enlarged(_probabilities(logits), label)
            for name, logits in output.extras.items()
            if DEEP_SUPERVISION.fullmatch(name)
        ]
        if not output.extras:
            fused = 1.0
        if several or runs_static(label):
            return sums.settle(_static_loss(output, single, label, fused, sums))
        total = fused * weighted_ce_dice(_probabilities(output.logits), label)
        for probabilities in single:
            total = total + weighted_ce_dice(probabilities, label)
        if "separate" in output.extras:
            total = total + _separate_loss(output, label)
        return total


def _static_loss(
    output: SegOutput,
    single: Sequence[Tensor],
    label: Label,
    fused: float | Tensor,
    sums: SharedSums,
) -> Tensor:
    """Compute all outputs' losses in one go, so that all processes share the same sums."""
    outputs = [_probabilities(output.logits), *single]
    count = len(outputs)
    rows = torch.ones(count, len(label), dtype=torch.bool, device=label.device)
    if "separate" in output.extras:
        outputs += _probabilities(output.extras["separate"].transpose(1, 2)).unbind(2)
        rows = torch.cat([rows, output.extras["separate_slots"].t()])
    losses = stacked_ce_dice(torch.stack(outputs), label, rows, sums)
    return losses[0] * fused + losses[1:].sum()


def stacked_ce_dice(
    probabilities: Tensor, label: Label, rows: Tensor, sums: SharedSums | None = None
) -> Tensor:
    """Compute :func:`weighted_ce_dice` of each output, times the share of the samples that have it.

    Probabilities are ``[N, B, C, D, H, W]``, ``rows`` ``[N, B]``; what other rows hold is not read,
    but must be finite. ``sums`` take the Dice over the samples of all processes; whoever gave them
    settles the loss. An output without samples gives 0.
    """
    classes = torch.arange(probabilities.shape[2], device=label.device)
    flat, p = label.flatten(1), probabilities.flatten(3)
    hits = (flat[:, None] == classes[:, None]).to(p.dtype)
    of_label = (p * hits).sum(2)
    volumes = hits.sum(2)
    weight = ((1 - volumes / flat.shape[1])[:, :, None] * hits).sum(1)
    shown = rows.to(p.dtype)
    entropy = -(weight * of_label.clamp(min=LEAST_PROBABILITY).log()).mean(2)
    entropy = (entropy * shown).mean(1)
    # [N, B, C]: sums over voxels, then over the samples that count.
    overlap = (of_label[:, :, None] * hits).sum(3)
    total = p.sum(3) + volumes
    overlap, total = ((shown[:, :, None] * part).sum(1) for part in (overlap, total))
    share = shown.mean(1)
    if sums is not None:
        overlap, total = sums.add(overlap), sums.add(total)
        share = sums.add(share) / world_size()
    return entropy + share * (1 - (2 * overlap / (total + EPSILON)).mean(1))


def _separate_loss(output: SegOutput, label: Label) -> Tensor:
    logits, slots = output.extras["separate"], output.extras["separate_slots"]
    total = logits.new_zeros((), dtype=torch.float32)
    for m, rows in enumerate(slots.unbind(1)):
        share = rows.float().mean()
        if share > 0:
            probabilities = _probabilities(logits[rows, m])
            total = total + share * weighted_ce_dice(probabilities, label[rows])
    return total


def _probabilities(logits: Tensor) -> Tensor:
    # Sums over a million voxels do not fit half precision.
    return full_precision(logits).softmax(1)
