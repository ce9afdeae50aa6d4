"""The atlas space that raw scans are brought to, and the brain of the atlas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pmixseg.data.formats.nifti import ScanReader
from pmixseg.data.phantom.anatomy import BRAIN_CENTRE, MNI_CENTRE
from pmixseg.data.scans.volumes import place_of
from pmixseg.errors import InputError
from pmixseg.preprocess.itk import image_of, sitk

SHAPE = (240, 240, 155)
"""Voxels of 1 mm of a BraTS volume."""

FIRST_VOXEL = (0.0, -239.0, 0.0)
"""Its first voxel, in mm and LPS."""


FEWEST_SLICES = 4
"""What ITK's filters need along each axis."""


@dataclass(frozen=True)
class Atlas:
    """A template and its brain.

    Args:
        template: scalar volume, T1-like, without skull.
        brain: its brain mask, 0 or 1.
        grid: voxels that scans are brought to.
    """

    template: Any
    brain: Any
    grid: Any


@lru_cache(maxsize=1)
def mni152() -> Atlas:
    """Return the MNI152 template on the grid of BraTS: 240 x 240 x 155 voxels of 1 mm, LPS.

    BraTS scans lie in the space of SRI24, which no package carries. MNI152 (nilearn) is laid so
    that its brain stands where theirs stand on average; poses then differ by a few mm and degrees,
    which is within what augmentation of a training covers.
    """
    from nilearn import datasets  # takes two seconds to import

    image = datasets.load_mni152_template(resolution=1)
    template = image_of(np.asarray(image.dataobj, np.float32), image.affine)
    # The middle of the template's brain goes to the middle of the brains of BraTS.
    here = np.array([-MNI_CENTRE[0], -MNI_CENTRE[1], MNI_CENTRE[2]])
    there = np.asarray(BRAIN_CENTRE) + FIRST_VOXEL
    template.SetOrigin((np.asarray(template.GetOrigin()) + there - here).tolist())
    return Atlas(template, sitk.Cast(template > 0, sitk.sitkUInt8), brats_grid())


def brats_grid() -> Any:
    """Return an empty volume with the voxels of BraTS."""
    grid = sitk.Image(SHAPE, sitk.sitkUInt8)
    grid.SetOrigin(FIRST_VOXEL)
    return grid


def read_atlas(path: Path) -> Atlas:
    """Read an atlas of one's own: a skull-stripped template, whose grid becomes the atlas space."""
    template = read_volume(path, "the atlas")
    brain = sitk.Cast(template != 0, sitk.sitkUInt8)
    share = float(sitk.GetArrayViewFromImage(brain).mean())
    if not 0.02 < share < 0.8:
        raise InputError(
            f"{path}: {share:.0%} of the atlas is not 0; give a template without skull whose "
            "background is 0."
        )
    return Atlas(template, brain, sitk.Image(brain) * 0)


def read_volume(path: Path, what: str) -> Any:
    """Read a scan as float32, as every command reads one."""
    scan = ScanReader(what).read(path, "scan")
    place_of(scan, None, what)
    values = scan.values().astype(np.float32)
    if min(values.shape) < FEWEST_SLICES:
        raise InputError(
            f"{what}: {path} has {min(values.shape)} slices along an axis, too few to be "
            "registered; give a volume of the head."
        )
    if not np.isfinite(values).all() or values.min() == values.max():
        raise InputError(f"{what}: {path} is constant or not finite everywhere; it shows no head.")
    return image_of(values, scan.affine)
