"""DICOM in and out: which series is which sequence, volumes, and segmentations as DICOM-SEG.

Needs the extra ``dicom`` (pydicom, highdicom). Names, numbers and dates of patients go nowhere but
from one DICOM object to another, by :mod:`~pmixseg.dicom.segmentation`.
"""

from pmixseg.errors import explained

_HELP = "pip install 'pmixseg[dicom]'"
with explained("DICOM is read with pydicom and highdicom", _HELP, ImportError):
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
