"""Import SimpleITK, or say in one sentence how to install it."""

from pmixseg.errors import InputError

try:
    import SimpleITK as sitk
except ImportError as error:
    raise InputError(
        "raw scans are registered with SimpleITK, which is not installed; "
        "pip install 'pmixseg[preprocess]'."
    ) from error

__all__ = ["sitk"]
