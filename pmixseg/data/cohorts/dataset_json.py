"""Channels and label numbers from the ``dataset.json`` of MSD and nnU-Net."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pmixseg.data.cohorts.cases import Layout, Pattern
from pmixseg.data.cohorts.codings import Numbers, coding_by_names
from pmixseg.data.cohorts.matching import Tree
from pmixseg.data.scans.sequences import modality_of
from pmixseg.errors import InputError
from pmixseg.task import Task


def described_layout(
    layout: Layout, tree: Tree, task: Task, labels: Mapping[str, Any] | None = None
) -> Layout:
    """Fill in what the cohort's ``dataset.json`` says.

    The layout is the preset ``msd`` (one 4-D file per case) or ``nnunet`` (a file per channel), or
    one based on these; what it says itself of images and codes is kept. Modalities and labels of
    the task are matched by the usual spellings, nnU-Net's region labels
    (``whole tumor: [1, 2, 3]``) to the task's regions. Where spellings do not tell, ``labels``
    gives the task's label -> its name or numbers in the file.

    Raises:
        InputError: no such file, or names in it that cannot be matched.
    """
    path = tree.root / "dataset.json"
    raw = _read(path, layout.name)
    images = dict(layout.images) or _images(path, raw, layout.name, task)
    if layout.codes and not labels:
        return replace(layout, images=images)
    coding = coding_by_names(_numbers(path, raw), task, str(path), labels)
    return replace(layout, images=images, **vars(coding))


def _read(path: Path, name: str) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(
            f"layout '{name}' needs {path}, which does not exist; add it or name another layout."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(raw, Mapping):
        raise _unreadable(path, f"it holds a {type(raw).__name__}")
    return raw


def _images(
    path: Path, raw: Mapping[str, Any], name: str, task: Task
) -> dict[str, tuple[Pattern, ...]]:
    channels = _channels(path, raw)
    images: dict[str, tuple[Pattern, ...]] = {}
    for index, channel in channels.items():
        modality = modality_of(channel, task.modalities)
        if modality in images:
            raise InputError(
                f"{path}: more than one of its channels {list(channels.values())} is {modality}; "
                "write a layout file."
            )
        if modality is not None:
            images[modality] = (
                (("imagesTr/{case}.nii.gz", index),)
                if name == "msd"
                else (f"imagesTr/{{case}}_{index:04d}.nii.gz",)
            )
    if not images:
        raise InputError(
            f"{path}: none of its channels {list(channels.values())} is a modality of task "
            f"'{task.name}' {list(task.modalities)}; write a layout file."
        )
    return images


def _channels(path: Path, raw: Mapping[str, Any]) -> dict[int, str]:
    """Return number -> name, also from a list or from names with their numbers."""
    field = next((f for f in ("channel_names", "modality") if raw.get(f)), None)
    if field is None:
        raise _unreadable(path, "it has neither 'channel_names' nor 'modality'")
    named = raw[field]
    if isinstance(named, list):
        named = {str(index): name for index, name in enumerate(named)}
    channels: dict[int, str] = {}
    if isinstance(named, Mapping):
        for key, value in named.items():
            number, name = (key, value) if _whole(key) is not None else (value, key)
            index = _whole(number)
            if index is None or index < 0 or not isinstance(name, str):
                raise _unreadable(path, f"'{field}' has {key!r}: {value!r}")
            channels[index] = name
    if not channels:
        raise _unreadable(path, f"'{field}' is {named!r}")
    return channels


def _numbers(path: Path, raw: Mapping[str, Any]) -> dict[str, Numbers]:
    """Return name -> numbers; nnU-Net 1 and MSD write the reverse, nnU-Net 2 name -> number(s)."""
    labels = raw.get("labels")
    if not isinstance(labels, Mapping):
        raise _unreadable(path, f"'labels' is {labels!r}")
    numbers: dict[str, Numbers] = {}
    for key, value in labels.items():
        name, several = (value, key) if _whole(key) is not None else (key, value)
        several = several if isinstance(several, list) else [several]
        whole = [_whole(n) for n in several]
        if not isinstance(name, str) or not whole or None in whole:
            raise _unreadable(path, f"'labels' has {key!r}: {value!r}")
        numbers[name] = tuple(n for n in whole if n is not None)
    return {name: several for name, several in numbers.items() if several != (0,)}


def _whole(value: object) -> int | None:
    """Return a whole number, also where JSON has it as a text."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    try:
        return int(value)
    except ValueError:
        return None


def _unreadable(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} cannot be read as a dataset description ({why}); correct it, or write a layout "
        "file."
    )
