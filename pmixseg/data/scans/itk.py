"""MetaImage and NRRD files, read by SimpleITK where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmixseg.errors import InputError

ITK_ENDINGS = (".mha", ".mhd", ".nrrd", ".nhdr")
"""Endings of the formats that are left to ITK."""


def read_itk(path: Path, where: str) -> tuple[npt.NDArray[Any], float, float, Any]:
    """Read one MetaImage or NRRD file.

    Args:
        path: the file.
        where: how messages name the case.

    Returns:
        ``[X, Y, Z]`` or ``[X, Y, Z, C]`` numbers, slope 1, intercept 0, and the affine to mm in
        RAS; ITK's own axes are LPS.

    Raises:
        InputError: SimpleITK is not installed, or cannot read the file.
    """
    try:
        import SimpleITK as itk
    except ImportError:
        raise InputError(
            f"{where}: {path} is no NIfTI file; to read {path.suffix} install the extra "
            "(pip install 'pmixseg[itk]'), or convert it."
        ) from None
    try:
        image: Any = itk.ReadImage(str(path))  # half of its methods have no types
        size = image.GetDimension()
        if size not in (3, 4):
            raise RuntimeError(f"it has {size} axes")
        vector = image.GetNumberOfComponentsPerPixel() > 1
        data = itk.GetArrayFromImage(image)
        data = np.moveaxis(data, -1, 0).T if vector else data.T
        affine = affine_of(image)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"{where}: {path} cannot be read ({reason}); convert or download it again."
        ) from error
    return data, 1.0, 0.0, affine


def affine_of(image: Any) -> np.ndarray:
    """Return the affine of an ITK image, voxels to mm in RAS; ITK's own axes are LPS."""
    size = image.GetDimension()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (size, size))[:3, :3]
    affine[:3, :3] *= image.GetSpacing()[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
