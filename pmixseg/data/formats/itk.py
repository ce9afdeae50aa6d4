"""MetaImage and NRRD files, read by SimpleITK where it is installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmixseg.errors import InputError, explained

ITK_ENDINGS = (".mha", ".mhd", ".nrrd", ".nhdr")
"""Endings of the formats that are left to ITK."""


_TEXT = 1 << 16
"""Bytes at the start of a file that hold its header, which is text in both formats."""

_MM = {
    "mm": 1.0,
    "millimeter": 1.0,
    "cm": 10.0,
    "centimeter": 10.0,
    "m": 1000.0,
    "meter": 1000.0,
    "um": 0.001,
    "micron": 0.001,
    "micrometer": 0.001,
}
"""NRRD's space unit -> mm; ITK reads past it."""

_SAYS_HOW_IT_LIES = re.compile(
    rb"^(space|space dimension|TransformMatrix|Orientation|Rotation) *[:=]", re.MULTILINE
)


def read_itk(path: Path, where: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64], bool]:
    """Read one MetaImage or NRRD file.

    Returns:
        ``[X, Y, Z]`` or ``[X, Y, Z, C]`` numbers, the affine to mm in RAS (ITK's own axes are
        LPS), and whether the file says how it lies.

    Raises:
        InputError: SimpleITK is not installed, or cannot read the file, or its unit is unknown.
    """
    other = f"{where}: {path} is no NIfTI file, and {path.suffix} is read with SimpleITK"
    with explained(other, "pip install 'pmixseg[itk]', or convert it", ImportError):
        import SimpleITK as itk
    try:
        image: Any = itk.ReadImage(str(path))  # half of its methods have no types
        size = image.GetDimension()
        if size not in (3, 4):
            raise RuntimeError(f"it has {size} axes")
        vector = image.GetNumberOfComponentsPerPixel() > 1
        data = itk.GetArrayFromImage(image)
        data = np.moveaxis(data, -1, 0).T if vector else data.T
        with path.open("rb") as file:
            text = file.read(_TEXT)
        affine = np.diag([*[_unit(text)] * 3, 1.0]) @ affine_of(image)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"{where}: {path} cannot be read ({reason}); convert or download it again."
        ) from error
    return data, affine, _SAYS_HOW_IT_LIES.search(text) is not None


def _unit(text: bytes) -> float:
    """Return the millimetres per unit of an NRRD header; mm where it names none."""
    line = re.search(rb"^space units: *(.+)$", text, re.MULTILINE)
    names = line[1].decode("latin-1").strip() if line else '"mm"'
    units = set(re.findall(r'"([^"]*)"', names))
    if len(units) != 1 or (unit := units.pop()) not in _MM:
        raise ValueError(f"its space units are {names}")
    return _MM[unit]


def affine_of(image: Any) -> np.ndarray:
    """Return the affine of an ITK image, voxels to mm in RAS; ITK's own axes are LPS."""
    size = image.GetDimension()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (size, size))[:3, :3]
    affine[:3, :3] *= image.GetSpacing()[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
