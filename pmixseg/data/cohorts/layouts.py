"""The layouts of public cohorts, and finding the cases of any cohort.

==============  ====================================================================  ============
layout          files                                                                 ET, others
==============  ====================================================================  ============
``brats2018``   ``HGG/Brats18_x_1/Brats18_x_1_flair.nii.gz``; also 2017               4
``brats2019``   the same with ``BraTS19_``                                            4
``brats2020``   ``BraTS20_Training_001/BraTS20_Training_001_flair.nii.gz``            4
``brats2021``   ``BraTS2021_00000/BraTS2021_00000_flair.nii.gz``                      4
``brats``       such names with any case name, with or without ``HGG``, ``LGG``       4
``brats2024``   ``BraTS-GLI-00005-100/BraTS-GLI-00005-100-t2f.nii.gz``                3; 4 = cavity
``brats2023``   the same names before the cavity became a label                       3
``msd``         Medical Segmentation Decathlon, Task01: 4-D images, ``dataset.json``  from the file
``nnunet``      nnU-Net raw: ``imagesTr/x_0000.nii.gz``, ``dataset.json``             from the file
==============  ====================================================================  ============
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from pmixseg.data.cohorts.cases import Case, Found, ImageFile, Layout, Pattern, Tree, match
from pmixseg.data.cohorts.dataset_json import described_layout
from pmixseg.errors import InputError
from pmixseg.task import Task

__all__ = [
    "LAYOUTS",
    "Case",
    "ImageFile",
    "Layout",
    "find_cases",
    "load_layout",
    "search",
]

_OLD_SUFFIXES = {"flair": "flair", "t1ce": "t1ce", "t1": "t1", "t2": "t2"}
_NEW_SUFFIXES = {"flair": "t2f", "t1ce": "t1c", "t1": "t1n", "t2": "t2w"}
_OLD_CODES = {"NCR": 1, "ED": 2, "ET": 4}
_NEW_CODES = {"NCR": 1, "ED": 2, "ET": 3}


def _brats(
    name: str,
    stems: tuple[str, ...],
    suffixes: Mapping[str, str],
    codes: Mapping[str, int],
    joint: str,
    *,
    case: str = "{case}",
    patterns: Mapping[str, str] | None = None,
    ignored: tuple[int, ...] = (),
    odd_labels: tuple[str, ...] = (),
) -> Layout:
    """A layout whose every file is ``stem + joint + suffix``."""
    return Layout(
        name=name,
        images={m: tuple(f"{s}{joint}{x}.nii.gz" for s in stems) for m, x in suffixes.items()},
        label=(*(f"{s}{joint}seg.nii.gz" for s in stems), *odd_labels),
        codes=codes,
        ignored=ignored,
        case=case,
        fields=patterns or {},
        anchored=False,
    )


_FLAT = "{case}/{case}"
_VISITS = "{patient}_{visit}/{patient}_{visit}"
_DASHED = "{patient}-{visit}/{patient}-{visit}"

_PRESETS = (
    _brats(
        "brats2018",
        (f"{{grade}}/{_VISITS}", _VISITS),
        _OLD_SUFFIXES,
        _OLD_CODES,
        "_",
        case="{patient}_{visit}",
        patterns={"patient": r"Brats1[78]_[^/]+", "visit": r"\d+"},
    ),
    _brats(
        "brats2019",
        (f"{{grade}}/{_VISITS}", _VISITS),
        _OLD_SUFFIXES,
        _OLD_CODES,
        "_",
        case="{patient}_{visit}",
        patterns={"patient": r"BraTS19_[^/]+", "visit": r"\d+"},
    ),
    _brats(
        "brats2020",
        (_FLAT,),
        _OLD_SUFFIXES,
        _OLD_CODES,
        "_",
        patterns={"case": r"BraTS20_[^/]+"},
        # Case 355 was released with its label under the name it had at the hospital.
        odd_labels=("{case}/W39_*_Segm.nii.gz",),
    ),
    _brats(
        "brats2021", (_FLAT,), _OLD_SUFFIXES, _OLD_CODES, "_", patterns={"case": r"BraTS2021_[^/]+"}
    ),
    _brats("brats", (f"{{grade}}/{_FLAT}", _FLAT), _OLD_SUFFIXES, _OLD_CODES, "_"),
    _brats(
        "brats2024",
        (_DASHED,),
        _NEW_SUFFIXES,
        _NEW_CODES,
        "-",
        case="{patient}-{visit}",
        # Scans after treatment are numbered from 100; before it, from 000.
        patterns={"patient": r"(?!BraTS-PED)[^/]+", "visit": r"\d{3}"},
        ignored=(4,),
    ),
    _brats(
        "brats2023",
        (_DASHED,),
        _NEW_SUFFIXES,
        _NEW_CODES,
        "-",
        case="{patient}-{visit}",
        patterns={"patient": r"(?!BraTS-PED)[^/]+", "visit": r"\d{3}"},
    ),
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


def find_cases(
    root: Path | str, task: Task, layout: str | Path | Layout | None = None
) -> list[Case]:
    """The cases under a folder, sorted by name.

    Args:
        root: the cohort's folder, or one that contains it, or the folder of one case.
        task: which modalities and labels are wanted.
        layout: name of a preset, a YAML file (see :func:`load_layout`), a layout, or ``None`` to
            recognise it by looking.

    Raises:
        InputError: the folder is missing or unreadable, no layout fits, or the layout lacks a
            modality or label of the task.
    """
    return search(root, task, layout).cases


def search(root: Path | str, task: Task, layout: str | Path | Layout | None = None) -> Found:
    """:func:`find_cases`, together with the NIfTI files that belong to no case."""
    tree = Tree.of(root)
    if layout is None:
        return _recognise(tree, task)
    chosen = layout if isinstance(layout, Layout) else load_layout(layout)
    found = match(tree, _for_task(chosen, tree, task))
    if not any(case.images for case in found.cases):
        raise InputError(
            f"{tree.root}: layout '{chosen.name}' finds no case among {_examples(tree)}; name "
            f"another layout ({', '.join(LAYOUTS)}, or a YAML file), or none to have it recognised."
        )
    return found


def load_layout(source: str | Path) -> Layout:
    """A preset by name, or a layout from a YAML file.

    The file holds the fields of :class:`~pmixseg.data.cohorts.cases.Layout`, and may begin from a
    preset::

        base: brats2021            # optional: everything not given below is the preset's
        images:
          flair: "{patient}/{visit}/FLAIR.nii.gz"
          t1ce: ["{patient}/{visit}/T1_gd.nii.gz", "{patient}/{visit}/T1_post.nii.gz"]
          t2: {file: "{patient}/{visit}/all.nii.gz", channel: 2}
        label: "{patient}/{visit}/mask.nii.gz"
        case: "{patient}_{visit}"
        codes: {NCR: 1, ED: 2, ET: 3}
        ignored: [4]

    Raises:
        InputError: no such preset or file, or a file that does not say this.
    """
    if str(source) in LAYOUTS:
        return LAYOUTS[str(source)]
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(
            f"layout '{source}' is not known; use one of {', '.join(LAYOUTS)}, or a YAML file."
        )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"layout file {path} cannot be read ({error}); correct it.") from error
    try:
        return _from_yaml(path, raw)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"layout file {path} does not describe a layout ({type(error).__name__}: {error}); "
            "see load_layout for its form."
        ) from error


def _from_yaml(path: Path, raw: Any) -> Layout:
    known = {f.name for f in fields(Layout)} - {"described"}
    if not isinstance(raw, dict) or set(raw) - known - {"base"}:
        odd = sorted(set(raw) - known) if isinstance(raw, dict) else type(raw).__name__
        raise InputError(f"layout file {path}: {odd} is not among {sorted(known)}; correct it.")
    given: dict[str, Any] = {"name": path.stem, **raw}
    base = given.pop("base", None)
    if "images" in given:
        given["images"] = {m: _patterns(p) for m, p in given["images"].items()}
    if "label" in given:
        label = given["label"]
        given["label"] = (label,) if isinstance(label, str) else tuple(label or ())
    if "codes" in given:
        given["codes"] = {str(k): int(v) for k, v in given["codes"].items()}
    given["ignored"] = tuple(int(v) for v in given.get("ignored", ()))
    if base is None:
        return Layout(**{"label": (), "codes": {}, **given})
    if base not in LAYOUTS:
        raise InputError(f"layout file {path}: base '{base}' is not among {list(LAYOUTS)}.")
    return replace(LAYOUTS[base], **given)


def _patterns(raw: Any) -> tuple[Pattern, ...]:
    several = raw if isinstance(raw, list) else [raw]
    return tuple(p if isinstance(p, str) else (str(p["file"]), int(p["channel"])) for p in several)


def _for_task(layout: Layout, tree: Tree, task: Task) -> Layout:
    """The layout with the task's modalities only, completed from ``dataset.json`` if it says so."""
    full = described_layout(layout, tree, task) if layout.described else layout
    lacking = [m for m in task.modalities if m not in full.images]
    if lacking:
        raise InputError(
            f"layout '{full.name}' has no pattern for {lacking} of task '{task.name}' (it has "
            f"{list(full.images)}); write a layout file, or use the layout's names in the task."
        )
    return replace(full, images={m: full.images[m] for m in task.modalities})


