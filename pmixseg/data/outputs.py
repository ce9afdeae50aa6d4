"""Label maps and probabilities as NIfTI files in the grid and codes of their source."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from pmixseg.errors import InputError
from pmixseg.task import Task

NOTICE = b"pmixseg: research use only"
"""Written into every output's header (80 bytes at most)."""


def write_labels(
    path: Path,
    labels: np.ndarray,
    affine: Sequence[Sequence[float]],
    codes: Mapping[str, int],
    task: Task,
) -> Path:
    """Write class indices as the source's label codes, uint8 or int16.

    Args:
        path: ends in ``.nii`` or ``.nii.gz``.
        labels: class indices in the source grid and orientation.
        affine: the source's affine, 4x4, voxels to mm.
        codes: label name -> code in the source (BraTS 2018: ET is 4).
        task: order of the classes.

    Raises:
        InputError: a label without a code, or the file cannot be written.
    """
    lacking = [name for name in task.labels if name not in codes]
    if lacking:
        raise InputError(f"{path}: no code is known for the labels {lacking}; name them in codes.")
    table = np.array([0, *(codes[name] for name in task.labels)])
    kind = np.uint8 if table.max() < 256 and table.min() >= 0 else np.int16
    return write_volume(path, table.astype(kind)[labels], affine)


def write_volume(path: Path, volume: np.ndarray, affine: Sequence[Sequence[float]]) -> Path:
    """Write an array as NIfTI, complete or not at all, with the research-use notice.

    Raises:
        InputError: the file cannot be written.
    """
    image: Any = nib.Nifti1Image(volume, np.asarray(affine, dtype=np.float64))
    image.header["descrip"] = NOTICE
    image.header.set_xyzt_units("mm")
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    suffix = ".nii.gz" if path.name.endswith(".gz") else ".nii"
    part = path.with_name(f".{path.name}.part{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, part)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(
            f"{path} cannot be written ({error}); free space or choose another folder."
        ) from error
    return path


def write_json(path: Path, facts: Mapping[str, Any]) -> Path:
    """Write primitives as JSON, complete or not at all.

    Raises:
        InputError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise InputError(
            f"{path} cannot be written ({error}); free space or choose another folder."
        ) from error
    return path
