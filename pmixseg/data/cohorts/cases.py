"""Cases, and the patterns that find them in a tree of files."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pmixseg.data.cohorts.patients import check_pattern, patient_of, remark_on_patients
from pmixseg.data.cohorts.problems import listed
from pmixseg.data.scans.volumes import Coding
from pmixseg.errors import InputError
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

_MAX_DEPTH = 8
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
    problem: str | None = None

    def coding(self, task: Task) -> Coding:
        """What the numbers of the label file mean.

        Raises:
            InputError: the codes do not fit the task's labels.
        """
        return Coding.of(
            task, self.codes, self.ignored, self.doubtful, self.witness, also=self.also
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
    fields: Mapping[str, str] = field(default_factory=dict)
    anchored: bool = True
    described: bool = False

    def __post_init__(self) -> None:
        if self.patient:
            check_pattern(self.patient, f"layout '{self.name}'")
        needed = set(_field_names(self.case))
        patterns = [p for several in self.images.values() for p in several] + [*self.label]
        for pattern in patterns:
            text = pattern if isinstance(pattern, str) else pattern[0]
            if not needed or not needed <= set(_field_names(text)):
                raise InputError(
                    f"layout '{self.name}': pattern '{text}' lacks a field of the case's name "
                    f"'{self.case}'; write the fields in every pattern."
                )

    def expressions(self) -> list[tuple[str, int, int | None, re.Pattern[str]]]:
        """Compiled patterns: (role, rank among the role's patterns, channel, expression)."""
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
        start = "" if self.anchored else r"(?:.*/)?"
        try:
            return re.compile(f"{start}{''.join(parts)}{ending}")
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                f"layout '{self.name}': pattern '{text}' with the fields {dict(self.fields)} "
                f"cannot be read ({error}); correct it."
            ) from error

    def tells_patients(self) -> bool:
        """Whether it says itself who the patient is."""
        patterns = [p for several in self.images.values() for p in several]
        texts = [p if isinstance(p, str) else p[0] for p in patterns]
        return bool(self.patient) or any("patient" in _field_names(t) for t in texts)


@dataclass(frozen=True)
class Found:
    """What a layout makes of a tree.

    Args:
        cases: sorted by name.
        stray: scan files that belong to none.
        remarks: sentences about the cohort as a whole.
    """

    cases: list[Case]
    stray: list[Path]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tree:
    """The NIfTI files under a root, and the folders that could not be read.

    Args:
        root: where it was looked.
        files: all files of :data:`ENDINGS`, sorted.
        unreadable: folder -> reason.
        hidden: folders that hold such files and were passed over for their names.
        misnamed: files whose names are no UTF-8.
    """

    root: Path
    files: list[Path]
    unreadable: Mapping[Path, str]
    hidden: tuple[Path, ...] = ()
    misnamed: tuple[Path, ...] = ()

    @classmethod
    def of(cls, root: Path | str) -> Tree:
        """Walk a folder, through links, without hidden files.

        Raises:
            InputError: the root is missing, no folder, or unreadable.
        """
        root = Path(root)
        if not root.is_dir():
            what = "is not a folder" if root.exists() else "does not exist"
            raise InputError(f"{root} {what}; name the folder that holds the cases.")
        unreadable: dict[Path, str] = {}

        def remember(error: OSError) -> None:
            unreadable[Path(error.filename)] = error.strerror or str(error)

        files: list[Path] = []
        hidden: list[Path] = []
        for folder, inner, names in os.walk(root, onerror=remember, followlinks=True):
            here = Path(folder)
            deep = len(here.relative_to(root).parts) >= _MAX_DEPTH
            dotted = [n for n in inner if _is_hidden(n)]
            hidden += [here / n for n in dotted if _holds_scans(here / n)]
            inner[:] = [] if deep else sorted(n for n in inner if n not in dotted)
            # Archives made on a Mac hold a hidden "._" twin of every file.
            files += [here / n for n in names if n.lower().endswith(ENDINGS) and not _is_hidden(n)]
        if root in unreadable:
            raise InputError(
                f"{root} cannot be read ({unreadable[root]}); check the folder's permissions."
            )
        good = [path for path in files if _is_text(path)]
        odd = [path for path in files if not _is_text(path)]
        return cls(root, sorted(good), unreadable, tuple(sorted(hidden)), tuple(sorted(odd)))

    def remarks(self) -> Iterator[str]:
        """Sentences about what was not looked into."""
        if self.hidden:
            yield (
                f"{len(self.hidden)} folders with scans were passed over, for their names begin "
                f"with '.': {listed([shown(p.relative_to(self.root)) for p in self.hidden])}."
            )


