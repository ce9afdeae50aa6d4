"""Channels and label codes from the ``dataset.json`` of MSD and nnU-Net."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pmixseg.data.cohorts.cases import Layout, Pattern, Tree
from pmixseg.data.cohorts.sequences import modality_of
from pmixseg.errors import InputError
from pmixseg.task import Task

_ALIASES = {
    "ncr": ("ncrnet", "netc", "net", "necrosis", "necroticcore", "nonenhancingtumor"),
    "ed": ("edema", "oedema", "peritumoraledema", "snfh"),
    "et": ("enhancing", "enhancingtumor", "activetumor"),
    "wt": ("whole", "wholetumor"),
    "tc": ("core", "tumorcore"),
}
"""Names of the same label or region, lower case, American, letters and digits only."""

_OUTSIDE = ("rc", "resectioncavity", "cavity")
"""Labels that are outside every region."""


def described_layout(layout: Layout, tree: Tree, task: Task) -> Layout:
    """Fill in what the cohort's ``dataset.json`` says.

    Args:
        layout: the preset ``msd`` (one 4-D file per case) or ``nnunet`` (a file per channel).
        tree: the cohort.
        task: whose modalities and labels the file's names are matched to, by name or common alias;
            nnU-Net's region labels (``whole tumor: [1, 2, 3]``) are matched to the task's regions.

    Raises:
        InputError: no such file, or names in it that cannot be matched.
    """
    path = tree.root / "dataset.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        channels = dict(raw.get("channel_names") or raw["modality"])
        labels = _labels(raw["labels"])
    except FileNotFoundError:
        raise InputError(
            f"layout '{layout.name}' needs {path}, which does not exist; add it or name another "
            "layout."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read as a dataset description ({type(error).__name__}: {error}); "
            "correct it."
        ) from error
    images: dict[str, tuple[Pattern, ...]] = {}
    for number, name in channels.items():
        modality = modality_of(str(name), task.modalities)
        if modality in images:
            raise InputError(
                f"{path}: more than one of its channels {list(channels.values())} is {modality}; "
                "write a layout file."
            )
        if modality is not None:
            index = int(number)
            images[modality] = (
                (("imagesTr/{case}.nii.gz", index),)
                if layout.name == "msd"
                else (f"imagesTr/{{case}}_{index:04d}.nii.gz",)
            )
    if not images:
        raise InputError(
            f"{path}: none of its channels {list(channels.values())} is a modality of task "
            f"'{task.name}' {list(task.modalities)}; write a layout file."
        )
    codes, ignored = _codes(labels, task, str(path))
    return replace(layout, images=images, codes=codes, ignored=ignored)


def _labels(raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> numbers; nnU-Net 1 and MSD write number -> name, nnU-Net 2 name -> number(s)."""
    found: dict[str, tuple[int, ...]] = {}
    for key, value in raw.items():
        if isinstance(value, str):
            found[value] = (int(key),)
        else:
            found[str(key)] = tuple(value) if isinstance(value, list) else (int(value),)
    return {n: v for n, v in found.items() if v != (0,)}


def _codes(
    labels: Mapping[str, tuple[int, ...]], task: Task, where: str
) -> tuple[dict[str, int], tuple[int, ...]]:
    outside = {n for n in labels if _plain(n) in _OUTSIDE}
    ignored = tuple(c for n in outside for c in labels[n])
    single = {_matching(n, task.labels): v for n, v in labels.items() if n not in outside}
    if set(single) == set(task.labels) and all(len(v) == 1 for v in single.values()):
        return {n: single[n][0] for n in task.labels}, ignored
    regions = {_matching(n, task.regions): set(v) for n, v in labels.items() if n not in outside}
    codes: dict[str, int] = {}
    if set(regions) == set(task.regions):
        for label in task.labels:
            inside = [regions[r] for r in task.regions if label in task.regions[r]]
            without = [regions[r] for r in task.regions if label not in task.regions[r]]
            numbers = set.intersection(*inside).difference(*without) if inside else set()
            if len(numbers) == 1:
                codes[label] = numbers.pop()
    if set(codes) != set(task.labels):
        raise InputError(
            f"{where}: its labels {list(labels)} cannot be matched to the labels "
            f"{list(task.labels)} or regions {list(task.regions)} of task '{task.name}'; write a "
            "layout file."
        )
    return codes, ignored


def _matching(name: str, wanted: Iterable[str]) -> str | None:
    plain = _plain(name)
    for candidate in wanted:
        own = _plain(candidate)
        if plain == own or plain in _ALIASES.get(own, ()):
            return candidate
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).replace("tumour", "tumor")
