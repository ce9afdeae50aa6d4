"""Match the numbers in label files to labels, by the usual names of labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pmixseg.errors import InputError
from pmixseg.task import Task

Numbers = tuple[int, ...]
"""The numbers of one label or region."""

_SPELLINGS = {
    "ncr": (
        "ncrnet netc net necrosis necrotic necroticcore necrotictumor necrotictumorcore "
        "nonenhancing nonenhancingtumor nonenhancingtumorcore nonenhancingcore "
        "necroticandnonenhancingtumor necroticandnonenhancingtumorcore necroticnonenhancingtumor "
        "necroticnonenhancingtumorcore necroticandnonenhancing ncrandnet necrosisandnonenhancing"
    ),
    "ed": (
        "edema oedema edematous edematoustissue peritumoral peritumoraledema peritumoraloedema "
        "peritumoraledematoustissue vasogenicedema snfh flairhyperintensity "
        "surroundingnonenhancingflairhyperintensity invadedtissue"
    ),
    "et": (
        "enhancing enhancement enhancingtumor enhancingtissue enhancingcore gdenhancing "
        "gdenhancingtumor gadoliniumenhancingtumor contrastenhancing contrastenhancingtumor "
        "activetumor"
    ),
    "wt": "whole wholetumor complete completetumor",
    "tc": "core tumorcore",
}
"""Names of the same label or region, lower case, American, letters and digits only."""

_OUTSIDE = frozenset({"rc", "resectioncavity", "cavity", "resection"})
"""Labels that are outside every region."""

_NOT_ANNOTATED = "ignore"
"""What nnU-Net calls voxels that nobody annotated."""


@dataclass(frozen=True)
class NamedCoding:
    """Numbers of label files.

    Args:
        codes: label -> its number, which results have, too.
        also: further number -> label.
        ignored: numbers that become background.
        unannotated: those of them that mark voxels which nobody annotated.
    """

    codes: Mapping[str, int]
    also: Mapping[int, str]
    ignored: Numbers
    unannotated: Numbers = ()


def coding_by_names(
    numbers: Mapping[str, Numbers], task: Task, where: str, labels: Mapping[str, Any] | None = None
) -> NamedCoding:
    """Match the labels of a cohort to those of a task.

    ``numbers`` maps the cohort's name of a label, or of a region, to its numbers; the task's are
    looked for in the usual spellings. Where ``labels`` (the task's label -> name or numbers) are
    given, spellings are not used, and what they do not name is ignored. Voxels that nobody
    annotated then become background.
    """
    if labels:
        chosen = {label: _chosen(labels, label, numbers, where) for label in task.labels}
        used = {n for several in chosen.values() for n in several}
        rest = {n for several in numbers.values() for n in several} - used - {0}
        return _coding(chosen, tuple(sorted(rest)))
    # Labels that are no part of the tumour: what nobody annotated, and cavities.
    unannotated = [name for name in numbers if _plain(name) == _NOT_ANNOTATED]
    outside = [name for name in numbers if name in unannotated or _plain(name) in _OUTSIDE]
    inside = {name: several for name, several in numbers.items() if name not in outside}
    matched = _by_labels(inside, task) or _by_regions(inside, task)
    if matched is None:
        raise InputError(
            f"{where}: its labels {list(numbers)} cannot be matched to the labels "
            f"{list(task.labels)} or regions {list(task.regions)} of task '{task.name}'; say which "
            f"is which, such as --labels {task.labels[0]}={next(iter(numbers), 'NAME')} … "
            "(data.labels in YAML), or write a layout file."
        )
    return _coding(matched, _numbers_of(outside, numbers), _numbers_of(unannotated, numbers))


def _by_labels(inside: Mapping[str, Numbers], task: Task) -> dict[str, Numbers] | None:
    """Return the numbers of each label where the cohort's labels are exactly the task's."""
    single = {_matching(name, task.labels): several for name, several in inside.items()}
    if set(single) != set(task.labels) or len(single) != len(inside):
        return None
    return {label: single[label] for label in task.labels}


def _by_regions(inside: Mapping[str, Numbers], task: Task) -> dict[str, Numbers] | None:
    """Return the numbers of each label where the cohort's labels are regions."""
    regions = {_matching(name, task.regions): set(n) for name, n in inside.items()}
    if set(regions) != set(task.regions) or len(regions) != len(inside):
        return None
    parts = {label: _part(label, regions, task) for label in task.labels}
    return parts if all(parts.values()) else None


def _numbers_of(names: Iterable[str], numbers: Mapping[str, Numbers]) -> Numbers:
    return tuple(n for name in names for n in numbers[name])


def coding_by_numbers(labels: Mapping[str, Any], task: Task, where: str) -> NamedCoding:
    """Return the coding of a cohort that has no names for its labels."""
    return _coding({label: _chosen(labels, label, {}, where) for label in task.labels}, ())


def _chosen(
    labels: Mapping[str, Any], label: str, numbers: Mapping[str, Numbers], where: str
) -> Numbers:
    known = ", ".join(f"{name} ({', '.join(map(str, n))})" for name, n in numbers.items())
    value = labels.get(label)
    several = value if isinstance(value, list | tuple) else [value]
    codes: list[int] = []
    for one in several:
        if isinstance(one, str) and one in numbers:
            codes += numbers[one]
        elif isinstance(one, int | str) and re.fullmatch(r"\d+", str(one)):
            codes.append(int(one))
        else:
            raise InputError(
                f"{where}: {'nothing' if one is None else repr(one)} is given for {label}; give a "
                "number" + (f", or one of {known}." if known else ".")
            )
    return tuple(dict.fromkeys(codes))


def _coding(
    numbers: Mapping[str, Numbers], ignored: Numbers, unannotated: Numbers = ()
) -> NamedCoding:
    also = {n: label for label, several in numbers.items() for n in several[1:]}
    codes = {label: several[0] for label, several in numbers.items()}
    return NamedCoding(codes, also, ignored, unannotated)


def _part(label: str, regions: Mapping[str | None, set[int]], task: Task) -> Numbers:
    """Return the numbers that are in all regions of a label and in no other."""
    inside = [regions[r] for r in task.regions if label in task.regions[r]]
    without = [regions[r] for r in task.regions if label not in task.regions[r]]
    return tuple(sorted(set.intersection(*inside).difference(*without))) if inside else ()


def _matching(name: str, candidates: Iterable[str]) -> str | None:
    plain = _plain(name)
    for candidate in candidates:
        own = _plain(candidate)
        if plain == own or plain in _SPELLINGS.get(own, "").split():
            return candidate
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).replace("tumour", "tumor")
