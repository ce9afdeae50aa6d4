"""The layouts of public cohorts.

==============  ====================================================================  ============
layout          files                                                                 ET, others
==============  ====================================================================  ============
``brats2018``   ``HGG/Brats18_x_1/Brats18_x_1_flair.nii.gz``; also 2017               4
``brats2019``   the same with ``BraTS19_``                                            4
``brats2020``   ``BraTS20_Training_001/BraTS20_Training_001_flair.nii.gz``            4
``brats2021``   ``BraTS2021_00000/BraTS2021_00000_flair.nii.gz``                      4
``brats``       such names with any case name, with or without ``HGG``, ``LGG``       4
``brats2024``   ``BraTS-GLI-00005-100/BraTS-GLI-00005-100-t2f.nii.gz``; also MET      3; 4 = cavity
``brats2023``   the same before the cavity became a label; also MEN, SSA (Africa)     3
``brats-ped``   the same of children, ``BraTS-PED-…``                                 1 (2, 3, 4)
``brats-goat``  ``BraTS-GoAT-00000/BraTS-GoAT-00000-t2f.nii.gz``                      3
``msd``         Medical Segmentation Decathlon, Task01: 4-D images, ``dataset.json``  from the file
``nnunet``      nnU-Net raw: ``imagesTr/x_0000.nii.gz``, ``dataset.json``             from the file
==============  ====================================================================  ============

Every ending may also be ``.nii``, ``.mha`` or ``.nrrd``, in small or capital letters.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pmixseg.data.cohorts.cases import Layout

_OLD_SUFFIXES = {
    "flair": ("flair",),
    "t1ce": ("t1ce", "t1post", "t1gd", "t1c", "t1_ce", "t1_post", "t1_gd", "t1_c"),
    "t1": ("t1",),
    "t2": ("t2",),
}
_NEW_SUFFIXES = {"flair": ("t2f",), "t1ce": ("t1c",), "t1": ("t1n",), "t2": ("t2w",)}
_OLD_CODES = {"NCR": 1, "ED": 2, "ET": 4}
_NEW_CODES = {"NCR": 1, "ED": 2, "ET": 3}


def _brats(
    name: str,
    stems: tuple[str, ...],
    *,
    suffixes: Mapping[str, tuple[str, ...]],
    codes: Mapping[str, int],
    joint: str,
    case: str = "{case}",
    patterns: Mapping[str, str] | None = None,
    ignored: tuple[int, ...] = (),
    also: Mapping[int, str] | None = None,
    odd_labels: tuple[str, ...] = (),
) -> Layout:
    """Return a layout whose every file is ``stem + joint + suffix``.

    Some programs unpack every file into a folder of its name, as ``x_flair.nii/0001.nii``.
    """

    def files(suffix: str) -> tuple[str, ...]:
        names = [f"{stem}{joint}{suffix}.nii" for stem in stems]
        return (*(f"{n}.gz" for n in names), *(f"{n}/*.nii.gz" for n in names))

    return Layout(
        name=name,
        images={m: tuple(p for x in several for p in files(x)) for m, several in suffixes.items()},
        label=(*files("seg"), *odd_labels),
        codes=codes,
        also=also or {},
        ignored=ignored,
        case=case,
        fields=patterns or {},
        anchored=False,
    )


_older = partial(_brats, suffixes=_OLD_SUFFIXES, codes=_OLD_CODES, joint="_")
_newer = partial(_brats, suffixes=_NEW_SUFFIXES, codes=_NEW_CODES, joint="-")
_FLAT = ("{case}/{case}",)
_VISITS = "{patient}_{visit}/{patient}_{visit}"


def _graded(name: str, patient: str) -> Layout:
    """Return the layout of patients, in folders named by the tumour's grade or without them."""
    return _older(
        name,
        (f"{{grade}}/{_VISITS}", _VISITS),
        case="{patient}_{visit}",
        patterns={"patient": patient, "visit": r"\d+"},
    )


def _of_visits(name: str, patient: str = r"(?!BraTS-PED)[^/]+", **others: Any) -> Layout:
    """Return the layout of a patient's visits, numbered with three digits."""
    return _newer(
        name,
        ("{patient}-{visit}/{patient}-{visit}",),
        case="{patient}-{visit}",
        patterns={"patient": patient, "visit": r"\d{3}"},
        **others,
    )


_PRESETS = (
    _graded("brats2018", r"Brats1[78]_[^/]+"),
    _graded("brats2019", r"BraTS19_[^/]+"),
    _older(
        "brats2020",
        _FLAT,
        patterns={"case": r"BraTS20_[^/]+"},
        # Case 355 was released with its label under the name it had at the hospital.
        odd_labels=("{case}/W39_*_Segm.nii.gz",),
    ),
    _older("brats2021", _FLAT, patterns={"case": r"BraTS2021_[^/]+"}),
    _older("brats", ("{grade}/{case}/{case}", *_FLAT)),
    # Scans after treatment are numbered from 100; before it, from 000.
    _of_visits("brats2024", ignored=(4,)),
    _of_visits("brats2023"),
    _of_visits(
        "brats-ped",
        r"BraTS-PED-[^/]+",
        codes={"NCR": 2, "ED": 4, "ET": 1},  # 2 non-enhancing, 3 cystic: core, not ET
        also={3: "NCR"},
    ),
    _newer("brats-goat", _FLAT, patterns={"case": r"BraTS-GoAT-\d+"}),
    Layout(
        "msd",
        {},
        ("labelsTr/{case}.nii.gz",),
        {},
        # Four digits at the end are a channel number of nnU-Net.
        fields={"case": r"[^/]+(?<!_\d{4})"},
        described=True,
    ),
    Layout("nnunet", {}, ("labelsTr/{case}.nii.gz",), {}, described=True),
)

LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in _PRESETS}
"""Presets by name."""
