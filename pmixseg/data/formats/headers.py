"""Check the header of a NIfTI file before its voxels are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.imageglobals import logger
from nibabel.spatialimages import HeaderDataError

MAX_BYTES = 1 << 32
"""Largest volume or series that is read, in bytes: a 4-D float32 file of 512 x 512 x 512 x 8."""

HEAD = 1024
"""Bytes at the start of a file that hold its header, in either version of NIfTI."""

SYNTHETIC = b"pmixseg phantom"
"""How ``descrip`` begins in the files of a phantom, whatever they are called."""

_FIRST_VOXEL = {1: 352, 2: 544}
"""Version -> first byte that may hold a voxel in a single file."""

_MM = {1: 1000.0, 3: 0.001}
"""Code of ``xyzt_units`` -> mm: metre and micron. Millimetre is 2; without a unit it is meant."""

_SAME_DIRECTION = 0.5
"""Cosine of the angle between an axis in the qform and in the sform below which they differ."""

_SAME_SIZE = 1.5
"""Ratio of a voxel's length in the sform to that in pixdim above which they differ; an affine
registration that is left in the sform stretches a brain by less."""


class BadHeader(ValueError):
    """A header that cannot be true; the text is a phrase that says why."""


@dataclass(frozen=True)
class Header:
    """The header of one file.

    Args:
        shape: voxels per axis, as many axes as the file has.
        dtype: of the stored numbers.
        offset: first byte of the voxels.
        slope: multiply stored numbers by this,
        inter: and add this, to get intensities.
        affine: 4 x 4, voxel index -> mm, whatever the file's unit.
        unit: mm per unit of the file.
        oriented: whether the file says how it lies (``qform_code`` or ``sform_code`` above 0).
        descrip: what the program wrote that made the file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float
    affine: npt.NDArray[np.float64]
    unit: float
    oriented: bool
    descrip: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of all voxels."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(raw: bytes) -> Header | None:
    """Decode the header at the start of a single-file NIfTI.

    The file's first :data:`HEAD` bytes are enough. Other files than single-file NIfTI give
    ``None``.

    Raises:
        BadHeader: it cannot be true.
    """
    version = 1 if raw[344:348] == b"n+1\0" else 2 if raw[4:8] == b"n+2\0" else None
    if version is None:
        return None
    kind = nib.Nifti1Header if version == 1 else nib.Nifti2Header
    try:
        # Not from a file object: that would read the extensions, too.
        with _silent():  # what is wrong is said once, in the sentence
            header = kind(raw[: kind.template_dtype.itemsize])
        start = float(header["vox_offset"])
        slope, inter = header.get_slope_inter()
        made = Header(
            shape=tuple(int(n) for n in header.get_data_shape()),
            dtype=header.get_data_dtype(),
            offset=int(start) if math.isfinite(start) else -1,
            slope=1.0 if slope is None else float(slope),
            inter=0.0 if inter is None else float(inter),
            affine=in_mm(header.get_best_affine(), unit := unit_of(header)),
            unit=unit,
            oriented=is_oriented(header),
            descrip=bytes(header["descrip"]),
        )
        check_directions(header)
    except (HeaderDataError, ValueError, OverflowError, KeyError, np.linalg.LinAlgError) as error:
        raise BadHeader(str(error).replace("\n", " ")) from error
    if not made.shape or not all(n > 0 for n in made.shape):
        raise BadHeader(f"shape {made.shape}")
    if made.offset < _FIRST_VOXEL[version] or made.offset != start:
        raise BadHeader(
            f"vox_offset {start:g}, where voxels of a single file begin at byte "
            f"{_FIRST_VOXEL[version]} or later"
        )
    return made


@contextmanager
def _silent() -> Iterator[None]:
    """Keep nibabel's log from stderr; without its handlers, Python's own would print it."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def in_mm(affine: npt.ArrayLike, unit: float) -> npt.NDArray[np.float64]:
    """Return an affine of a file as one to mm."""
    return np.diag([unit, unit, unit, 1.0]) @ np.asarray(affine, dtype=np.float64)


def unit_of(header: Any) -> float:
    """Return millimetres per unit of a nibabel header; 1 where it names none."""
    try:
        return _MM.get(int(header["xyzt_units"]) & 7, 1.0)
    except (KeyError, ValueError, IndexError, TypeError):
        return 1.0  # not NIfTI: Analyze and MGH are in mm


def check_directions(header: Any) -> None:
    """Refuse a header that says in two ways how its volume lies, or how large its voxels are.

    Programs differ in which of the two they read, so the volume is mirrored, turned or of another
    size in one of them. Places, small angles and sizes may differ, as after a registration that
    moved the sform alone.
    """
    if int(header["sform_code"]) <= 0:
        return
    told, sizes = header["pixdim"][1:4], np.linalg.norm(header.get_sform()[:3, :3], axis=0)
    less, more = np.minimum(told, sizes), np.maximum(told, sizes)
    if np.any((less > 0) & (more > _SAME_SIZE * less)):
        one, two = (" x ".join(f"{n:.4g}" for n in each) for each in (told, sizes))
        raise BadHeader(
            f"its pixdim calls its voxels {one} and its sform {two}, and programs differ in which "
            "of the two they read; correct the wrong one"
        )
    if int(header["qform_code"]) <= 0:
        return
    one, two = header.get_qform()[:3, :3], header.get_sform()[:3, :3]
    lengths = np.linalg.norm(one, axis=0) * np.linalg.norm(two, axis=0)
    if np.any((one * two).sum(0) < _SAME_DIRECTION * lengths):
        raise BadHeader(
            "its qform and sform turn the volume in different ways, so which side is left is not "
            "certain, and --force guesses none; set the code of the wrong one to 0, in a whole "
            "cohort as docs/howto/layout.md shows"
        )


def is_oriented(header: Any) -> bool:
    """Say whether a nibabel header says how its volume lies; Analyze's never does."""
    if isinstance(header, nib.AnalyzeHeader) and not isinstance(header, nib.Nifti1Header):
        return False
    try:
        return int(header["qform_code"]) > 0 or int(header["sform_code"]) > 0
    except (KeyError, ValueError, IndexError, TypeError):
        return True  # other formats always say it
