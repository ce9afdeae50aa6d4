"""Self-distillation: the network on all acquired modalities teaches itself on fewer."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pmixseg.describe import NOT_NEGATIVE, POSITIVE, Ranges
from pmixseg.errors import InputError
from pmixseg.losses.anchors import Anchor
from pmixseg.losses.distillation.loss import DistillationLoss, Network
from pmixseg.losses.distillation.prototypes import PrototypeMatch
from pmixseg.losses.segmentation import DEEP_SUPERVISION, enlarged
from pmixseg.types import Batch, Label, Scalar, SegOutput, full_precision

FLOOR = 0.005
"""Smallest probability in the published divergence; it also keeps the logarithm finite."""


def pixel_divergence(
    student: Tensor, teacher: Tensor, temperature: float, label: Label
) -> Float[Tensor, " b"]:
    r"""Compute the KL divergence of softened probabilities, mean over voxels *and classes*.

    .. math:: T^2 \operatorname{mean}_{c,v}\; p \log \frac{p}{q}, \qquad
              p = \max(0.005, U \operatorname{softmax}(t / T)),\;
              q = \max(0.005, U \operatorname{softmax}(s / T))

    U draws probabilities up to the size of the label, trilinearly. No gradient flows into the
    teacher.
    """
    q, p = (
        enlarged(F.softmax(full_precision(logits) / temperature, 1), label).clamp_min(FLOOR)
        for logits in (student, teacher.detach())
    )
    return temperature**2 * (p * (p.log() - q.log())).mean((1, 2, 3, 4))


class SelfDistillation(DistillationLoss):
    r"""Let the network on everything acquired teach itself on single modalities.

    .. math:: L = \sum_{m} w_\mathrm{logit} \Bigl( D(z_m, z) + \sum_{k=1}^{K} 2^{-k}
              D(r^k_m, r^k) \Bigr) + w_\mathrm{proto} L_\mathrm{proto}(m)

    z are the logits and r^k the K auxiliary maps ``ds1 … dsK`` of the shared decoder (RFNet's
    region maps at 1, ½, ¼, ⅛ of the size, of total weight 0.94; a U-Net's deep supervision), on
    everything acquired (detached) and on modality m alone; D is :func:`pixel_divergence` and
    L_proto :class:`PrototypeMatch` on the finest decoder map. Every acquired modality costs a pass
    through the decoder. A sample that lacks m counts as 0 there.

    Args:
        weight: λ of the sum.
        logit_weight: of the pixel-wise KL.
        prototype_weight: of the prototypes.
        temperature: T.
        deep: whether auxiliary maps are compared.
        student_sees: ``single`` modalities, or the combination that the step has ``shown`` it: one
            pass, and what the module hides in training.

    Preset ``passion``: 0.5, 0.1, T = 4; without their preference weights.

    Source: Shi et al., PASSION (ACM MM 2024).
    """

    self_taught = True

    ranges = Ranges(logit_weight=NOT_NEGATIVE, prototype_weight=NOT_NEGATIVE, temperature=POSITIVE)

    def __init__(
        self,
        weight: float = 1.0,
        logit_weight: float = 0.5,
        prototype_weight: float = 0.1,
        temperature: float = 4.0,
        deep: bool = True,
        student_sees: Literal["single", "shown"] = "single",
    ) -> None:
        super().__init__(weight)
        self.logit_weight, self.temperature = logit_weight, temperature
        self.prototype = PrototypeMatch(prototype_weight)
        self.deep = self.reads_extras = deep
        self.student_sees = student_sees
        self.needs_subsets = student_sees == "shown"

    def build(self, student: Network, teacher: Network, anchor: Anchor | None) -> None:
        """Refuse single modalities of an early fusion, which cannot be decoded alone."""
        if self.student_sees == "single" and tuple(student.slots) != tuple(student.modalities):
            raise InputError(
                "SelfDistillation: this backbone mixes modalities at the input, so single ones "
                "cannot be decoded from one encoding; use student_sees: shown."
            )

    def compare(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> Scalar:
        """Return the losses of all levels; a sample that shows nothing counts as 0."""
        label = batch["label"]
        value = pixel_divergence(student.logits, teacher.logits, self.temperature, label)
        for k, name in enumerate(self._deep_maps(student, teacher), 1):
            maps = student.extras[name], teacher.extras[name]
            value = value + 0.5**k * pixel_divergence(*maps, self.temperature, label)
        total = self.logit_weight * value
        if self.prototype.weight:
            prototype = self.prototype.per_sample(student, teacher, batch)
            total = total + self.prototype.weight * prototype
        counts = batch["present"].any(1)
        return torch.where(counts, total, 0.0).mean()

    def _deep_maps(self, student: SegOutput, teacher: SegOutput) -> list[str]:
        if not self.deep:
            return []
        names = [n for n in student.extras if n in teacher.extras and DEEP_SUPERVISION.fullmatch(n)]
        return sorted(names, key=lambda name: int(name[2:]))
