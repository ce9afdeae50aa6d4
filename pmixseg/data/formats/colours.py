"""Colours and names of labels, for pages and for the viewers that open results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pmixseg.files import write_text
from pmixseg.task import Task

CLASS_COLOURS = ("#e0563b", "#38a880", "#f4cf4a", "#6f8fe8", "#c77bd0", "#8fd0e8")
"""Colours of the label classes in task order (BraTS: NCR, ED, ET); repeated for more."""

_SNAP_HEAD = """\
################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
# IDX: the number in the image; R, G, B: colour, 0 to 255; A: opacity, 0 to 1;
# VIS: label is visible; MSH: its surface is visible; LABEL: its name
################################################
"""


def class_colours(count: int) -> list[str]:
    """Return colours of classes 1 to ``count``, as ``#rrggbb``."""
    return [CLASS_COLOURS[i % len(CLASS_COLOURS)] for i in range(count)]


def red_green_blue(colour: str) -> tuple[int, int, int]:
    """Return the parts of ``#rrggbb``, 0 to 255."""
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


def slicer_table(codes: Mapping[str, int], task: Task) -> str:
    """Return a colour table of 3D Slicer (``.ctbl``): number, name, red, green, blue, opacity.

    Example:
        >>> from pmixseg.task import BRATS
        >>> print(slicer_table({"NCR": 1, "ED": 2, "ET": 4}, BRATS))
        # Color table of pmixseg, 4 values
        0 Background 0 0 0 0
        1 NCR 224 86 59 255
        2 ED 56 168 128 255
        4 ET 244 207 74 255
        <BLANKLINE>
    """
    rows = _rows(codes, task)
    lines = [f"# Color table of pmixseg, {len(rows) + 1} values", "0 Background 0 0 0 0"]
    # A name ends at the first blank.
    lines += [f"{n} {'_'.join(name.split())} {r} {g} {b} 255" for n, name, (r, g, b) in rows]
    return "\n".join(lines) + "\n"


def snap_table(codes: Mapping[str, int], task: Task) -> str:
    """Return a label description of ITK-SNAP."""
    lines = ['    0     0    0    0        0  0  0    "Clear Label"']
    for number, name, (red, green, blue) in _rows(codes, task):
        quoted = name.replace('"', "'")
        lines.append(f'{number:5d} {red:5d} {green:4d} {blue:4d}        1  1  1    "{quoted}"')
    return _SNAP_HEAD + "\n".join(lines) + "\n"


def write_tables(stem: Path, codes: Mapping[str, int], task: Task) -> dict[str, Path]:
    """Write ``<stem>.ctbl`` for 3D Slicer and ``<stem>_itksnap.txt`` for ITK-SNAP.

    ``stem`` is the label map's path without ending. The tables' paths are returned by program.
    """
    texts = {
        "slicer": (f"{stem.name}.ctbl", slicer_table(codes, task)),
        "itksnap": (f"{stem.name}_itksnap.txt", snap_table(codes, task)),
    }
    return {what: write_text(stem.with_name(name), text) for what, (name, text) in texts.items()}


def _rows(codes: Mapping[str, int], task: Task) -> list[tuple[int, str, tuple[int, int, int]]]:
    """Return the number, name and colour of every label, by number."""
    colours = zip(task.labels, class_colours(len(task.labels)), strict=True)
    return sorted((codes[label], task.show(label), red_green_blue(c)) for label, c in colours)
