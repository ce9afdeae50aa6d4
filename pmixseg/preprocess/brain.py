"""Extract the brain: by a mask, by a program of the user's, or by the atlas."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pmixseg.errors import InputError
from pmixseg.preprocess.atlas import Atlas, read_volume
from pmixseg.preprocess.itk import sitk, write_image
from pmixseg.preprocess.registration import resampled

PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "hd-bet": ("hd-bet", "-i", "{scan}", "-o", "{out}", "--save_bet_mask", "--no_bet_image"),
    "synthstrip": ("nipreps-synthstrip", "-i", "{scan}", "-m", "{mask}"),
}
"""Extractors that run in an environment of their own, where their command is on the PATH. Both
download their weights at first use."""

MASK_FILES = {"hd-bet": "out_bet.nii.gz", "synthstrip": "mask.nii.gz"}

VOLUME_ML = (700.0, 2500.0)
"""A brain, with its ventricles, of any adult or child of school age."""


def brain_mask(
    scan: Any, how: str | Path, atlas: Atlas, poses: tuple[Any, Any]
) -> tuple[Any, list[str]]:
    """Return the brain mask of a scan on a grid of the atlas space.

    ``how`` is ``atlas``, a name of :data:`PROGRAMS`, or a mask file that lies on the scan. The
    poses, a rigid and an affine transform, lead from the atlas to points of the scan.

    Returns:
        The mask, 0 or 1, on the grid of the atlas space; sentences about what is doubtful.

    Raises:
        InputError: no such file or program, the program failed, or the mask is no brain.
    """
    placed, fitted = poses
    if how == "atlas":
        # Atlas space -> scan, rigidly; scan -> the brain of the template, by the affine fit.
        there = sitk.CompositeTransform([fitted.GetInverse(), placed])
        mask = resampled(atlas.brain, atlas.grid, there, labels=True)
    else:
        own = _by_program(scan, str(how)) if str(how) in PROGRAMS else _mask_in(Path(how))
        mask = resampled(own, atlas.grid, placed, labels=True)
    volume = float(sitk.GetArrayViewFromImage(mask).sum()) * np.prod(mask.GetSpacing()) / 1000
    low, high = VOLUME_ML
    if volume == 0:
        raise InputError(f"the brain mask ({how}) does not meet the scan; give a mask of its grid.")
    notes = []
    if not low <= volume <= high:
        notes.append(
            f"the brain mask ({how}) has {volume:.0f} ml, a brain {low:.0f} to {high:.0f}; look at "
            "the mask that was written, and give a better one with --brain."
        )
    return mask, notes


def _by_program(scan: Any, name: str) -> Any:
    if shutil.which(PROGRAMS[name][0]) is None:
        raise InputError(
            f"--brain {name}: the command '{PROGRAMS[name][0]}' is not there; install {name} in an "
            "environment of its own and put its command on the PATH, give a mask file, or use "
            "--brain atlas."
        )
    # It reads one file and writes another.
    with tempfile.TemporaryDirectory() as folder:
        places = {what: f"{folder}/{what}.nii.gz" for what in ("scan", "out", "mask")}
        write_image(scan, Path(places["scan"]))
        command = [part.format(**places) for part in PROGRAMS[name]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        mask = Path(folder) / MASK_FILES[name]
        if done.returncode or not mask.is_file():
            last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
            raise InputError(
                f"--brain {name} failed ({last[0]}); its weights are downloaded at first use, "
                "which needs a network. Give a mask file, or use --brain atlas."
            )
        return _mask_in(mask)


def _mask_in(path: Path) -> Any:
    return sitk.Cast(read_volume(path, "the brain mask") > 0, sitk.sitkUInt8)
