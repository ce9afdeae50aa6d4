"""SimpleITK, or one sentence where it is not installed."""

from pmixseg.errors import InputError

try:
    import SimpleITK as sitk
except ImportError as error:
    raise InputError(
        "raw scans are registered with SimpleITK, which is not installed; "
        "pip install 'pmixseg[preprocess]'."
    ) from error

__all__ = ["sitk"]
