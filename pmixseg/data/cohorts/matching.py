"""Sort the scan files of a folder into cases, by the patterns of a layout."""

from __future__ import annotations

import filecmp
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pmixseg.data.cohorts.cases import ENDINGS, Case, ImageFile, Layout, check_name, file_of
from pmixseg.data.cohorts.patients import patient_of
from pmixseg.data.cohorts.presets import LAYOUTS
from pmixseg.data.cohorts.problems import listed
from pmixseg.errors import InputError, count_of

_MAX_DEPTH = 8

_NUMBERED = re.compile(
    r"(.*\d.*?)[-_.](?:[A-Za-z]{0,3}\d{1,3}[A-Za-z]{0,2}|pre|post|bl|initial|recurrence)", re.I
)
"""A name with a number of its own before its last word, which may be that of a visit."""

ONE_SCAN_EACH = frozenset({"brats2020", "brats2021", "brats-goat"})
"""Layouts of cohorts that have one scan of a patient, or do not tell."""

_NAMED_FREELY = "brats"
"""The layout of names of one's own; a remark is made only if they look like visits."""


@dataclass(frozen=True)
class Cohort:
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
        """Walk a folder, through links, without hidden files."""
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
            dotted = [n for n in inner if _is_hidden(n)]
            hidden += [here / n for n in dotted if _holds_scans(here / n)]
            # What is left in ``inner`` is walked through next.
            deep = len(here.relative_to(root).parts) >= _MAX_DEPTH
            further = (n for n in inner if n not in dotted and not _leads_back(here / n))
            inner[:] = [] if deep else sorted(further)
            # Archives made on a Mac hold a hidden "._" twin of every file.
            files += [here / n for n in names if n.lower().endswith(ENDINGS) and not _is_hidden(n)]
        if root in unreadable:
            raise InputError(
                f"{root} cannot be read ({unreadable[root]}); check the folder's permissions."
            )
        files.sort()
        good = [path for path in files if _is_text(path)]
        odd = tuple(path for path in files if not _is_text(path))
        return cls(root, good, unreadable, tuple(sorted(hidden)), odd)

    def remarks(self) -> Iterator[str]:
        """Yield sentences about what was not looked into."""
        if self.hidden:
            folders = count_of(len(self.hidden), "folder")
            yield (
                f"{folders} of scans passed over, with names that begin with '.': "
                f"{listed([shown(p.relative_to(self.root)) for p in self.hidden])}."
            )


def shown(path: Path) -> str:
    """Return a path as text that can be printed, also where its bytes are no UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _leads_back(folder: Path) -> bool:
    """Say whether this is a link to a folder that holds it, where every case would occur again."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _is_hidden(name: str) -> bool:
    """Say whether a name begins with a dot, as hidden files do; ``...`` may be somebody's case."""
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


@dataclass
class _CaseFiles:
    """What was sorted into one case so far.

    ``files`` maps a role to the rank of the pattern that was met, and the file. Of ``fields``,
    which the patterns' fields stand for, the first file that has one names it.
    """

    case_id: str
    files: dict[str, tuple[int, ImageFile]] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    problem: str | None = None

    def add(self, role: str, rank: int, source: ImageFile, *, ranked: bool) -> None:
        """Take a file for a role; of two the one of lower rank stays.

        ``ranked``: the user wrote the patterns in this order; otherwise two files that differ are a
        problem, for which of them is right is not known.
        """
        if role not in self.files:
            self.files[role] = (rank, source)
            return
        before, other = self.files[role]
        if rank < before:
            self.files[role] = (rank, source)
        if other == source:
            return
        if before == rank or not (ranked or _equal(file_of(other), file_of(source))):
            self.problem = (
                f"case '{self.case_id}': {file_of(other)} and {file_of(source)} are both its "
                f"{role}; remove or rename one."
            )

    def to_case(self, layout: Layout) -> Case:
        """Make the case, with the first problem that it has."""
        case_id = self.case_id
        images = {r: self.files[r][1] for r in layout.images if r in self.files}
        problem = self.problem
        if problem is None and not images:
            problem = f"case '{case_id}' has a label but no image; add an image or remove it."
        try:
            check_name(case_id)
        except InputError as error:
            problem = problem or str(error)
        return Case(
            case_id=case_id,
            images=images,
            label=file_of(self.files["label"][1]) if "label" in self.files else None,
            codes=layout.codes,
            grade=self.fields.get("grade"),
            patient=self.fields.get("patient") or patient_of(case_id, layout.patient),
            layout=layout.name,
            ignored=layout.ignored,
            also=layout.also,
            unannotated=layout.unannotated,
            problem=problem,
        )


