"""Which way each numeric column of a record gets better."""

from __future__ import annotations

from typing import Literal

Direction = Literal["higher", "lower", "zero"]

HIGHER = ("dice", "nsd", "sensitivity", "specificity", "precision", "lesion_dice", "lesion_tp")
LOWER = (
    *("hd95", "asd", "lesion_hd95", "ece", "brier"),
    *("presence_fp", "presence_fn", "lesion_fp", "lesion_fn"),
)

DIRECTIONS: dict[str, Direction | None] = {
    **dict.fromkeys(HIGHER, "higher"),
    **dict.fromkeys(LOWER, "lower"),
    "volume_error_ml": "zero",
    "volume_ml": None,
    "truth_volume_ml": None,
}
"""``zero``: signed, better the nearer to 0; ``None``: describes a case, neither way is better."""


def direction_of(measure: str) -> Direction | None:
    """How a column gets better; one that is not known here is taken to be better when higher."""
    return DIRECTIONS.get(measure, "higher")
