"""Segmentation losses: the interface of a criterion, and Dice + cross-entropy."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmixseg.describe import NOT_NEGATIVE, Described, Ranges
from pmixseg.losses.ranks import SharedSums
from pmixseg.types import Batch, Label, Scalar, SegOutput, full_precision

DEEP_SUPERVISION = re.compile(r"ds([1-9]\d*)")
"""Names of the auxiliary logits that deep supervision reads: ``ds1`` is the finest of them."""
SMOOTH = 1e-5
"""MONAI's addend above and below the fraction of the Dice term."""


class Criterion(nn.Module, Described, ABC):
    """Compute the segmentation loss of a backbone.

    A backbone with auxiliary outputs of its own subclasses this and reads them by name from
    ``output.extras``, which is empty in eval mode.

    Attributes:
        couples_samples: the loss of a batch is not the mean over its samples, and is not summed
            over processes (:class:`~pmixseg.losses.ranks.SharedSums`), so two processes do not
            reproduce one process on the joined batch. A fit of several processes says so.
    """

    __call__: Callable[..., Scalar]  # of forward, with its type
    couples_samples: bool = False

    @abstractmethod
    def forward(self, output: SegOutput, batch: Batch, epoch: int | Tensor) -> Scalar:
        """Return the loss of one batch.

        Args:
            output: softmax logits ``[B, C, D, H, W]`` and auxiliary outputs.
            batch: ``label`` is ``[B, D, H, W]`` with class indices.
            epoch: 0-based, for losses that change as training goes on. A compiled step gives a
                tensor: multiply by a comparison instead of branching on it.
        """


def area_fractions(label: Label, num_classes: int, shape: Sequence[int]) -> Tensor:
    """Return the share of each class in every voxel of a coarser grid.

    A class that is thinner than a coarse voxel keeps its mass, where nearest-neighbour labels
    lose it (they lose the necrotic core in a quarter of 80³ patches at stride 8).

    Args:
        label: class indices ``[B, D, H, W]``.
        num_classes: number of classes C.
        shape: the coarse grid, each side a divisor of the label's.

    Returns:
        float32 ``[B, C, *shape]``, summing to 1 over classes.

    Raises:
        ValueError: a side of the label is no multiple of the coarse one.

    Example:
        >>> label = torch.tensor([0, 0, 1, 0]).reshape(1, 4, 1, 1)
        >>> area_fractions(label, 2, (2, 1, 1)).flatten().tolist()
        [1.0, 0.5, 0.0, 0.5]
    """
    if any(full % coarse for full, coarse in zip(label.shape[1:], shape, strict=True)):
        raise ValueError(
            f"a label of shape {tuple(label.shape[1:])} cannot be averaged onto the grid "
            f"{tuple(shape)}; its sides must be multiples of the grid's."
        )
    stride = [full // coarse for full, coarse in zip(label.shape[1:], shape, strict=True)]
    # One class at a time: a full-resolution one-hot of all classes would be the largest tensor of
    # the whole step.
    pooled = [F.avg_pool3d((label == c).float(), stride) for c in range(num_classes)]
    return torch.stack(pooled, 1)


def enlarged(probabilities: Tensor, label: Label) -> Tensor:
    """Draw probabilities up to the grid of a label, trilinearly, as RFNet and PASSION do."""
    size = label.shape[1:]
    if probabilities.shape[2:] == size:
        return probabilities
    return F.interpolate(probabilities, list(size), mode="trilinear", align_corners=True)


class DiceCE(Criterion):
    r"""Compute soft Dice plus cross-entropy (MONAI's ``DiceCELoss``), with deep supervision.

    .. math:: L = \frac{\sum_{k \ge 0} 2^{-k} L_k}{\sum_{k \ge 0} 2^{-k}}, \qquad
              L_k = \lambda_\mathrm{dice} L_\mathrm{dice} + \lambda_\mathrm{ce} L_\mathrm{ce}

    :math:`L_0` is the loss of ``logits``; :math:`L_k` that of ``extras["ds<k>"]``, if there are
    any, against :func:`area_fractions` at their own resolution. Dividing by the weights keeps the
    scale of the loss, and with it the meaning of every other term's weight, the same with and
    without deep supervision.

    Args:
        include_background: count class 0 in the Dice term.
        dice_weight: :math:`\lambda_\mathrm{dice}`.
        ce_weight: :math:`\lambda_\mathrm{ce}`.
        batch_dice: sum intersections over the batch, of all processes, before dividing (nnU-Net,
            MONAI's ``batch``).
        deep_supervision_decay: weight of ``ds<k>`` is this to the power k.

    Source: Isensee et al., nnU-Net (Nature Methods 2021), for the sum and the weights.
    """

    ranges = Ranges(
        dice_weight=NOT_NEGATIVE, ce_weight=NOT_NEGATIVE, deep_supervision_decay=NOT_NEGATIVE
    )

    def __init__(
        self,
        include_background: bool = True,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
        batch_dice: bool = False,
        deep_supervision_decay: float = 0.5,
    ) -> None:
        super().__init__()
        self.batch_dice = batch_dice
        self.dice_weight, self.ce_weight = dice_weight, ce_weight
        self.first = 0 if include_background else 1
        self.decay = deep_supervision_decay

    def forward(self, output: SegOutput, batch: Batch, epoch: int | Tensor) -> Scalar:
        """Return the weighted mean of the losses of ``logits`` and of every ``ds<k>``."""
        label, sums = batch["label"], SharedSums()
        total = self._loss(output.logits, label, sums)
        weights = 1.0
        for name, logits in output.extras.items():
            if match := DEEP_SUPERVISION.fullmatch(name):
                weight = self.decay ** int(match[1])
                total = total + weight * self._loss(logits, label, sums)
                weights += weight
        return sums.settle(total / weights)

    def _loss(self, logits: Tensor, label: Label, sums: SharedSums) -> Tensor:
        """Compute MONAI's formula, without asking for a tensor's value as MONAI's class does."""
        # Sums over a million voxels do not fit half precision.
        shares = full_precision(logits).log_softmax(1)
        if logits.shape[2:] == label.shape[1:]:
            classes = torch.arange(logits.shape[1], device=label.device)
            target = (label[:, None] == classes[:, None, None, None]).to(shares.dtype)
        else:
            target = area_fractions(label, logits.shape[1], logits.shape[2:]).to(shares.dtype)
        entropy = -(target * shares).sum(1).mean()
        # Soft Dice of each class, per sample or over the batch of all processes.
        axes = (0, 2, 3, 4) if self.batch_dice else (2, 3, 4)
        probabilities, target = shares.exp()[:, self.first :], target[:, self.first :]
        overlap = (probabilities * target).sum(axes)
        total = probabilities.sum(axes) + target.sum(axes)
        if self.batch_dice:
            overlap, total = sums.add(overlap), sums.add(total)
        dice = 1 - ((2 * overlap + SMOOTH) / (total + SMOOTH)).mean()
        loss: Tensor = self.dice_weight * dice + self.ce_weight * entropy
        return loss
