"""The loss that ShaSpec is trained with."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from pmixseg.describe import NOT_NEGATIVE, Ranges
from pmixseg.losses.segmentation import Criterion, DiceCE
from pmixseg.types import Batch, Scalar, SegOutput, full_precision


class ShaSpecCriterion(Criterion):
    r"""Segmentation, equal shared features, and specific features that tell their modality.

    .. math:: L = L_\mathrm{Dice} + L_\mathrm{CE}
              + \lambda_s \operatorname{mean}_{(m, n)} \operatorname{mean} |s_m - s_n|
              + \lambda_c \operatorname{mean}_m \mathrm{CE}(\mathrm{classifier}(p_m), m)

    over neighbours (m, n) in the ring of the modalities that a sample was encoded with, then the
    mean over samples: the published code has one sample in a batch. A sample with one modality has
    no neighbours, and 0. Outputs without these extras (eval mode) are scored on the segmentation
    alone.

    Args:
        shared_weight: λ_s, 0.1 in the published code.
        specific_weight: λ_c, 0.02 there.

    Source: Wang et al., ShaSpec (CVPR 2023); billhhh/ShaSpec, train_SS.py. There the segmentation
    loss is Dice + binary cross-entropy on the three regions; here it is on the labels.
    """

    ranges = Ranges(shared_weight=NOT_NEGATIVE, specific_weight=NOT_NEGATIVE)

    def __init__(self, shared_weight: float = 0.1, specific_weight: float = 0.02) -> None:
        super().__init__()
        self.shared_weight, self.specific_weight = shared_weight, specific_weight
        self.segmentation = DiceCE()

    def forward(self, output: SegOutput, batch: Batch, epoch: int | Tensor) -> Scalar:
        """Return the segmentation loss and ShaSpec's two auxiliary losses."""
        total = self.segmentation(output, batch, epoch)
        if "shared" not in output.extras:
            return total
        encoded = output.extras["encoded"]
        logits = full_precision(output.extras["modality"])
        truth = torch.arange(encoded.shape[1], device=encoded.device).expand_as(encoded)
        entropy = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none")
        entropy = torch.where(encoded, entropy.view_as(truth), 0.0).sum(1)
        entropy = (entropy / encoded.sum(1).clamp(min=1)).mean()
        shared = _ring(full_precision(output.extras["shared"]), encoded)
        return total + self.shared_weight * shared + self.specific_weight * entropy


def _ring(shared: Tensor, encoded: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbours, averaged over samples."""
    slots = encoded.shape[1]
    total = shared.new_zeros(len(shared))
    for m, n in combinations(range(slots), 2):
        difference = (shared[:, m] - shared[:, n]).abs().flatten(1).mean(1)
        # Neighbours have no other between them, one way round the ring or the other.
        for arc in (range(m + 1, n), (*range(n + 1, slots), *range(m))):
            neighbours = encoded[:, m] & encoded[:, n]
            for between in arc:
                neighbours = neighbours & ~encoded[:, between]
            total = total + difference * neighbours
    return (total / encoded.sum(1).clamp(min=1)).mean()
