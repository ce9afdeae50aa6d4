"""Find the scans of each modality in a patient's folder, and name the other files in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pmixseg.data.cohorts.cases import Case, stem_of
from pmixseg.data.cohorts.matching import Tree
from pmixseg.data.cohorts.problems import listed
from pmixseg.data.scans.sequences import read_name
from pmixseg.errors import InputError
from pmixseg.task import Task


def scans_in(
    folder: Path, task: Task, *, force: bool = False
) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Find one patient's scans in files named by modality: ``T1.nii``, ``x7_T1_post.nii.gz``.

    Every NIfTI file of the folder must be accounted for: a scan that is left out, or taken for
    another sequence, changes the result without a word. See :mod:`pmixseg.data.scans.sequences` for
    how names are read. The folder holds the files itself. With ``force``, files that no modality is
    known for are left out.

    Returns:
        Modality -> file, in the task's order, none where no file is named by a modality: then it
        is no such folder. And phrases about files that are no scan or were left out.

    Raises:
        InputError: a file whose modality is not known or not certain, or two files of one modality.
    """
    # Each file is a scan, a label map, or odd.
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
        return {}, ()
    if odd and not force:
        reasons = listed([f"{name} ({doubt})" for name, doubt in odd.items()])
        raise InputError(
            f"{folder}: it is not certain what {reasons} {'is' if len(odd) == 1 else 'are'} to "
            f"this model, which knows {', '.join(task.modalities)}; give the scans one by one "
            f"({_flags(task.modalities)}), rename or move files, or leave these out with force "
            "(--force)."
        )
    # What is passed over is told.
    notes = []
    if labels:
        notes.append(f"{listed(labels)} taken for no scan, by name")
    if odd:
        notes.append(f"{listed(list(odd))} left out because of force")
    return {m: files[m] for m in task.modalities if m in files}, tuple(notes)


def notes_on_strays(case: Case, strays: Sequence[Path], task: Task) -> tuple[str, ...]:
    """Return sentences about the files beside a case's scans that its layout has no name for.

    Other common sequences and label maps are passed over.
    """
    kinds = [(path.name, read_name(stem_of(path).lower(), task.modalities).kind) for path in strays]
    unread = [name for name, kind in kinds if kind not in ("label", "foreign")]
    if not unread:
        return ()
    return (
        f"case '{case.case_id}': {listed(unread)} not read, for layout '{case.layout}' has no "
        "such name.",
    )


def _flags(modalities: Sequence[str]) -> str:
    return " ".join(f"--{m} FILE" for m in modalities)
