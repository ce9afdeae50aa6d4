"""SimpleITK, or one sentence on how to install it; and writing what it computes."""

from pathlib import Path
from typing import Any

from pmixseg.data.formats.itk import affine_of
from pmixseg.data.formats.outputs import write_volume
from pmixseg.errors import InputError

try:
    import SimpleITK as sitk
except ImportError as error:
    raise InputError(
        "raw scans are registered with SimpleITK, which is not installed; "
        "pip install 'pmixseg[preprocess]'."
    ) from error

__all__ = ["sitk", "write_image"]


def write_image(image: Any, path: Path) -> Path:
    """Write a volume as NIfTI, complete or not at all: ITK's writer is silent on a full disk.

    Raises:
        InputError: it cannot be written.
    """
    return write_volume(path, sitk.GetArrayFromImage(image).T, affine_of(image).tolist())
