"""Distillation of "style": which channels are active together, wherever that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from pmixseg.errors import InputError
from pmixseg.losses.distances import PerSlot
from pmixseg.losses.distillation.pairing import Pair, SlotwiseLoss
from pmixseg.types import Brain, Features


class GramMatch(SlotwiseLoss):
    r"""Compute the squared difference of Gram matrices ("style").

    .. math:: D = \operatorname{mean}_{c,c'} (G^s - G^t)^2, \qquad
              G_{cc'} = \frac{1}{N} \sum_v f_{cv} f_{c'v}

    over the N brain voxels of the level; the teacher's side is its anchor.

    Args:
        weight: λ.
        strides: strides that are compared; the coarsest that both have if not given.
        normalisation: ``mean``, as above, or that of the code of SMU-Net, ``smunet``:
            :math:`D = \sum_{c,c'} (G^s - G^t)^2 / (4 C^2 s^2)` with
            :math:`G_{cc'} = \sum_v f_{cv} f_{c'v} / (C N)`, and s the product of the level's first
            two sides. It is the former divided by :math:`4 C^2 s^2`, and next to nothing.

    Preset ``smunet``: 1e-4 with its own normalisation, beside :class:`LatentMatch` ("content")
    with 0.2.

    Raises:
        InputError: another normalisation.

    Source: Gatys et al. (CVPR 2016); Azad et al., SMU-Net (MIDL 2022).
    """

    def __init__(
        self,
        weight: float = 1e-4,
        strides: Sequence[int] | None = None,
        normalisation: Literal["mean", "smunet"] = "mean",
    ) -> None:
        super().__init__(weight, strides)
        if normalisation not in ("mean", "smunet"):
            raise InputError(
                f"GramMatch: normalisation is '{normalisation}'; use 'mean' or 'smunet'."
            )
        self.normalisation = normalisation

    def between(self, features: Features, target: Features, brain: Brain, pair: Pair) -> PerSlot:
        """Return the difference between a student's and a teacher's features."""
        distances = (_gram(features, brain) - _gram(target, brain)).square().mean((2, 3))
        if self.normalisation == "mean":
            return distances
        size = features.shape[3] * features.shape[4]
        return distances / (4 * features.shape[2] ** 2 * size**2)


def _gram(features: Features, brain: Brain) -> torch.Tensor:
    inside = torch.where(brain[:, None, None], features, 0.0).flatten(3)
    number = brain.flatten(1).sum(1).clamp_min(1)
    return inside @ inside.mT / number[:, None, None, None]
