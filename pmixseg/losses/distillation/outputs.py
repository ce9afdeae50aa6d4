"""Distillation terms that compare class probabilities."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pmixseg.errors import InputError
from pmixseg.losses.distillation.term import DistillationTerm, full_precision
from pmixseg.types import Batch, Scalar, SegOutput


def check_temperature(owner: object, temperature: float) -> None:
    """Refuse temperatures that are not positive.

    Raises:
        InputError: temperature 0 or less.
    """
    if temperature <= 0:
        raise InputError(
            f"{type(owner).__name__}: temperature is {temperature}; use a number above 0."
        )


class LogitKL(DistillationTerm):
    r"""KL divergence between softened class probabilities.

    .. math:: L = T^2 \operatorname{mean}_v \sum_c p_c \log \frac{p_c}{q_c}, \qquad
              p = \operatorname{softmax}(t / T),\; q = \operatorname{softmax}(s / T)

    summed over classes, mean over voxels and samples.

    Args:
        weight: λ.
        temperature: T.
        squared: multiply by T², which keeps the gradient's size independent of T.

    Preset ``protokd``: weight 2.5, T = 10, no T² (their 10 is a mean over the 4 classes as well).
    Preset ``passion``: weight 0.5, T = 4, T². Preset ``kdnet``: generalised distillation
    λ·L_seg + (1-λ)·KL; its constants are from memory only.

    Source: Hinton et al. (arXiv 1503.02531).
    """

    def __init__(self, weight: float = 1.0, temperature: float = 4.0, squared: bool = True) -> None:
        super().__init__(weight)
        check_temperature(self, temperature)
        self.temperature, self.squared = temperature, squared

    def compare(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Scalar:
        """See the class."""
        q = F.log_softmax(full_precision(student.logits) / self.temperature, 1)
        p = F.log_softmax(full_precision(teacher.logits.detach()) / self.temperature, 1)
        divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(1).mean()
        return divergence * (self.temperature**2 if self.squared else 1.0)


class WeightedSoftCE(DistillationTerm):
    r"""Soft cross-entropy where the teacher is right and better than the student.

    .. math:: L = \operatorname{mean}_v \; \omega_v \Bigl(- \sum_c p_c \log q_c\Bigr), \qquad
              \omega_v = \operatorname{sg}\bigl[\max(0, CE_s - CE_t) \cdot [\arg\max t = y]\bigr]

    with p, q as in :class:`LogitKL` and CE the cross-entropy with the label at temperature 1.

    Args:
        weight: λ.
        temperature: T of the soft cross-entropy.

    Preset ``pmkl``: weight 0.5, T = 10.

    Source: Chen et al., PMKL (IEEE TMI 2022).
    """

    def __init__(self, weight: float = 0.5, temperature: float = 10.0) -> None:
        super().__init__(weight)
        check_temperature(self, temperature)
        self.temperature = temperature

    def compare(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Scalar:
        """See the class."""
        logits, taught = full_precision(student.logits), full_precision(teacher.logits.detach())
        label = batch["label"]
        with torch.no_grad():
            behind = F.cross_entropy(logits, label, reduction="none") - F.cross_entropy(
                taught, label, reduction="none"
            )
            trust = behind.clamp_min(0) * (taught.argmax(1) == label)
        p = F.softmax(taught / self.temperature, 1)
        soft = -(p * F.log_softmax(logits / self.temperature, 1)).sum(1)
        return (trust * soft).mean()


class ProbabilityMSE(DistillationTerm):
    r"""Mean squared difference of class probabilities, :math:`\operatorname{mean}(p - q)^2`.

    The consistency of outputs between paths with all and with few modalities; their ramps are the
    callback's ``warmup_epochs``.

    Args:
        weight: λ.

    Preset ``acn``: up to 10, with the ramp exp(-5 (1 - epoch/20)²). Preset ``smunet``: a sigmoid
    ramp; its height is not stated in an opened source, 1 is used.

    Source: Wang et al., ACN (MICCAI 2021); Azad et al., SMU-Net (MIDL 2022).
    """

    def compare(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Scalar:
        """See the class."""
        p = F.softmax(full_precision(teacher.logits.detach()), 1)
        return F.mse_loss(F.softmax(full_precision(student.logits), 1), p)
