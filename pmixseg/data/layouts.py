"""Finding cases: which file of a folder tree is which modality of which patient scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ImageFile = Path | tuple[Path, int]
"""A 3-D file, or one channel of a 4-D file."""


@dataclass(frozen=True)
class Case:
    """One patient scan as it lies on disk; it may lack modalities and the label.

    Args:
        case_id: unique in its cohort.
        images: modality -> file, or (4-D file, channel); only what exists.
        label: the label map, or ``None``.
        codes: label name -> number in the label file.
        grade: ``HGG``, ``LGG``, or ``None`` where the layout does not tell.
        patient: groups the time points of one patient.
        layout: name of the layout it was found by.
        ignored: numbers in the label file that are no label of the task.
        problem: a sentence if the case cannot be used as it lies there.
    """

    case_id: str
    images: Mapping[str, ImageFile]
    label: Path | None
    codes: Mapping[str, int]
    grade: str | None = None
    patient: str = ""
    layout: str = ""
    ignored: tuple[int, ...] = ()
    problem: str | None = field(default=None)
