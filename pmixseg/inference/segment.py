"""Segment a case folder, a cohort, a 4-D file, or one file per modality."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pmixseg.argument_checks import checked
from pmixseg.data.cohorts.cases import stem_of
from pmixseg.data.cohorts.layouts import Case, Layout, search
from pmixseg.data.cohorts.shares import Share
from pmixseg.data.cohorts.unread import strays_of
from pmixseg.data.formats.nifti import ScanReader, Source
from pmixseg.data.scans.sequences import modality_of
from pmixseg.errors import InputError, count_of, stops_all
from pmixseg.evaluation.prediction.scans import Progress, SegmentSettings, check_scans, part_of
from pmixseg.inference.folders import notes_on_strays, scans_in
from pmixseg.inference.outputs import CaseResult, Outputs
from pmixseg.modules import SegmentationModule
from pmixseg.task import Task

UNNAMED = "scan"
"""Name of a case whose files tell none."""

UNUSED_CHANNEL = "-"
"""Stands for a channel of a 4-D file that is not read."""


@checked
def segment_files(
    module: SegmentationModule,
    images: Mapping[str, Source],
    outputs: Outputs,
    settings: SegmentSettings | None = None,
    *,
    codes: Mapping[str, int] | None = None,
    name: str | None = None,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> CaseResult:
    """Segment one patient from named files, and write the result.

    An image is a file, a (4-D file, channel) or a nibabel image. By default, codes are those of the
    layout of the files' folder, as if the folder were segmented, or else class indices, and the
    name is what the files' names have in common. Notes are added to the result's warnings.

    Raises:
        InputError: see :meth:`~pmixseg.SegmentationModule.segment`, and :meth:`Outputs.check`.
    """
    check_scans(images, f"case '{name or UNNAMED}'")
    called = name or common_name(images)
    files = [p for s in images.values() if (p := _path_of(s)) is not None]
    folder_codes = _codes_beside(module.task, files)
    outputs.check(called, files, of_cohort=folder_codes is not None)
    codes, notes = codes or folder_codes, [*notes, *_contradicted(module, images, called)]
    if called == UNNAMED and len(files) > 1:
        # Scans of two patients in one atlas space often pass every test of their voxels.
        listed = ", ".join(f"{m} {p.name}" for m, s in images.items() if (p := _path_of(s)))
        notes.append(
            f"case '{called}': neither the names nor the folders of its files agree ({listed}); "
            "make sure that they are of one patient."
        )
    return _segmented(module, images, outputs, settings, codes, called, notes, progress)


@checked
def segment_folder(
    module: SegmentationModule,
    root: str | Path,
    outputs: Outputs,
    settings: SegmentSettings | None = None,
    *,
    layout: str | Path | Layout | None = None,
    codes: Mapping[str, int] | None = None,
    share: Share | None = None,
    progress: Progress | None = None,
) -> Iterator[CaseResult]:
    """Segment every case under a folder, which may be that of one case.

    Each case is segmented from all scans that it has and the model reads, and written with the
    label codes of its layout. A case that fails is reported, and the next one is done. Where no
    layout fits, files that are named by modality are one patient's, see
    :func:`~pmixseg.inference.folders.scans_in`. A scan that is not read is named, and one that may
    be a modality of the model is refused. Codes are for where no layout fits, ``share`` for a part
    of the cases. ``progress`` is called with (windows done, windows in all), over all cases as if
    they were of equal size.

    Raises:
        InputError: no case can be found, it is not certain which file is which modality, codes
            are given beside those of a layout, or the disk is full.
    """
    force = settings is not None and settings.force
    try:
        cohort = search(root, module.task, layout, trusted=force)
    except InputError:
        if layout is not None:
            raise
        scans, phrases = scans_in(Path(root), module.task, force=force)
        if not scans or share is not None:
            raise
        cohort = None
    if cohort is None:  # not in the handler above: what fails here is no fault of the layout
        yield _named_by_modality(module, scans, phrases, outputs, settings, codes, progress)
        return
    if codes:
        raise InputError(
            f"the layout of {root} has label codes of its own; leave --codes out, or name the "
            "scans one by one."
        )
    strays = strays_of(cohort)
    cases = cohort.cases if share is None else share.of(cohort.cases, lambda case: case.case_id)
    for done, case in enumerate(cases):
        try:
            yield segment_case(
                module,
                case,
                outputs,
                settings,
                notes=notes_on_strays(case, strays.get(case.case_id, []), module.task),
                progress=part_of(progress, done, len(cases)),
            )
        except InputError as error:
            if stops_all(error):
                raise
            yield CaseResult(case.case_id, problem=str(error))


@checked
def segment_case(
    module: SegmentationModule,
    case: Case,
    outputs: Outputs,
    settings: SegmentSettings | None = None,
    *,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> CaseResult:
    """Segment one case that a layout found; scans that the model does not read are left out.

    Notes are added to the result's warnings.

    Raises:
        InputError: the case cannot be used, or has no scan that the model reads.
    """
    if case.problem is not None:
        raise InputError(case.problem)
    images = {m: f for m, f in case.images.items() if m in module.modalities}
    if not images:
        raise InputError(_of_no_use(module, case.case_id, list(case.images)))
    label = [] if case.label is None else [case.label]
    outputs.check(case.case_id, [*case.files, *label])
    codes = case.codes or None
    return _segmented(module, images, outputs, settings, codes, case.case_id, notes, progress)


def _segmented(
    module: SegmentationModule,
    images: Mapping[str, Source],
    outputs: Outputs,
    settings: SegmentSettings | None,
    codes: Mapping[str, int] | None,
    name: str,
    notes: Sequence[str],
    progress: Progress | None,
) -> CaseResult:
    """Segment checked scans, and write the result with the notes given and its own."""
    made = module.segment(images, settings, codes=codes, name=name, progress=progress)
    made = replace(made, warnings=(*notes, *outputs.of_others(made), *made.warnings))
    files = outputs.write(made, images)
    return CaseResult(name, made.combination, made.volumes, files, made.warnings, codes=made.codes)


def channels_of(path: Path, names: str | None, module: SegmentationModule) -> dict[str, Source]:
    """Return the modalities of a 4-D file, from their names in the order of its channels.

    There is no default: public data sets disagree about the order, and scans taken for each other
    give a segmentation all the same. Names are ``"flair,t1,t1ce,t2"``, or with spaces between;
    ``-`` is a channel that is not read.

    Raises:
        InputError: no such file, a name twice, none, or not one for each channel; unknown names
            are found when the scans are read.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; give a case folder, cohort, or 4-D file.")
    if not names:
        flags = ", ".join(f"--{m} {path.name}" for m in module.task.modalities[:2])
        raise InputError(
            f"{path} is a file; say which modality it is ({flags}, …), or name the channels of a "
            "4-D file with --channels."
        )
    listed = re.split(r"\s*,\s*|\s+", names.strip())
    used = [n for n in listed if n != UNUSED_CHANNEL]
    if len(set(used)) != len(used) or not used:
        raise InputError(
            f"channels '{names}' must name different modalities of "
            f"{', '.join(module.task.modalities)}, separated by commas or spaces, '-' for a "
            "channel that is not read."
        )
    channels = ScanReader(f"{path}").channels(path)
    if channels is not None and channels != len(listed):
        raise InputError(
            f"{path} has {count_of(channels, 'channel')}, but '{names}' names {len(listed)}; name "
            f"all in their order, '{UNUSED_CHANNEL}' for a channel that is not read."
        )
    if channels == 1:  # of three axes, as a rule
        return {used[0]: path}
    return {n: (path, index) for index, n in enumerate(listed) if n != UNUSED_CHANNEL}


