"""Import pydicom and highdicom, or say in one sentence how to install them."""

from pmixseg.errors import InputError

try:
    import highdicom
    import pydicom
except ImportError as error:
    raise InputError(
        "DICOM is read with pydicom and highdicom, which are not installed; "
        "pip install 'pmixseg[dicom]'."
    ) from error

__all__ = ["highdicom", "pydicom"]