def match(tree: Tree, layout: Layout) -> Cohort:
    """Sort the files of a tree into cases by a layout's patterns."""
    expressions = layout.expressions()
    sorted_files: dict[str, _CaseFiles] = {}
    stray = []
    # Every file meets every pattern, for one file may have several roles.
    for path, text in _texts(tree, layout):
        hits = [(r, k, c, m) for r, k, c, e in expressions if (m := e.fullmatch(text))]
        if not hits:
            stray.append(path)
        for role, rank, channel, hit in hits:
            fields = {k: v for k, v in hit.groupdict().items() if v is not None}
            case_id = layout.case.format(**fields)
            files = sorted_files.setdefault(case_id, _CaseFiles(case_id))
            source: ImageFile = path if channel is None else (path, channel)
            files.add(role, rank, source, ranked=layout.name not in LAYOUTS)
            files.fields = {**fields, **files.fields}
    cases = [files.to_case(layout) for _, files in sorted(sorted_files.items())]
    cases += _unreadable_cases(tree, layout)
    remarks = (*tree.remarks(), *_remark_on_patients(cases, layout.tells_patients()))
    return Cohort(cases, stray, remarks)


def _unreadable_cases(tree: Tree, layout: Layout) -> Iterator[Case]:
    """Make a case with a problem of every folder or name that cannot be read."""
    for folder, reason in tree.unreadable.items():
        sentence = f"case '{folder.name}': {folder} cannot be read ({reason}); check permissions."
        yield Case(folder.name, {}, None, layout.codes, problem=sentence)
    for odd, names in _by_folder(tree.misnamed).items():
        sentence = (
            f"case '{odd}': {listed(names)} are no UTF-8 (bytes that are no letters stand as "
            "\\x..), so they cannot be written down; rename them."
        )
        yield Case(odd, {}, None, layout.codes, problem=sentence)


def _by_folder(paths: Iterable[Path]) -> dict[str, list[str]]:
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(shown(Path(path.parent.name)), []).append(shown(Path(path.name)))
    return folders


def _texts(tree: Tree, layout: Layout) -> Iterator[tuple[Path, str]]:
    """Yield files with the text that patterns are compared with.

    A floating pattern may reach above the root, so that the folder of one case, or of one grade,
    can be a root as well.
    """
    above = tree.root.resolve()
    for path in tree.files:
        inside = path.relative_to(tree.root)
        yield path, (inside if layout.anchored else above / inside).as_posix()


def _equal(one: Path, other: Path) -> bool:
    """Say whether two files have the same bytes, as a copy under another name has."""
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False  # who reads them says so


def _remark_on_patients(cases: Sequence[Case], named: bool) -> tuple[str, ...]:
    """Say where visits of one patient may be taken for patients of their own."""
    own = [c for c in cases if c.patient in ("", c.case_id) and c.layout not in ONE_SCAN_EACH]
    if named or not own:
        return ()
    # Names that differ in their last word only, as those of two visits.
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for case in own:
        if hit := _NUMBERED.fullmatch(case.case_id):
            alike[hit.group(1)].append(case.case_id)
    # Where all cases share one beginning, it is the cohort's name and no patient's.
    visits = [names for names in alike.values() if len(names) > 1]
    suspect = visits[0] if visits and len(alike) > 1 else []
    if not suspect and all(c.layout == _NAMED_FREELY for c in own):
        return ()
    such = f" {listed(suspect)} may be visits of one." if suspect else ""
    return (
        f"patients are not recognised by the names of {count_of(len(own), 'case')}: each counts as "
        "a patient of its own, and visits of one patient may come into training and test."
        f"{such} If there "
        r"are any, name the patient in a layout file (patient: '(.+)_\d+').",
    )