def _recognise(tree: Tree, task: Task) -> Found:
    best: Found | None = None
    reasons: list[str] = []
    most = 0
    for preset in _PRESETS:
        try:
            found = match(tree, _for_task(preset, tree, task))
        except InputError as error:
            reasons += (
                [str(error)] if preset.described and (tree.root / "dataset.json").exists() else []
            )
            continue
        count = sum(len(case.images) for case in found.cases)
        if count > most:
            best, most = found, count
    if best is None:
        raise InputError(
            f"{tree.root}: no known layout fits {_examples(tree)}; name one of "
            f"{', '.join(LAYOUTS)}, or write a YAML file of patterns."
            + "".join(f" ({reason})" for reason in reasons)
        )
    return replace(best, cases=[_told_by_number(case) for case in best.cases])


def _told_by_number(case: Case) -> Case:
    """Say which of the newer codings a case has.

    Names do not tell 2023 from 2024, and ignoring label 4 of a case that codes enhancing tumour as
    4 would lose the tumour without a word. Scans after treatment are numbered from 100: there 4 is
    the cavity. In others it is ignored only beside a 3, which the old coding never holds; whoever
    reads the label file sees to that.
    """
    if case.layout != "brats2024" or case.case_id.rsplit("-", 1)[-1] >= "100":
        return case
    return replace(case, layout="brats2023", doubtful=case.ignored, witness="ET")


def _examples(tree: Tree) -> str:
    if not tree.files:
        return "this folder (it holds no .nii or .nii.gz file)"
    return f"{len(tree.files)} NIfTI files such as '{tree.files[0].relative_to(tree.root)}'"