def common_name(images: Mapping[str, Source]) -> str:
    """Name of a case from its files: without modalities at the end, or else that of their folder.

    Example:
        >>> common_name({"t1": "p3/x7_t1.nii.gz", "t1ce": "p3/x7_T1ce.nii.gz"})
        'x7'
        >>> common_name({"t1": "p3/anatomy.nii", "flair": "p3/flair.nii"})
        'p3'
    """
    stems, folders = set[str](), set[str]()
    for modality, source in images.items():
        path = _path_of(source)
        if path is not None:
            stem = stem_of(path)
            if stem.lower().endswith(modality.lower()):
                stem = stem[: -len(modality)].rstrip("_-. ")
            stems.add(stem)
            folders.add(path.resolve().parent.name)
    for names in (stems, folders):
        if len(names) == 1 and (only := names.pop()):
            return only
    return UNNAMED


def _path_of(source: Source) -> Path | None:
    path = source[0] if isinstance(source, tuple) else source
    return Path(path) if isinstance(path, str | Path) else None


def _contradicted(
    module: SegmentationModule, images: Mapping[str, Source], name: str
) -> Iterator[str]:
    """Return scans that are given as one modality, and by their names are surely another."""
    for modality, source in images.items():
        path = None if isinstance(source, tuple) else _path_of(source)
        says = None if path is None else modality_of(stem_of(path), module.task.modalities)
        if path is not None and says not in (None, modality):
            yield f"case '{name}': {path.name} is given as {modality}, but its name says {says}."


def _codes_beside(task: Task, files: Sequence[Path]) -> Mapping[str, int] | None:
    """Return the label codes of the scans' folder, where that is a case of a layout."""
    if not files:
        return None
    try:
        cases = search(files[0].parent, task).cases
    except (InputError, OSError):
        return None
    sources = {path.resolve() for path in files}
    for case in cases:
        if sources <= {path.resolve() for path in case.files}:
            return case.codes or None
    return None


def _named_by_modality(
    module: SegmentationModule,
    scans: Mapping[str, Path],
    phrases: Sequence[str],
    outputs: Outputs,
    settings: SegmentSettings | None,
    codes: Mapping[str, int] | None,
    progress: Progress | None,
) -> CaseResult:
    name = common_name(scans)
    images = {m: path for m, path in scans.items() if m in module.modalities}
    if not images:
        return CaseResult(name, problem=_of_no_use(module, name, list(scans)))
    used = codes or {label: i + 1 for i, label in enumerate(module.task.labels)}
    numbers = ", ".join(f"{label} {number}" for label, number in used.items())
    scans_named = ", ".join(f"{m} {path.name}" for m, path in images.items())
    notes = [
        f"case '{name}': no layout fits this folder, so its scans were recognised by their names "
        f"({scans_named}) and the labels are numbered {numbers}.",
        *(f"case '{name}': {phrase}." for phrase in phrases),
    ]
    useless = [path.name for m, path in scans.items() if m not in images]
    if useless:
        notes.append(f"case '{name}': this model does not read {', '.join(useless)}.")
    try:
        return segment_files(
            module,
            images,
            outputs,
            settings,
            codes=codes,
            name=name,
            notes=notes,
            progress=progress,
        )
    except InputError as error:
        return CaseResult(name, problem=str(error))


def _of_no_use(module: SegmentationModule, name: str, modalities: Sequence[str]) -> str:
    return (
        f"case '{name}' has {', '.join(modalities)}, but this model reads "
        f"{', '.join(module.modalities)}; use a model for these scans."
    )
