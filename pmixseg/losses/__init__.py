"""Losses: tensors in, scalars out; nothing here knows Lightning.

* :mod:`~pmixseg.losses.segmentation`: the criterion contract, Dice + cross-entropy.
* :mod:`~pmixseg.losses.anchors`: P_mix, what latents are aligned to and missing ones filled with.
"""

from pmixseg.losses.anchors import (
    Anchor,
    MixtureAnchor,
    ModalityAnchor,
    NormalAnchor,
    ProductAnchor,
    WeightedAnchor,
)
from pmixseg.losses.segmentation import Criterion, DiceCE, area_fractions

__all__ = [
    "Anchor",
    "Criterion",
    "DiceCE",
    "MixtureAnchor",
    "ModalityAnchor",
    "NormalAnchor",
    "ProductAnchor",
    "WeightedAnchor",
    "area_fractions",
]
