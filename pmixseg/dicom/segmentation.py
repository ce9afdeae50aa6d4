"""Write a label map as DICOM-SEG, to be shown over the series that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
from numpy.typing import NDArray

from pmixseg.data.formats.colours import class_colours
from pmixseg.dicom.series import Series, discreet
from pmixseg.errors import InputError
from pmixseg.files import whole
from pmixseg.task import Task
from pmixseg.version import __version__

CODES: Mapping[str, tuple[str, str, str]] = {
    "NCR": ("6574001", "SCT", "Necrosis"),
    "ED": ("79654002", "SCT", "Edema"),
    "ET": ("C113842", "NCIt", "Enhancing Lesion"),
}
"""Label -> code value, scheme, meaning. Labels of other tasks get a code of this package's own."""

COPIED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber"),
)
"""Attributes of patient and study; an anonymous series leaves them empty in the object."""

NOTICE = "Research use only: not a medical device"


def write_segmentation(
    path: Path, classes: NDArray[np.integer[Any]], task: Task, series: Series, name: str
) -> Path:
    """Write a label map on the grid of a series.

    Patient and study are copied from the series, as DICOM asks: the object belongs to them. Classes
    are indices ``[x, y, z]``, 0 background, in the voxels of ``series.volume()``; ``name`` is the
    label of the content.
    """
    volume, sources = series.volume(), series.datasets()
    if classes.shape != volume.shape:
        raise InputError(
            f"the label map has {classes.shape} voxels, {series.label} {volume.shape}; segment "
            "onto the grid of that series."
        )
    present = [k for k in range(1, task.num_classes) if (classes == k).any()]
    if not present:
        raise InputError("nothing was segmented, so there is no DICOM-SEG to write.")
    numbered = np.zeros(classes.shape, np.uint8)
    for number, index in enumerate(present, 1):
        numbered[classes == index] = number
    for tag in COPIED:
        sources[0].setdefault(tag, None)
    colours = class_colours(len(task.labels))
    code = highdicom.sr.CodedConcept
    about = highdicom.AlgorithmIdentificationSequence(
        name="pmixseg", version=__version__, family=code("123110", "DCM", "Artificial Intelligence")
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=task.show(task.labels[index - 1]),
            segmented_property_category=code(
                "49755003", "SCT", "Morphologically Altered Structure"
            ),
            segmented_property_type=_code(task.labels[index - 1], task),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=about,
            display_color=highdicom.color.CIELabColor.from_string(colours[index - 1]),
        )
        for number, index in enumerate(present, 1)
    ]
    try:
        with discreet():
            made = highdicom.seg.Segmentation(
                source_images=sources,
                specific_character_set="ISO_IR 192",  # UTF-8 has the letters of all others
                pixel_array=volume.with_array(numbered),
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=segments,
                series_instance_uid=highdicom.UID(),
                series_number=series.number + 1000,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="pmixseg",
                manufacturer_model_name="pmixseg",
                software_versions=__version__,
                device_serial_number="none",
                content_description=NOTICE,
                content_label=_content_label(name),
                series_description=f"pmixseg. {NOTICE}"[:64],
            )
            with whole(path) as part:
                pydicom.dcmwrite(part, made, enforce_file_format=True)
    except InputError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        # The library quotes the header, which is the patient's.
        raise InputError(
            f"{series.label} has a header that DICOM does not allow, so no DICOM-SEG can refer to "
            f"it ({type(error).__name__}); repair the header, for one with dcmodify of DCMTK."
        ) from None
    return path


def _code(label: str, task: Task) -> Any:
    value, scheme, meaning = CODES.get(label, (label.upper()[:16], "99PMIXSEG", task.show(label)))
    return highdicom.sr.CodedConcept(value, scheme, meaning[:64])


def _content_label(name: str) -> str:
    """Return a DICOM code string: capitals, digits, spaces and underscores, 16 at most."""
    kept = "".join(c if c.isascii() and c.isalnum() else "_" for c in name.upper())
    return kept[:16] or "SEGMENTATION"
