"""Find the scans of each modality in a patient's folder, and name the other files in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pmixseg.data.cohorts.cases import Case, stem_of
from pmixseg.data.cohorts.matching import Cohort, Tree
from pmixseg.data.cohorts.sequences import read_name
from pmixseg.errors import InputError
from pmixseg.task import Task

_NAMED = 4
"""So many files are named in a sentence."""


@dataclass(frozen=True)
class FolderScans:
    """What :func:`scans_in` finds.

    Args:
        images: modality -> file, in the task's order.
        notes: phrases about files that are no scan or were left out.
    """

    images: Mapping[str, Path]
    notes: tuple[str, ...] = ()


def scans_in(folder: Path, task: Task, *, force: bool = False) -> FolderScans:
    """Scans of one patient whose files are named by modality: ``T1.nii``, ``x7_T1_post.nii.gz``.

    Every NIfTI file of the folder must be accounted for: a scan that is left out, or taken for
    another sequence, changes the result without a word. See
    :mod:`pmixseg.data.cohorts.sequences` for how names are read.

    Args:
        folder: holds the files itself.
        task: whose modalities are looked for.
        force: leave out files that no modality is known for, instead of refusing the folder.

    Returns:
        No images where no file is named by a modality: then it is no such folder.

    Raises:
        InputError: a file whose modality is not known or not certain, or two files of one modality.
    """
    files: dict[str, Path] = {}
    labels: list[str] = []
    odd: dict[str, str] = {}
    for path in Tree.of(folder).files:
        name = path.relative_to(folder).as_posix()
        reading = read_name(stem_of(path).lower(), task.modalities)
        if reading.kind == "label":
            labels.append(name)
        elif path.parent != folder:
            odd[name] = "it lies in a folder of its own"
        elif reading.modality is None:
            odd[name] = reading.doubt
        elif reading.modality in files:
            raise InputError(
                f"{folder}: {files[reading.modality].name} and {name} may both be its "
                f"{reading.modality}; move one away, or give the scans one by one "
                f"({_flags([reading.modality])})."
            )
        else:
            files[reading.modality] = path
    if not files:
        return FolderScans({})
    if odd and not force:
        reasons = _listed([f"{name} ({doubt})" for name, doubt in odd.items()])
        raise InputError(
            f"{folder}: it is not certain what {reasons} {'is' if len(odd) == 1 else 'are'} to "
            f"this model, which knows {', '.join(task.modalities)}; give the scans one by one "
            f"({_flags(task.modalities)}), rename or move files, or leave these out with force "
            "(--force)."
        )
    notes = []
    if labels:
        notes.append(f"{_listed(labels)} taken for no scan, by name")
    if odd:
        notes.append(f"{_listed(list(odd))} left out because of force")
    return FolderScans({m: files[m] for m in task.modalities if m in files}, tuple(notes))


def strays_of(cohort: Cohort) -> dict[str, list[Path]]:
    """Case -> files that lie beside its scans, but that its layout has no name for."""
    owners: defaultdict[Path, set[str]] = defaultdict(set)
    for case in cohort.cases:
        for source in case.images.values():
            path = source[0] if isinstance(source, tuple) else source
            owners[path.parent].add(case.case_id)
    strays: defaultdict[str, list[Path]] = defaultdict(list)
    for path in cohort.stray:
        if len(owners[path.parent]) == 1:
            strays[next(iter(owners[path.parent]))].append(path)
    return dict(strays)


def notes_on_strays(
    case: Case, strays: Sequence[Path], task: Task, *, trusted: bool = False
) -> tuple[str, ...]:
    """Look at the files beside a case's scans that its layout has no name for.

    Args:
        case: as its layout has it.
        strays: files beside its scans.
        task: whose modalities are looked for.
        trusted: the layout was named, not guessed, or the case is wanted by force.

    Returns:
        Sentences; other common sequences and label maps are passed over.

    Raises:
        InputError: one seems to be a modality that the case would lack, and nobody said otherwise.
    """
    unread: list[str] = []
    for path in strays:
        reading = read_name(stem_of(path).lower(), task.modalities)
        if reading.kind in ("label", "foreign"):
            continue
        unread.append(path.name)
        modality = reading.modality
        if modality is not None and modality not in case.images and not trusted:
            raise InputError(
                f"case '{case.case_id}': {path} seems to be its {modality}, but has another name "
                f"than in layout '{case.layout}'; rename it, give the scans one by one "
                f"({_flags([modality])}), or leave it out with force (--force)."
            )
    if not unread:
        return ()
    return (
        f"case '{case.case_id}': {_listed(unread)} not read, for layout '{case.layout}' has no "
        "such name.",
    )


def _flags(modalities: Sequence[str]) -> str:
    return " ".join(f"--{m} FILE" for m in modalities)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
