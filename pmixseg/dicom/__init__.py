"""DICOM in and out: which series is which sequence, volumes, and segmentations as DICOM-SEG.

Needs the extra ``dicom`` (pydicom, highdicom). Names, numbers and dates of patients are read by
nothing here but :mod:`~pmixseg.dicom.segmentation`, which copies them from one DICOM object to
another.
"""

from pmixseg.errors import InputError

try:  # before the parts of this package, which import them without a word of their own
    import highdicom  # noqa: F401  # whether it is installed
    import pydicom  # noqa: F401  # same
except ImportError as error:
    raise InputError(
        "DICOM is read with pydicom and highdicom, which are not installed; "
        "pip install 'pmixseg[dicom]'."
    ) from error

from pmixseg.dicom.recognition import Recognised, recognise
from pmixseg.dicom.segmentation import write_segmentation
from pmixseg.dicom.series import Series, is_dicom_folder, read_folder

__all__ = [
    "Recognised",
    "Series",
    "is_dicom_folder",
    "read_folder",
    "recognise",
    "write_segmentation",
]
