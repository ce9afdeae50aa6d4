"""Describe a case on disk, and the file name patterns of a cohort."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pmixseg.argument_checks import check_fields
from pmixseg.data.cohorts.patients import check_pattern
from pmixseg.data.scans.volumes import Coding
from pmixseg.errors import InputError, explained
from pmixseg.files import inside
from pmixseg.task import Task

ImageFile = Path | tuple[Path, int]
"""A 3-D file, or one channel of a 4-D file."""

Pattern = str | tuple[str, int]
"""Where files lie, or where 4-D files lie and which channel to take."""

_ENDING = r"(?i:\.(?:nii(?:\.gz)?|mha|nrrd))"

ENDINGS = (".nii", ".nii.gz", ".mha", ".nrrd")
"""Endings of the files that are scans or label maps."""

_LONGEST = 255
"""Bytes of the longest name that the usual file systems take."""

_GRADES = ("HGG", "LGG")


@dataclass(frozen=True)
class Case:
    """Describe one patient scan as it lies on disk; it may lack modalities and the label.

    Args:
        case_id: unique in its cohort.
        images: modality -> file, or (4-D file, channel); only what exists.
        label: the label map, or ``None``.
        codes: label name -> number in the label file.
        also: further number in the label file -> label name.
        grade: ``HGG``, ``LGG``, or ``None`` where the layout does not tell.
        patient: groups the time points of one patient.
        layout: name of the layout it was found by.
        ignored: numbers in the label file that are no label of the task and become background.
        doubtful: those of them that other cohorts give to ``witness``; see
            :class:`~pmixseg.data.scans.volumes.Coding`.
        witness: label that shows by its own number which coding a file has.
        unannotated: those ignored numbers that mark voxels which nobody annotated; a label map that
            holds one is not used.
        problem: a sentence if the case cannot be used as it lies there.
    """

    case_id: str
    images: Mapping[str, ImageFile]
    label: Path | None
    codes: Mapping[str, int]
    grade: str | None = None
    patient: str = ""
    layout: str = ""
    ignored: tuple[int, ...] = ()
    doubtful: tuple[int, ...] = ()
    witness: str = ""
    also: Mapping[int, str] = field(default_factory=dict)
    unannotated: tuple[int, ...] = ()
    problem: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def files(self) -> list[Path]:
        """The files of its scans."""
        return [file_of(source) for source in self.images.values()]

    def coding(self, task: Task) -> Coding:
        """Return what the numbers of the label file mean.

        Raises:
            InputError: the codes do not fit the task's labels.
        """
        return Coding.of(
            task,
            self.codes,
            self.ignored,
            self.doubtful,
            self.witness,
            also=self.also,
            unannotated=self.unannotated,
        )


@dataclass(frozen=True)
class Layout:
    """Describe where a cohort keeps its files and how it numbers its labels.

    A pattern is a path with named fields: ``{case}/{case}_flair.nii.gz``. A field matches within
    one folder or file name, and the same text wherever it is repeated; ``*`` matches any text
    within one name; small and capital letters are not told apart outside fields; ``.nii.gz`` also
    matches ``.nii``, ``.mha`` and ``.nrrd``. Three fields mean something: ``case``, ``patient``
    (groups visits) and ``grade`` (HGG or LGG).

    Args:
        name: how messages and metadata call it.
        images: modality -> patterns, the first that matches a file counts; a pattern with a number
            is a channel of a 4-D file.
        label: patterns of the label map.
        codes: label name -> number in the label map.
        also: further number in the label map -> label name.
        ignored: numbers in the label map that are no label of the task and become background.
        unannotated: those of them that mark voxels which nobody annotated.
        case: how the case's name is made of fields.
        patient: where no field tells the patient: a regular expression whose first group in the
            case's name does. By default, names of visits as people write them are known.
        fields: field -> regular expression that its text must match.
        anchored: patterns start at the root; otherwise they may end any path.
        described: channels, codes and labels stand in the cohort's ``dataset.json``.

    Raises:
        InputError: a pattern that lacks the fields of the case's name, or cannot be read.
    """

    name: str
    images: Mapping[str, tuple[Pattern, ...]]
    label: tuple[str, ...]
    codes: Mapping[str, int]
    ignored: tuple[int, ...] = ()
    case: str = "{case}"
    patient: str = ""
    also: Mapping[int, str] = field(default_factory=dict)
    unannotated: tuple[int, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    anchored: bool = True
    described: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.patient:
            check_pattern(self.patient, f"layout '{self.name}'")
        needed = set(_field_names(self.case))
        for text in (*self._image_paths(), *self.label):
            if not needed or not needed <= set(_field_names(text)):
                raise InputError(
                    f"layout '{self.name}': pattern '{text}' lacks a field of the case's name "
                    f"'{self.case}'; write the fields in every pattern."
                )

    def expressions(self) -> list[tuple[str, int, int | None, re.Pattern[str]]]:
        """Return compiled patterns: (role, rank among the role's patterns, channel, expression)."""
        roles: dict[str, Sequence[Pattern]] = {**self.images, "label": self.label}
        return [
            (role, rank, None if isinstance(p, str) else p[1], self._compile(p))
            for role, several in roles.items()
            for rank, p in enumerate(several)
        ]

    def _compile(self, pattern: Pattern) -> re.Pattern[str]:
        text = pattern if isinstance(pattern, str) else pattern[0]
        stem = re.sub(rf"{_ENDING}$", "", text)
        ending = _ENDING if stem != text else ""
        parts, seen = [], set[str]()
        for literal, name, _, _ in string.Formatter().parse(stem):
            plain = "[^/]*".join(re.escape(piece) for piece in literal.split("*"))
            parts.append(f"(?i:{plain})")
            if name:
                body = self.fields.get(name, "|".join(_GRADES) if name == "grade" else "[^/]+")
                parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{body})")
                seen.add(name)
        start = "" if self.anchored else r"(?s:.*/)?"
        fields = f"with the fields {dict(self.fields)}"
        wrong = f"layout '{self.name}': pattern '{text}' {fields} cannot be read"
        with explained(wrong, "correct it"):
            return re.compile(f"{start}{''.join(parts)}{ending}")

    def tells_patients(self) -> bool:
        """Return whether its patterns name the patient."""
        return bool(self.patient) or any("patient" in _field_names(t) for t in self._image_paths())

    def _image_paths(self) -> list[str]:
        patterns = [p for several in self.images.values() for p in several]
        return [p if isinstance(p, str) else p[0] for p in patterns]


def file_of(source: ImageFile) -> Path:
    """Return the file that a scan lies in, alone or as a channel."""
    return source[0] if isinstance(source, tuple) else source


def check_name(case_id: str) -> None:
    """Refuse a case whose name can name no folder of a store: with a separator, or too long."""
    inside(Path(), case_id, "case")
    if case_id.startswith(".") or len(os.fsencode(case_id)) > _LONGEST:
        raise InputError(
            f"case '{case_id}' cannot name a file or folder of a store; use a layout whose case "
            f"names do not begin with '.' and have at most {_LONGEST} bytes, or rename it."
        )


def stem_of(path: Path) -> str:
    """Name of a scan file without its ending, whatever its case."""
    return re.sub(rf"{_ENDING}$", "", path.name)


def _field_names(text: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(text) if name]
