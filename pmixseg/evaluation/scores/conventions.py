"""Conventions of the scores, by name: empty masks, percentile, lesions.

Published numbers cannot be compared because these differ silently. Here they are one object that
every result file carries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pmixseg.argument_checks import check_fields
from pmixseg.describe import NOT_NEGATIVE, Ranges

BRATS_PENALTY_MM = 373.12866
"""Diagonal of the 240 × 240 × 155 mm BraTS volume: the HD95 of a missed or invented region."""

EmptyRule = Literal["brats", "one", "zero", "nan"]
PercentileRule = Literal["pooled", "max_directed"]
LesionRule = Literal["none", "brats2023-gli", "panoptica-0.0.10"]

# HD95 and ASD where (one mask is empty, both are).
_EMPTY: Mapping[str, tuple[float, float]] = {
    "brats": (BRATS_PENALTY_MM, 0.0),
    "one": (1.0, 0.0),
    "zero": (0.0, 0.0),
    "nan": (math.nan, math.nan),
}


def dice(predicted: int, true: int, shared: int) -> float:
    """Return the Dice of a region from its numbers of voxels; 1 where both masks are empty.

    Example:
        >>> dice(3, 1, 1), dice(3, 0, 0), dice(0, 0, 0)
        (0.5, 0.0, 1.0)
    """
    return 2 * shared / (predicted + true) if predicted + true else 1.0


@dataclass(frozen=True)
class Conventions:
    """Choose how scores are defined where papers differ.

    Args:
        hd95: HD95 and ASD in mm where one mask is empty: ``brats`` 373.12866 (BraTS, nnU-Net),
            ``one`` 1 (ACN, SMU-Net, PASSION), ``zero`` 0 (M3AE); both empty: 0. ``nan``: NaN in
            both cases (ProtoKD).
        percentile: HD95 is the 95th percentile of both directed distances ``pooled`` (medpy) or
            the larger of the two directed 95th percentiles, ``max_directed`` (MONAI).
        nsd_tolerance_mm: surfaces closer than this agree (normalised surface Dice).
        lesion: lesion-wise scores that are added, see :mod:`pmixseg.evaluation.scores.lesions`;
            ``brats2023-gli`` has the constants of adult glioma, whatever the cohort.

    Fixed: Dice and NSD are 1 where both masks are empty and 0 where one is; ASD is the mean of both
    directed distances together (medpy, MONAI); sensitivity without truth and precision without
    prediction are NaN; specificity counts the whole volume.

    Raises:
        InputError: an unknown name or a negative tolerance.

    Example:
        >>> Conventions().to_dict()["hd95_one_empty_mm"]
        373.12866
    """

    ranges = Ranges(nsd_tolerance_mm=NOT_NEGATIVE)

    hd95: EmptyRule = "brats"
    percentile: PercentileRule = "pooled"
    nsd_tolerance_mm: float = 1.0
    lesion: LesionRule = "none"

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def one_empty(self) -> float:
        """HD95 and ASD in mm where exactly one mask is empty."""
        return _EMPTY[self.hd95][0]

    @property
    def both_empty(self) -> float:
        """HD95 and ASD in mm where both masks are empty."""
        return _EMPTY[self.hd95][1]

    def to_dict(self) -> dict[str, Any]:
        """Return primitives for result files; what the names stand for is spelt out as well."""
        spelt = {
            "hd95_one_empty_mm": None if math.isnan(self.one_empty) else self.one_empty,
            "hd95_both_empty_mm": None if math.isnan(self.both_empty) else self.both_empty,
            "dice_both_empty": dice(0, 0, 0),
            "dice_one_empty": dice(1, 0, 0),
        }
        return vars(self) | spelt

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Conventions:
        """Read what :meth:`to_dict` wrote; spelt-out and unknown keys are ignored."""
        return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})
