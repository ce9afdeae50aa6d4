"""Label maps and probabilities as NIfTI files in the grid and codes of their source."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike, NDArray

from pmixseg.data.formats.headers import HEAD
from pmixseg.data.formats.packed import DAMAGED, start_of
from pmixseg.errors import InputError
from pmixseg.files import whole, write_text
from pmixseg.task import Task

NOTICE = b"pmixseg: research use only"
"""Written into every output's header (80 bytes at most)."""

PREPROCESSED = NOTICE + b", preprocessed"
"""Written instead where scans and annotations were only moved: these are no results."""

_DESCRIP = slice(148, 228)
"""Where it stands there."""


def write_labels(
    path: Path,
    labels: np.ndarray,
    affine: Sequence[Sequence[float]],
    codes: Mapping[str, int],
    task: Task,
    unit: float = 1.0,
) -> Path:
    """Write class indices as the source's label codes, in the number type that holds them.

    ``codes`` is label name -> code in the source (BraTS 2018: ET is 4), ``affine`` and ``unit`` (mm
    per unit of its header) are the source's, too.
    """
    return write_volume(path, code_table(codes, task, str(path))[labels], affine, unit)


def volume_names(name: str, plain: bool = False, compress: bool = True) -> dict[str, str]:
    """Return what the volumes of a result are called; a ``plain`` label map has the name alone."""
    ends = {"seg": "" if plain else "_seg"} | {w: f"_{w}" for w in ("probabilities", "entropy")}
    return {w: f"{name}{end}.nii{'.gz' if compress else ''}" for w, end in ends.items()}


def code_table(codes: Mapping[str, int], task: Task, where: str) -> NDArray[np.integer[Any]]:
    """Return the code of every class, background 0 first, in the smallest usual type of NIfTI.

    Raises:
        InputError: a label without a code, or a code that no whole number of 32 bits is.

    Example:
        >>> from pmixseg.task import BRATS
        >>> code_table({"NCR": 1, "ED": 2, "ET": 400}, BRATS, "x.nii")
        array([  0,   1,   2, 400], dtype=int16)
    """
    lacking = [name for name in task.labels if name not in codes]
    if lacking:
        raise InputError(f"{where}: no code is known for the labels {lacking}; name them in codes.")
    numbers = [0, *(codes[name] for name in task.labels)]
    for kind in (np.uint8, np.int16, np.int32):
        limits = np.iinfo(kind)
        if all(limits.min <= n <= limits.max and n == int(n) for n in numbers):
            return np.asarray(numbers, dtype=kind)
    raise InputError(
        f"{where}: the codes {dict(codes)} must be whole numbers from {limits.min} to "
        f"{limits.max}; correct them."
    )


def nifti_image(
    volume: np.ndarray, affine: ArrayLike, unit: float = 1.0, notice: bytes = NOTICE
) -> Any:
    """Return a ``nibabel.Nifti1Image`` with the research-use notice, in scanner coordinates.

    The affine is in units of ``unit`` mm, as that of the scans it is of.
    """
    scale = np.diag([1 / unit, 1 / unit, 1 / unit, 1.0])
    image: Any = nib.Nifti1Image(volume, scale @ np.asarray(affine, dtype=np.float64))
    image.header["descrip"] = notice
    image.header.set_xyzt_units({1000.0: "meter", 0.001: "micron"}.get(unit, "mm"))
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    return image


def write_volume(
    path: Path,
    volume: np.ndarray,
    affine: Sequence[Sequence[float]],
    unit: float = 1.0,
    notice: bytes = NOTICE,
) -> Path:
    """Write an array as NIfTI, complete or not at all, with the research-use notice.

    What this package wrote earlier is replaced, and nothing else.
    """
    keep_foreign(path)
    image = nifti_image(volume, affine, unit, notice)
    with whole(path) as part:
        nib.save(image, part)
    return path


def keep_foreign(path: Path) -> None:
    """Refuse to replace a volume that is no result: a scan, or a label map that somebody drew."""
    if path.exists() and not notice_of(path).startswith(NOTICE):
        raise InputError(
            f"{path} is there already and no result of pmixseg, or was changed since, and would be "
            "replaced; choose another output folder or name, or remove it."
        )


def notice_of(path: Path) -> bytes:
    """Read what the program wrote into a volume's header that made it; nothing if damaged."""
    try:
        return start_of(path, HEAD)[_DESCRIP].rstrip(b"\0")
    except DAMAGED:
        return b""  # whatever it was, it was no result


def write_json(path: Path, facts: Mapping[str, Any]) -> Path:
    """Write primitives as JSON, complete or not at all."""
    return write_text(path, json.dumps(facts, indent=2, allow_nan=False) + "\n")
