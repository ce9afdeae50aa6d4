"""Names of all measures in the records, and whether higher or lower is better.

The order is that of a record. A new measure is one line here, and the code that computes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Direction = Literal["higher", "lower", "zero"]
"""``zero``: signed, and better the nearer to 0."""

Kind = Literal["overlap", "distance", "surface", "presence", "lesion", "calibration"]
"""What a measure is computed from."""


@dataclass(frozen=True)
class Measure:
    """A column of the records, and how it is printed.

    Args:
        name: of the column.
        title: in tables.
        unit: of what is printed.
        direction: how it gets better; ``None``: it describes a case, and nobody wins by it.
        kind: what it is computed from.
        scale: what is printed per unit of the column.
        digits: after the decimal point.
        numeric: whether it is a number at all.
    """

    name: str
    title: str
    unit: str
    direction: Direction | None
    kind: Kind
    scale: float = 1.0
    digits: int = 1
    numeric: bool = True

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value that a column can hold.

        Example:
            >>> DICE.bounds, HD95.bounds, MEASURES["volume_error_ml"].bounds
            ((0.0, 1.0), (0.0, inf), (-inf, inf))
        """
        lowest = -math.inf if self.direction == "zero" else 0.0
        return lowest, 1.0 if self.scale == 100 else math.inf

    @property
    def higher(self) -> bool:
        """Whether more is better."""
        return self.direction == "higher"

    def loss(self, value: float) -> float:
        """Return a number that is the lower the better the value.

        Example:
            >>> DICE.loss(0.9), HD95.loss(4.0), MEASURES["volume_error_ml"].loss(-3.0)
            (-0.9, 4.0, 3.0)
        """
        return -value if self.higher else abs(value)

    def show(self, value: float, digits: int | None = None) -> str:
        """Write a value in ``unit`` as text, a dash where there is none.

        Example:
            >>> DICE.show(87.264), DICE.show(87.264, digits=0), DICE.show(float("nan"))
            ('87.26', '87', '–')
        """
        missing = math.isnan(value)
        return "–" if missing else f"{value:.{self.digits if digits is None else digits}f}"


def _percent(name: str, title: str, direction: Direction, kind: Kind) -> Measure:
    return Measure(name, title, "%", direction, kind, scale=100, digits=2)


DICE = _percent("dice", "Dice", "higher", "overlap")
HD95 = Measure("hd95", "HD95", "mm", "lower", "distance")
ECE = _percent("ece", "ECE", "lower", "calibration")
BRIER = Measure("brier", "Brier score", "× 100", "lower", "calibration", scale=100, digits=2)

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        DICE,
        HD95,
        Measure("asd", "Mean surface distance", "mm", "lower", "distance"),
        _percent("nsd", "Surface Dice", "higher", "surface"),
        _percent("sensitivity", "Sensitivity", "higher", "overlap"),
        _percent("specificity", "Specificity", "higher", "overlap"),
        _percent("precision", "Precision", "higher", "overlap"),
        Measure("volume_ml", "Volume", "ml", None, "overlap"),
        Measure("truth_volume_ml", "True volume", "ml", None, "overlap"),
        Measure("volume_error_ml", "Volume error", "ml", "zero", "overlap"),
        Measure("empty", "Empty mask", "", None, "overlap", numeric=False),
        _percent("presence_fp", "Predicted where there is none", "lower", "presence"),
        _percent("presence_fn", "Missed altogether", "lower", "presence"),
        _percent("lesion_dice", "Lesion-wise Dice", "higher", "lesion"),
        Measure("lesion_hd95", "Lesion-wise HD95", "mm", "lower", "lesion"),
        Measure("lesion_tp", "Lesions found", "per case", "higher", "lesion"),
        Measure("lesion_fp", "Lesions invented", "per case", "lower", "lesion"),
        Measure("lesion_fn", "Lesions missed", "per case", "lower", "lesion"),
        ECE,
        BRIER,
    )
}


def names_of(*kinds: Kind) -> tuple[str, ...]:
    """Return the names of all measures of some kinds, in the order of a record.

    Example:
        >>> names_of("distance", "surface")
        ('hd95', 'asd', 'nsd')
    """
    return tuple(name for name, measure in MEASURES.items() if measure.kind in kinds)


def direction_of(measure: str) -> Direction | None:
    """Say how a column gets better; one that is not known here counts as better when higher."""
    row = MEASURES.get(measure)
    return "higher" if row is None else row.direction
