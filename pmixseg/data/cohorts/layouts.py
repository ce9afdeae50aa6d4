"""Find the cases of a cohort: by a named layout, a file of patterns, or automatically."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from pmixseg.argument_checks import checked
from pmixseg.data.cohorts.cases import ENDINGS, Case, ImageFile, Layout
from pmixseg.data.cohorts.codings import coding_by_numbers
from pmixseg.data.cohorts.dataset_json import described_layout
from pmixseg.data.cohorts.matching import Cohort, Tree, match
from pmixseg.data.cohorts.presets import LAYOUTS
from pmixseg.data.cohorts.unread import reasons, with_unread
from pmixseg.data.scans.volumes import Coding
from pmixseg.errors import InputError, explained
from pmixseg.task import Task

__all__ = ["LAYOUTS", "Case", "ImageFile", "Layout", "find_cases", "load_layout", "search"]

_NOT_READ = {
    **dict.fromkeys((".dcm", ".ima"), "DICOM: segment one study, or convert it with dcm2niix"),
    ".mhd": "not looked for: convert it to .mha or .nii.gz",
    ".nhdr": "not looked for: convert it to .nrrd or .nii.gz",
    ".mgz": "not looked for: convert it to .nii.gz",
    ".img": "not looked for: convert it to .nii.gz",
    ".h5": "no scan, but slices of one: use the original files",
    **dict.fromkeys((".zip", ".tar", ".tgz", ".rar", ".7z"), "an archive: unpack it first"),
    ".npy": "an array without geometry: use the original files",
}
_LOOKED_AT = 2000

LabelNames = Mapping[str, str | int | list[str | int]]
"""Label of a task -> its name or number(s) in a cohort."""


@checked
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
    *,
    trusted: bool = False,
) -> Cohort:
    """Run :func:`find_cases`; return with it the files that belong to no case, and remarks.

    ``trusted``: a layout that is recognised may leave out scans, as one that is named.
    """
    tree = Tree.of(root)
    if layout is None:
        return with_unread(_recognise(tree, task, labels), tree, task, recognised=not trusted)
    chosen = layout if isinstance(layout, Layout) else load_layout(layout)
    cohort = match(tree, _for_task(chosen, tree, task, labels))
    if not any(case.images for case in cohort.cases):
        raise InputError(
            f"{tree.root}: layout '{chosen.name}' finds no case among {_examples(tree)}; name "
            f"another layout ({', '.join(LAYOUTS)}, or a YAML file), or none to have it recognised."
        )
    return with_unread(cohort, tree, task, recognised=False)


@checked
def load_layout(source: str | Path) -> Layout:
    """Return a preset by name, or a layout from a YAML file.

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
    with explained(f"layout file {path} cannot be read", "correct it"):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return _from_yaml(path, raw)
    except InputError as error:
        raise InputError(f"layout file {path}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"layout file {path} does not describe a layout ({type(error).__name__}: {error}); "
            "see load_layout for its form."
        ) from error


def _from_yaml(path: Path, raw: Any) -> Layout:
    keys = {f.name for f in fields(Layout)} - {"described"}
    if not isinstance(raw, dict) or set(raw) - keys - {"base"}:
        odd = sorted(set(raw) - keys) if isinstance(raw, dict) else type(raw).__name__
        raise InputError(f"{odd} is not among {sorted(keys)}; correct it.")
    arguments: dict[str, Any] = {"name": path.stem, **raw}
    base = arguments.pop("base", None)
    # YAML has one text for a list of one, and names the parts of a pattern.
    if isinstance(images := arguments.get("images"), dict):
        arguments["images"] = {m: _patterns(p) for m, p in images.items()}
    if "label" in arguments:
        label = arguments["label"]
        arguments["label"] = (label,) if isinstance(label, str) else () if label is None else label
    for numbers in ("ignored", "unannotated"):
        arguments.setdefault(numbers, ())
    if base is None:
        return Layout(**{"label": (), "codes": {}, **arguments})
    if base not in LAYOUTS:
        raise InputError(f"base '{base}' is not among {list(LAYOUTS)}.")
    return replace(LAYOUTS[base], **arguments)


def _patterns(raw: Any) -> list[Any]:
    """Return the patterns of a sequence, as a layout has them."""
    patterns: list[Any] = []
    for one in raw if isinstance(raw, list) else [raw]:
        named = isinstance(one, dict) and set(one) == {"file", "channel"}
        pattern = (one["file"], one["channel"]) if named else one
        if not isinstance(one, str) and not (named and tuple(map(type, pattern)) == (str, int)):
            raise InputError(
                f"images holds {one!r}; give PATH, {{file: PATH, channel: NUMBER}}, or a list of "
                "these for each sequence."
            )
        patterns.append(pattern)
    return patterns


def _for_task(layout: Layout, tree: Tree, task: Task, labels: LabelNames | None) -> Layout:
    """Keep the task's modalities of a layout; ``dataset.json`` completes it if it says so."""
    full = described_layout(layout, tree, task, labels) if layout.described else layout
    if labels and not layout.described:
        coding = coding_by_numbers(labels, task, "these labels")
        full = replace(layout, codes=coding.codes, also=coding.also, ignored=())
    if full.label and (labels or layout.name not in LAYOUTS):  # once, and before any case
        Coding.of(task, full.codes, full.ignored, also=full.also)
    lacking = [m for m in task.modalities if m not in full.images]
    if lacking:
        raise InputError(
            f"layout '{full.name}' has no pattern for {lacking} of task '{task.name}' (it has "
            f"{list(full.images)}); write a layout file, or use the layout's names in the task."
        )
    return replace(full, images={m: full.images[m] for m in task.modalities})


def _recognise(tree: Tree, task: Task, labels: LabelNames | None) -> Cohort:
    best: Cohort | None = None
    faults: list[str] = []
    most = 0
    if labels and not (tree.root / "dataset.json").exists():
        coding = coding_by_numbers(labels, task, "these labels")
        Coding.of(task, coding.codes, also=coding.also)  # what is wrong there is no layout's fault
    for preset in LAYOUTS.values():
        try:
            cohort = match(tree, _for_task(preset, tree, task, labels))
        except InputError as error:
            described = (tree.root / "dataset.json").exists()
            relevant = preset.described if described else labels is not None
            faults += [str(error)] if relevant else []
            continue
        count = sum(len(case.images) for case in cohort.cases)
        if count > most:
            best, most = cohort, count
    if best is None:
        raise InputError(
            f"{tree.root}: no known layout fits {_examples(tree)}; name one of "
            f"{', '.join(LAYOUTS)}, or write a YAML file of patterns."
            + "".join(f" ({reason})" for reason in dict.fromkeys([*faults, *reasons(tree)]))
        )
    if labels:
        return best
    return replace(best, cases=[_coded_by_number(case) for case in best.cases])


def _coded_by_number(case: Case) -> Case:
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
    """Say what else lies there that may be meant as scans."""
    for path in islice(root.rglob("*"), _LOOKED_AT):
        if path.suffix.lower() in _NOT_READ:
            return f", but {path.relative_to(root)}, which is {_NOT_READ[path.suffix.lower()]}"
    return ""
