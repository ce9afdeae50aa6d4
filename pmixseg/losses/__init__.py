"""Losses: tensors in, scalars out; nothing here knows Lightning.

* :mod:`~pmixseg.losses.segmentation`: the criterion contract, Dice + cross-entropy.
* :mod:`~pmixseg.losses.anchors`: P_mix, what latents are aligned to and missing ones filled with.
* :mod:`~pmixseg.losses.alignment`: the alignment loss; its distances are in ``distances``,
  ``gaussian`` and ``samples``.
"""

from pmixseg.losses.alignment import DISTANCES, Alignment, resolve_levels
from pmixseg.losses.anchors import (
    Anchor,
    MixtureAnchor,
    ModalityAnchor,
    NormalAnchor,
    ProductAnchor,
    WeightedAnchor,
)
from pmixseg.losses.distances import MSE, NMSE, Cosine, Distance, SmoothL1
from pmixseg.losses.gaussian import KL, VID
from pmixseg.losses.samples import MMD, SlicedWasserstein
from pmixseg.losses.segmentation import Criterion, DiceCE, area_fractions

__all__ = [
    "DISTANCES",
    "KL",
    "MMD",
    "MSE",
    "NMSE",
    "VID",
    "Alignment",
    "Anchor",
    "Cosine",
    "Criterion",
    "DiceCE",
    "Distance",
    "MixtureAnchor",
    "ModalityAnchor",
    "NormalAnchor",
    "ProductAnchor",
    "SlicedWasserstein",
    "SmoothL1",
    "WeightedAnchor",
    "area_fractions",
    "resolve_levels",
]
