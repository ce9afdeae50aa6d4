"""Account for the scan files of a cohort that its layout does not read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from pmixseg.data.cohorts.cases import Case, stem_of
from pmixseg.data.cohorts.matching import Cohort, Tree
from pmixseg.data.cohorts.presets import LAYOUTS
from pmixseg.data.cohorts.problems import listed
from pmixseg.data.scans.sequences import read_name
from pmixseg.errors import count_of
from pmixseg.task import Task

_LOOKED_AT = 50
"""Files that are compared with every layout, to say why none fits."""


def with_unread(cohort: Cohort, tree: Tree, task: Task, *, recognised: bool) -> Cohort:
    """Say which scan files belong to no case, and make problems of those that seem to.

    Half a cohort under other names, or a sequence under another name, would be left out without a
    word. A layout that was chosen by the user leaves out what it has no names for.
    """
    if not cohort.stray:
        return cohort
    names = listed([str(path.relative_to(tree.root)) for path in cohort.stray])
    files = count_of(len(cohort.stray), "scan file belongs", "scan files belong")
    remarks = (*cohort.remarks, f"{files} to no case: {names}.")
    if not recognised:
        return replace(cohort, remarks=remarks)
    strays = strays_of(cohort)
    cases = [_with_lost_scan(case, strays.get(case.case_id, []), task) for case in cohort.cases]
    homes = {path.parent for case in cases for path in case.files}
    lost = [path for path in cohort.stray if path.parent not in homes]
    return replace(cohort, cases=[*cases, *_lost_cases(lost, cases, tree, task)], remarks=remarks)


def strays_of(cohort: Cohort) -> dict[str, list[Path]]:
    """Map each case to files that lie beside its scans, but that its layout has no name for."""
    owners: defaultdict[Path, set[str]] = defaultdict(set)
    for case in cohort.cases:
        for path in case.files:
            owners[path.parent].add(case.case_id)
    strays: defaultdict[str, list[Path]] = defaultdict(list)
    for path in cohort.stray:
        if len(owners[path.parent]) == 1:
            strays[next(iter(owners[path.parent]))].append(path)
    return dict(strays)


def reasons(tree: Tree) -> list[str]:
    """Say why no layout fits, where files have the names of one, but their folder has not."""
    if not (tree.root / "dataset.json").exists():
        near = [*tree.root.glob("*/dataset.json"), tree.root.resolve().parent / "dataset.json"]
        if homes := [str(path.parent) for path in near if path.exists()]:
            return [f"a dataset.json lies in {listed(sorted(homes))}: name a folder that holds one"]
        if (tree.root / "imagesTr").is_dir():
            return ["layouts 'msd' and 'nnunet' need a dataset.json beside imagesTr"]
    for path in tree.files[:_LOOKED_AT]:
        if fitting := _fitting(path):
            layout, folder = fitting
            if folder == path.parent.name:
                return [f"of layout '{layout}' there are label maps and no scans"]
            return [f"layout '{layout}' would have {path.name} in a folder named '{folder}'"]
    return []


def _with_lost_scan(case: Case, strays: Sequence[Path], task: Task) -> Case:
    """Return the case, with a problem if a file beside its scans may be one that it lacks."""
    for path in strays:
        modality = read_name(stem_of(path).lower(), task.modalities).modality
        if modality is not None and modality not in case.images and case.problem is None:
            return replace(
                case,
                problem=(
                    f"case '{case.case_id}': {path} seems to be its {modality}, but has another "
                    f"name than in layout '{case.layout}'; rename it, or name the layout "
                    f"(--layout {case.layout}; in segment --{modality} FILE, or --force) to go on "
                    "without it."
                ),
            )
    return case


def _lost_cases(
    lost: Iterable[Path], cases: Sequence[Case], tree: Tree, task: Task
) -> Iterator[Case]:
    """Return folders with scans of several sequences that no case has, so that nobody uses them."""
    names = {case.case_id for case in cases}
    layouts = dict.fromkeys(case.layout for case in cases if case.layout)
    flags = " or ".join(f"--layout {name}" for name in layouts)
    # Folder -> the sequences that names in it tell.
    folders: defaultdict[Path, dict[str, Path]] = defaultdict(dict)
    for path in lost:
        modality = read_name(stem_of(path).lower(), task.modalities).modality
        if modality is not None:
            folders[path.parent].setdefault(modality, path)
    for folder, scans in sorted(folders.items()):
        if len(scans) < min(2, task.num_modalities):
            continue
        inside = folder.relative_to(tree.root)
        name = inside.as_posix() if inside.parts else tree.root.resolve().name
        name = f"{name}/" if name in names else name
        # Which layout has such names, or would have them in a folder of another name?
        first = next(iter(scans.values()))
        fitting = _fitting(first)
        why = "; rename them"
        if fitting and fitting[1] == folder.name:
            why = (
                f", but of layout '{fitting[0]}'; prepare those on their own, into the same store "
                f"(--layout {fitting[0]})"
            )
        elif fitting:
            why = f", for their folder is not named '{fitting[1]}'; rename it"
        problem = (
            f"case '{name}': {first.name} and the other scans there have no names of layout "
            f"{' or '.join(map(repr, layouts))}{why}, or go on without them ({flags})."
        )
        yield Case(name, {}, None, {}, problem=problem)


def _fitting(path: Path) -> tuple[str, str] | None:
    """Return a layout that knows a file of this name, and how its folder is called there."""
    stem = stem_of(path)
    ends = [i for i, letter in enumerate(stem) if letter in "_-"]
    folders = [path.parent.name, *(stem[:end] for end in reversed(ends))]
    for layout in LAYOUTS.values():
        for folder in folders:
            text, known = f"{folder}/{path.name}", _expressions(layout.name)
            if not layout.anchored and any(expression.fullmatch(text) for expression in known):
                return layout.name, folder
    return None


@cache
def _expressions(layout: str) -> list[re.Pattern[str]]:
    return [expression for _, _, _, expression in LAYOUTS[layout].expressions()]
