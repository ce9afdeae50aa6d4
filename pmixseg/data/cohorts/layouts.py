"""The layouts of public cohorts, and finding the cases of any cohort.

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
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from pmixseg.data.cohorts.cases import (
    ENDINGS,
    Case,
    Found,
    ImageFile,
    Layout,
    Pattern,
    Tree,
    match,
)
from pmixseg.data.cohorts.codings import coding_by_numbers
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

_OLD_SUFFIXES = {
    "flair": ("flair",),
    "t1ce": ("t1ce", "t1post", "t1gd", "t1c", "t1_ce", "t1_post", "t1_gd", "t1_c"),
    "t1": ("t1",),
    "t2": ("t2",),
}
_NEW_SUFFIXES = {"flair": ("t2f",), "t1ce": ("t1c",), "t1": ("t1n",), "t2": ("t2w",)}
_NOT_READ = {
    ".dcm": "DICOM: convert series to NIfTI first, with dcm2niix for one",
    ".ima": "DICOM: convert series to NIfTI first, with dcm2niix for one",
    ".mhd": "not looked for: convert it to .mha or .nii.gz",
    ".nhdr": "not looked for: convert it to .nrrd or .nii.gz",
    ".mgz": "not looked for: convert it to .nii.gz",
    ".img": "not looked for: convert it to .nii.gz",
    ".h5": "no scan, but slices of one: use the original files",
    ".npy": "an array without geometry: use the original files",
}
_LOOKED_AT = 2000

_OLD_CODES = {"NCR": 1, "ED": 2, "ET": 4}
_NEW_CODES = {"NCR": 1, "ED": 2, "ET": 3}


def _brats(
    name: str,
    stems: tuple[str, ...],
    suffixes: Mapping[str, tuple[str, ...]],
    codes: Mapping[str, int],
    joint: str,
    *,
    case: str = "{case}",
    patterns: Mapping[str, str] | None = None,
    ignored: tuple[int, ...] = (),
    also: Mapping[int, str] | None = None,
    odd_labels: tuple[str, ...] = (),
) -> Layout:
    """A layout whose every file is ``stem + joint + suffix``.

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
    _brats(
        "brats-ped",
        (_DASHED,),
        _NEW_SUFFIXES,
        {"NCR": 2, "ED": 4, "ET": 1},  # 2 non-enhancing tumour, 3 cystic component: core, not ET
        "-",
        case="{patient}-{visit}",
        patterns={"patient": r"BraTS-PED-[^/]+", "visit": r"\d{3}"},
        also={3: "NCR"},
    ),
    _brats(
        "brats-goat",
        (_FLAT,),
        _NEW_SUFFIXES,
        _NEW_CODES,
        "-",
        patterns={"case": r"BraTS-GoAT-\d+"},
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


LabelNames = Mapping[str, str | int | list[str | int]]
"""Label of a task -> its name or number(s) in a cohort."""


def find_cases(
    root: Path | str,
    task: Task,
    layout: str | Path | Layout | None = None,
    labels: LabelNames | None = None,
) -> list[Case]:
    """Return the cases under a folder, sorted by name.

    Args:
        root: the cohort's folder, or one that contains it, or the folder of one case.
        task: which modalities and labels are wanted.
        layout: name of a preset, a YAML file (see :func:`load_layout`), a layout, or ``None`` to
            recognise it by looking.
        labels: the task's label -> number(s) in the label files, or name in ``dataset.json``;
            instead of what the layout says.

    Raises:
        InputError: the folder is missing or unreadable, no layout fits, or the layout lacks a
            modality or label of the task.
    """
    return search(root, task, layout, labels).cases


def search(
    root: Path | str,
    task: Task,
    layout: str | Path | Layout | None = None,
    labels: LabelNames | None = None,
) -> Found:
    """:func:`find_cases`, together with the files that belong to no case, and remarks."""
    tree = Tree.of(root)
    if layout is None:
        return _recognise(tree, task, labels)
    chosen = layout if isinstance(layout, Layout) else load_layout(layout)
    found = match(tree, _for_task(chosen, tree, task, labels))
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
        also: {6: NCR}             # optional: further numbers of a label
        ignored: [4]
        patient: "(.+)-[0-9]+"     # optional: where no field is called patient

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
    if "also" in given:
        given["also"] = {int(k): str(v) for k, v in given["also"].items()}
    given["ignored"] = tuple(int(v) for v in given.get("ignored", ()))
    if base is None:
        return Layout(**{"label": (), "codes": {}, **given})
    if base not in LAYOUTS:
        raise InputError(f"layout file {path}: base '{base}' is not among {list(LAYOUTS)}.")
    return replace(LAYOUTS[base], **given)


def _patterns(raw: Any) -> tuple[Pattern, ...]:
    several = raw if isinstance(raw, list) else [raw]
    return tuple(p if isinstance(p, str) else (str(p["file"]), int(p["channel"])) for p in several)


def _for_task(layout: Layout, tree: Tree, task: Task, labels: LabelNames | None) -> Layout:
    """The layout with the task's modalities only, completed from ``dataset.json`` if it says so."""
    full = described_layout(layout, tree, task, labels) if layout.described else layout
    if labels and not layout.described:
        coding = coding_by_numbers(labels, task, "these labels")
        full = replace(layout, codes=coding.codes, also=coding.also, ignored=())
    lacking = [m for m in task.modalities if m not in full.images]
    if lacking:
        raise InputError(
            f"layout '{full.name}' has no pattern for {lacking} of task '{task.name}' (it has "
            f"{list(full.images)}); write a layout file, or use the layout's names in the task."
        )
    return replace(full, images={m: full.images[m] for m in task.modalities})


def _recognise(tree: Tree, task: Task, labels: LabelNames | None) -> Found:
    best: Found | None = None
    reasons: list[str] = []
    most = 0
    for preset in _PRESETS:
        try:
            found = match(tree, _for_task(preset, tree, task, labels))
        except InputError as error:
            described = (tree.root / "dataset.json").exists()
            told = preset.described if described else labels is not None
            reasons += [str(error)] if told else []
            continue
        count = sum(len(case.images) for case in found.cases)
        if count > most:
            best, most = found, count
    if best is None:
        raise InputError(
            f"{tree.root}: no known layout fits {_examples(tree)}; name one of "
            f"{', '.join(LAYOUTS)}, or write a YAML file of patterns."
            + "".join(f" ({reason})" for reason in dict.fromkeys(reasons))
        )
    if labels:
        return best
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
        return f"this folder (it holds no {', '.join(ENDINGS)} file{_others(tree.root)})"
    return f"{len(tree.files)} scan files such as '{tree.files[0].relative_to(tree.root)}'"


def _others(root: Path) -> str:
    """What else lies there that may be meant as scans."""
    for path in islice(root.rglob("*"), _LOOKED_AT):
        if path.suffix.lower() in _NOT_READ:
            return f", but {path.relative_to(root)}, which is {_NOT_READ[path.suffix.lower()]}"
    return ""