def shown(path: Path) -> str:
    """A path as text that can be printed, also where its bytes are no UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _is_hidden(name: str) -> bool:
    """By its first letter; a name of dots, or one behind dots, is somebody's case."""
    return name.startswith(".") and not name.startswith("..")


def _is_text(path: Path) -> bool:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _holds_scans(folder: Path) -> bool:
    try:
        return any(n.lower().endswith(ENDINGS) for n in os.listdir(folder))  # noqa: PTH208  # fast
    except OSError:
        return False


def match(tree: Tree, layout: Layout) -> Found:
    """Sort the files of a tree into cases by a layout's patterns."""
    expressions = layout.expressions()
    slots: dict[str, dict[str, tuple[int, ImageFile]]] = {}
    facts: dict[str, dict[str, str]] = {}
    problems: dict[str, str] = {}
    stray = []
    for path, text in _texts(tree, layout):
        hits = [(r, k, c, m) for r, k, c, e in expressions if (m := e.fullmatch(text))]
        if not hits:
            stray.append(path)
        for role, rank, channel, hit in hits:
            groups = {k: v for k, v in hit.groupdict().items() if v is not None}
            case_id = layout.case.format(**groups)
            chosen = slots.setdefault(case_id, {})
            source: ImageFile = path if channel is None else (path, channel)
            before = chosen.get(role)
            if before is None or rank < before[0]:
                chosen[role] = (rank, source)
            elif before[0] == rank and before[1] != source:
                problems[case_id] = (
                    f"case '{case_id}': {_path_of(before[1])} and {path} are both its {role}; "
                    "remove or rename one."
                )
            for name, value in groups.items():
                facts.setdefault(case_id, {}).setdefault(name, value)
    cases = []
    for case_id, chosen in sorted(slots.items()):
        images = {r: chosen[r][1] for r in layout.images if r in chosen}
        if not images:
            problems.setdefault(
                case_id, f"case '{case_id}' has a label but no image; add an image or remove it."
            )
        try:
            check_name(case_id)
        except InputError as error:
            problems.setdefault(case_id, str(error))
        known = facts[case_id]
        cases.append(
            Case(
                case_id=case_id,
                images=images,
                label=_path_of(chosen["label"][1]) if "label" in chosen else None,
                codes=layout.codes,
                grade=known.get("grade"),
                patient=known.get("patient") or patient_of(case_id, layout.patient),
                layout=layout.name,
                ignored=layout.ignored,
                also=layout.also,
                problem=problems.get(case_id),
            )
        )
    for folder, reason in tree.unreadable.items():
        sentence = f"case '{folder.name}': {folder} cannot be read ({reason}); check permissions."
        cases.append(Case(folder.name, {}, None, layout.codes, problem=sentence))
    for odd, names in _by_folder(tree.misnamed).items():
        sentence = (
            f"case '{odd}': {listed(names)} are no UTF-8 (bytes that are no letters stand as "
            "\\x..), so they cannot be written down; rename them."
        )
        cases.append(Case(odd, {}, None, layout.codes, problem=sentence))
    remarks = (*tree.remarks(), *remark_on_patients(cases, layout.tells_patients()))
    return Found(cases, stray, remarks)


def _by_folder(paths: Iterable[Path]) -> dict[str, list[str]]:
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(shown(Path(path.parent.name)), []).append(shown(Path(path.name)))
    return folders


def _texts(tree: Tree, layout: Layout) -> Iterator[tuple[Path, str]]:
    """Files with the text that patterns are held against.

    A floating pattern may reach above the root, so that the folder of one case, or of one grade,
    can be a root as well.
    """
    above = tree.root.resolve()
    for path in tree.files:
        inside = path.relative_to(tree.root)
        yield path, (inside if layout.anchored else above / inside).as_posix()


def check_name(case_id: str) -> None:
    """Refuse a case whose name can name no folder of a store.

    Raises:
        InputError: it holds a separator, begins with '.', or is too long.
    """
    inside(Path(), case_id, "case")
    if case_id.startswith(".") or len(os.fsencode(case_id)) > _LONGEST:
        raise InputError(
            f"case '{case_id}' cannot name a file or folder of a store; use a layout whose case "
            f"names do not begin with '.' and have at most {_LONGEST} bytes, or rename it."
        )


def stem_of(path: Path) -> str:
    """Name of a scan file without its ending, whatever its case."""
    return re.sub(rf"{_ENDING}$", "", path.name)


def _path_of(source: ImageFile) -> Path:
    return source[0] if isinstance(source, tuple) else source


def _field_names(text: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(text) if name]
