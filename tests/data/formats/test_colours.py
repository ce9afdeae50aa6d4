"""Label tables, read back as 3D Slicer and ITK-SNAP read them."""

import re

import pytest

from pmixseg.data.formats.colours import class_colours, slicer_table, snap_table, write_tables
from pmixseg.task import BRATS, Task

ODD = Task(
    "odd",
    ("t1",),
    ("a lesion", "rim"),
    {"all": ("a lesion", "rim")},
    display={"rim": 'the "rim" of it'},
)


def read_slicer(text):
    """Number, name and four bytes, parted by blanks; lines that begin with # are none."""
    rows = [line.split() for line in text.splitlines() if not line.startswith("#")]
    assert all(len(row) == 6 for row in rows)
    return {int(n): (name, *map(int, rgba)) for n, name, *rgba in rows}


def read_snap(text):
    """Seven numbers, then a name in double quotes."""
    rows = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            numbers, name = re.fullmatch(r"([\d\s.]+)\"([^\"]*)\"", line).groups()
            index, red, green, blue, alpha, visible, mesh = map(float, numbers.split())
            rows[int(index)] = (name, int(red), int(green), int(blue), alpha, visible, mesh)
    return rows


@pytest.mark.parametrize("task", [BRATS, ODD])
def test_both_tables_say_the_same(task, tmp_path):
    codes = {label: 2**n for n, label in enumerate(task.labels)}
    made = write_tables(tmp_path / "x_seg", codes, task)
    assert {k: p.name for k, p in made.items()} == {
        "slicer": "x_seg.ctbl",
        "itksnap": "x_seg_itksnap.txt",
    }
    slicer = read_slicer(made["slicer"].read_text())
    snap = read_snap(made["itksnap"].read_text())
    assert slicer.pop(0) == ("Background", 0, 0, 0, 0)
    assert snap.pop(0) == ("Clear Label", 0, 0, 0, 0, 0, 0)
    assert set(slicer) == set(snap) == set(codes.values())
    for label, colour in zip(task.labels, class_colours(len(codes)), strict=True):
        rgb = tuple(bytes.fromhex(colour[1:]))
        name = task.show(label)
        assert slicer[codes[label]] == (name.replace(" ", "_"), *rgb, 255)
        assert snap[codes[label]] == (name.replace('"', "'"), *rgb, 1, 1, 1)


def test_the_tables_of_brats_by_hand():
    codes = {"NCR": 1, "ED": 2, "ET": 4}
    assert slicer_table(codes, BRATS).splitlines()[-1] == "4 ET 244 207 74 255"
    assert snap_table(codes, BRATS).splitlines()[-2:] == [
        '    2    56  168  128        1  1  1    "ED"',
        '    4   244  207   74        1  1  1    "ET"',
    ]
