"""A study in DICOM: series recognised, segmented, and written back as DICOM-SEG."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np

from pmixseg.argument_checks import checked
from pmixseg.data.cohorts.cases import stem_of
from pmixseg.data.cohorts.matching import Tree
from pmixseg.data.cohorts.problems import listed
from pmixseg.data.scans.sequences import modality_of
from pmixseg.dicom import Recognised, is_dicom_folder, read_folder, recognise, write_segmentation
from pmixseg.dicom.recognition import choose, visits_apart
from pmixseg.errors import InputError, stops_all
from pmixseg.evaluation.prediction.scans import Progress, SegmentSettings
from pmixseg.files import inside
from pmixseg.inference.outputs import CaseResult, Outputs
from pmixseg.inference.raw import RawSettings, segment_raw
from pmixseg.inference.segment import segment_files
from pmixseg.modules import SegmentationModule
from pmixseg.task import Task

UNNAMED = "study"
"""Name of a case without one: a patient's name or number never becomes a file name by itself."""


def is_study(folder: Path, task: Task, out: Path, *, force: bool = False) -> bool:
    """Return whether a folder holds DICOM files, to be segmented as a study.

    Beside scans in other formats, named by sequence, only MR images count: results in DICOM lie
    there, too. What lies in ``out`` is passed over.

    Raises:
        InputError: it holds MR images and, where ``force`` does not leave them out, such scans.
    """
    files = [p for p in Tree.of(folder).files if not p.resolve().is_relative_to(out.resolve())]
    scans = [p.name for p in files if modality_of(stem_of(p), task.modalities)]
    study = is_dicom_folder(folder, "MR" if scans else "")
    if study and scans and not force:
        raise InputError(
            f"{folder} holds MR series in DICOM and {listed(scans)}; name a folder of one of both, "
            "give files by modality, or leave those out with --force."
        )
    return study


@checked
def segment_study(
    module: SegmentationModule,
    folder: str | Path,
    outputs: Outputs,
    settings: SegmentSettings | None = None,
    raw: RawSettings | None = None,
    *,
    chosen: Mapping[str, int] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
    tell: Callable[[Sequence[Recognised]], None] | None = None,
) -> CaseResult:
    """Segment one study of DICOM series; the result's ``files["dicom"]`` is the DICOM-SEG.

    Where a header allows none, the result's ``problem`` says so, and the other files are there.
    Series may be mixed in the folder. ``raw`` is ``None`` for scans that are registered and
    skull-stripped. ``chosen`` maps a modality to a series number, where headers do not tell.
    ``progress`` is called with (windows done, windows in all), ``tell`` with what every series was
    taken for, before anything is segmented.

    Raises:
        InputError: see :func:`~pmixseg.dicom.read_folder`, :func:`~pmixseg.dicom.recognise`,
            and what is said of other scans.
    """
    called = name or UNNAMED
    recognised = recognise(read_folder(Path(folder)), module.task.modalities, chosen)
    if tell is not None:
        tell(recognised)
    series = choose(recognised, module.modalities)
    with tempfile.TemporaryDirectory() as place:
        images = {m: Path(place) / f"{called}_{m}.nii.gz" for m in series}
        for modality, path in images.items():
            nib.save(series[modality].volume().to_nibabel(), path)
        given = module, images, outputs, settings
        if raw is None:
            case = segment_files(*given, name=called, progress=progress)
        else:
            case = segment_raw(*given, raw, name=called, progress=progress)
        onto = _same_grid(case.files["seg"], images)
        labels = np.asarray(nib.load(case.files["seg"]).dataobj)
    # Without --codes, results hold class indices.
    path = inside(outputs.folder, f"{called}_seg.dcm", "case")
    notes = [f"case '{called}': {apart}"] if (apart := visits_apart(series.values())) else []
    files, problem = dict(case.files), None
    if labels.any():
        try:
            files["dicom"] = write_segmentation(path, labels, module.task, series[onto], called)
        except InputError as error:
            if stops_all(error):
                raise
            problem = str(error)
    else:
        notes.append(f"case '{called}': nothing was segmented, so no DICOM-SEG was written.")
    return replace(case, files=files, problem=problem, warnings=(*notes, *case.warnings))


def _same_grid(result: Path, images: Mapping[str, Path]) -> str:
    """Return the modality on whose grid a result lies."""
    made = nib.load(result)
    for modality, path in images.items():
        scan = nib.load(path)
        if scan.shape == made.shape and np.allclose(scan.affine, made.affine, atol=1e-3):
            return modality
    raise InputError(f"{result} lies on the grid of no series; name one as the reference.")
