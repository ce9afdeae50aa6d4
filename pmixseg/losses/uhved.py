"""The loss that U-HVED is trained with."""

from __future__ import annotations

import torch
from torch import Tensor

from pmixseg.describe import NOT_NEGATIVE, Ranges
from pmixseg.errors import InputError
from pmixseg.losses.segmentation import Criterion, DiceCE
from pmixseg.types import Batch, Scalar, SegOutput, full_precision


class UHVEDCriterion(Criterion):
    r"""Segmentation, two divergences of posteriors, and reconstruction of every modality.

    .. math:: L = L_\mathrm{Dice} + L_\mathrm{CE}
              + \lambda_\mathrm{kl} \sum_l \left[\mathrm{KL}(q^l_\mathrm{all} \| q^l_A)
              + \mathrm{KL}(q^l_A \| \mathcal N(0, I))\right]
              + \lambda_\mathrm{rec} \operatorname{mean}_m \|x_m - \hat x_m\|^2

    A is what the sample was shown, "all" what was acquired, q the product of Gaussians of level l;
    the mean over m is one per sample, then over samples (the published code has one in a batch).
    The published code sums the divergences over all 14 smaller combinations and divides by 14 (15
    for the prior); the drawn A is one sample of that mean, under the sampler's weights. Outputs
    without these extras (eval mode, ``reconstruct=False``) are scored on the segmentation alone.

    Args:
        kl_weight: λ_kl, 0.1 in the published code.
        reconstruction_weight: λ_rec, 0.1 there.

    Raises:
        InputError: a negative weight; in ``forward``: a network without all of the task's
            modalities, whose reconstructions could not be told apart.

    Source: Dorent et al., U-HVED (MICCAI 2019); ReubenDo/U-HVED, extensions/u_hved.
    """

    ranges = Ranges(kl_weight=NOT_NEGATIVE, reconstruction_weight=NOT_NEGATIVE)

    def __init__(self, kl_weight: float = 0.1, reconstruction_weight: float = 0.1) -> None:
        super().__init__()
        self.kl_weight, self.reconstruction_weight = kl_weight, reconstruction_weight
        self.segmentation = DiceCE()

    def forward(self, output: SegOutput, batch: Batch, epoch: int | Tensor) -> Scalar:
        """Return the segmentation loss, U-HVED's divergence and its reconstruction loss."""
        total = self.segmentation(output, batch, epoch)
        if "reconstruction" not in output.extras:
            return total
        rebuilt = full_precision(output.extras["reconstruction"])
        image = full_precision(batch["image"])
        if rebuilt.shape != image.shape:
            raise InputError(
                f"UHVEDCriterion: the network rebuilds {rebuilt.shape[1]} of {image.shape[1]} "
                "modalities; for a dedicated student use backbone.reconstruct: false."
            )
        errors = (rebuilt - image).square().mean((2, 3, 4))
        rebuilt_slots = output.extras["reconstruction_slots"]
        error = torch.where(rebuilt_slots, errors, 0.0).sum(1) / rebuilt_slots.sum(1).clamp(min=1)
        total = total + self.reconstruction_weight * error.mean()
        return total + self.kl_weight * output.extras["divergence"].mean()
