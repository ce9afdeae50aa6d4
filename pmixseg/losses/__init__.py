"""Losses: tensors in, scalars out; nothing here knows Lightning.

* :mod:`~pmixseg.losses.segmentation`: the criterion contract, Dice + cross-entropy.
"""

from pmixseg.losses.segmentation import Criterion, DiceCE, area_fractions

__all__ = ["Criterion", "DiceCE", "area_fractions"]
