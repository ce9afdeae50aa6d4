"""SimpleITK, or one sentence on how to install it; and its volumes from arrays, and to files."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmixseg.data.formats.itk import affine_of
from pmixseg.data.formats.outputs import PREPROCESSED, write_volume
from pmixseg.errors import explained

_HELP = "pip install 'pmixseg[preprocess]'"
with explained("raw scans are registered with SimpleITK", _HELP, ImportError):
    import SimpleITK as sitk

__all__ = ["image_of", "sitk", "write_image"]


def image_of(values: npt.NDArray[Any], affine: npt.NDArray[np.float64]) -> Any:
    """Return ``[x, y, z]`` numbers, with an affine to mm in RAS, as a volume of ITK (in LPS)."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    volume = sitk.GetImageFromArray(values.transpose(2, 1, 0))
    volume.SetSpacing(spacing.tolist())
    volume.SetOrigin(lps[:3, 3].tolist())
    volume.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return volume


def write_image(image: Any, path: Path) -> Path:
    """Write a volume as NIfTI, complete or not at all: ITK's writer is silent on a full disk."""
    voxels, affine = sitk.GetArrayFromImage(image).T, affine_of(image).tolist()
    return write_volume(path, voxels, affine, notice=PREPROCESSED)
