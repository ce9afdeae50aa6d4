"""Distillation losses that compare class probabilities."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch.nn import functional as F

from pmixseg.describe import NOT_NEGATIVE, POSITIVE, Ranges
from pmixseg.losses.distillation.loss import DistillationLoss
from pmixseg.losses.ranks import sum_over_ranks
from pmixseg.types import Batch, Scalar, SegOutput, full_precision


class LogitKL(DistillationLoss):
    r"""Compute the KL divergence between the teacher's and the student's softened outputs.

    .. math:: L = T^2 \operatorname{mean}_v \sum_c p_c \log \frac{p_c}{q_c}, \qquad
              p = \operatorname{softmax}(t / T),\; q = \operatorname{softmax}(s / T)

    summed over classes, mean over voxels and samples.

    Args:
        weight: λ.
        temperature: T.
        squared: multiply by T², which keeps the gradient's size independent of T.

    Preset ``protokd``: weight 2.5, T = 10, no T² (their 10 is a mean over the 4 classes as well).
    Preset ``kdnet``: generalised distillation λ·L_seg + (1-λ)·KL; its constants are from memory
    only.

    Source: Hinton et al. (arXiv 1503.02531).
    """

    ranges = Ranges(temperature=POSITIVE)

    def __init__(self, weight: float = 1.0, temperature: float = 4.0, squared: bool = True) -> None:
        super().__init__(weight)
        self.temperature, self.squared = temperature, squared

    def compare(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Scalar:
        """Return the loss between the student's and the teacher's outputs."""
        q = F.log_softmax(full_precision(student.logits) / self.temperature, 1)
        p = F.log_softmax(full_precision(teacher.logits.detach()) / self.temperature, 1)
        divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(1).mean()
        return divergence * (self.temperature**2 if self.squared else 1.0)


class WeightedSoftCE(DistillationLoss):
    r"""Teach soft labels where the teacher is right and better than the student.

    .. math:: L = \frac{\sum_v \omega_v \bigl(- \sum_c p_c \log q_c\bigr)}{\sum_v \omega_v}, \qquad
              \omega_v = \operatorname{sg}\bigl[\max(0, CE_s - CE_t) \cdot [t^* = y]\bigr]

    with p, q as in :class:`LogitKL` and CE the cross-entropy with the label at temperature 1; the
    sums run over the voxels of the batch, and of all processes. It is a mean over what the weights
    select, not over all voxels, so its size does not depend on how far ahead the teacher is. 0
    where it is nowhere.

    Args:
        weight: λ.
        temperature: T of the soft cross-entropy.

    Preset ``pmkl``: weight 0.5, T = 10.

    Source: Chen et al., PMKL (IEEE TMI 2022).
    """

    ranges = Ranges(temperature=POSITIVE)

    def __init__(self, weight: float = 0.5, temperature: float = 10.0) -> None:
        super().__init__(weight)
        self.temperature = temperature

    def compare(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Scalar:
        """Return the loss between the student's and the teacher's outputs."""
        logits, taught = full_precision(student.logits), full_precision(teacher.logits.detach())
        label = batch["label"]
        with torch.no_grad():
            behind = F.cross_entropy(logits, label, reduction="none") - F.cross_entropy(
                taught, label, reduction="none"
            )
            trust = behind.clamp_min(0) * (taught.max(1).indices == label)
            total, ranks = sum_over_ranks(torch.stack([trust.sum(), trust.new_ones(())]))
            # The mean over processes, which DDP takes, makes it the share of all voxels' weight.
            share = trust * ranks / total.clamp_min(torch.finfo(trust.dtype).tiny)
        p = F.softmax(taught / self.temperature, 1)
        soft = -(p * F.log_softmax(logits / self.temperature, 1)).sum(1)
        total_loss: Scalar = (share * soft).sum()
        return total_loss


class ProbabilityMSE(DistillationLoss):
    r"""Compute the squared difference of class probabilities: consistency of two outputs.

    .. math:: L = \operatorname{mean}_{c,v} (p_{cv} - q_{cv})^2 \quad (\text{mean}) \qquad\text{or}
              \quad L = \sum_{c > 0} \operatorname{mean}_v (p_{cv} - q_{cv})^2
              \quad (\text{foreground})

    Args:
        weight: λ.
        over: ``mean`` over all classes, or the sum over ``foreground`` classes.
        ramp_epochs: E; before epoch E the weight is multiplied by :math:`e^{-5 (1 - e/E)^2}`, so
            that it starts at 0.7 % and the student is not tied to its teacher from the first step.
            0: full weight at once.

    Presets ``acn`` and ``smunet``: 10, over the foreground, ramp of 20 epochs. Theirs are sigmoids
    of three channels; here they are the classes of a softmax.

    Source: Laine and Aila (arXiv 1610.02242) for the ramp; Wang et al., ACN (MICCAI 2021); Azad et
    al., SMU-Net (MIDL 2022).
    """

    ranges = Ranges(ramp_epochs=NOT_NEGATIVE)

    def __init__(
        self,
        weight: float = 1.0,
        over: Literal["mean", "foreground"] = "mean",
        ramp_epochs: int = 0,
    ) -> None:
        super().__init__(weight)
        self.over, self.ramp_epochs = over, ramp_epochs

    def strength(self, epoch: int) -> float:
        """Return the ramp's value.

        Example:
            >>> loss = ProbabilityMSE(10.0, ramp_epochs=20)
            >>> [round(10 * loss.strength(epoch), 3) for epoch in (0, 10, 20, 30)]
            [0.067, 2.865, 10.0, 10.0]
        """
        if epoch >= self.ramp_epochs:
            return 1.0
        return math.exp(-5 * (1 - epoch / self.ramp_epochs) ** 2)

    def compare(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Scalar:
        """Return the loss between the student's and the teacher's outputs."""
        p = F.softmax(full_precision(teacher.logits.detach()), 1)
        squared = (F.softmax(full_precision(student.logits), 1) - p).square()
        per_class = squared.mean((0, 2, 3, 4))
        return per_class.mean() if self.over == "mean" else per_class[1:].sum()
