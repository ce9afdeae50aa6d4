"""Preprocess one patient's raw scans: registration, atlas space, brain extraction; and back."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmixseg.argument_checks import checked
from pmixseg.data.formats.nifti import ScanReader
from pmixseg.data.formats.outputs import PREPROCESSED, keep_foreign, notice_of, write_json
from pmixseg.data.scans.plausibility import TAKEN_AS_LAS
from pmixseg.errors import InputError, writing
from pmixseg.files import hidden_folder_near, inside
from pmixseg.preprocess.atlas import mni152, read_atlas, read_volume
from pmixseg.preprocess.brain import brain_mask
from pmixseg.preprocess.itk import sitk, write_image
from pmixseg.preprocess.registration import place_in_atlas, register, resampled

CENTRES = ("t1ce", "t1", "t2", "flair")
"""Which scan the others are registered to, the first of these that exists: T1ce has, as a rule,
the smallest voxels."""


@dataclass(frozen=True)
class Preprocessed:
    """Raw scans in atlas space, and the way back.

    Args:
        name: of the case.
        scans: modality -> scan in atlas space without skull, background 0.
        mask: the brain.
        centre: modality that the others were registered to.
        sources: modality -> the scan as it came.
        transforms: modality -> transform, points of the atlas -> points of its scan.
        notes: sentences about what is doubtful.
    """

    name: str
    scans: Mapping[str, Any]
    mask: Any
    centre: str
    sources: Mapping[str, Any]
    transforms: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())

    def back(self, labels: NDArray[np.integer[Any]], modality: str) -> Any:
        """Bring labels ``[x, y, z]`` of the atlas space to the grid of an original scan.

        Each voxel has the label of the nearest voxel in atlas space.
        """
        volume = sitk.GetImageFromArray(labels.transpose(2, 1, 0).astype(np.int32))
        volume.CopyInformation(self.mask)
        inverse = self.transforms[modality].GetInverse()
        return resampled(volume, self.sources[modality], inverse, labels=True)

    def save(self, folder: Path, label: Any = None) -> dict[str, Path]:
        """Write scans, mask, transforms and a summary as ``<name>/<name>_<what>``.

        The case's folder appears when everything is in it: without a scan or its label it would be
        read as a case that lacks them. A label map in atlas space is written where there is one;
        the files are returned by modality. What an earlier run wrote is replaced, or removed where
        this one has no such scan or label; of others' files none is.
        """
        home = inside(folder, self.name, "case")
        images = {**self.scans, "brain": self.mask, **({} if label is None else {"seg": label})}
        names = {what: f"{self.name}_{what}.nii.gz" for what in images}
        for name in names.values():
            keep_foreign(inside(home, name, "case"))
        with writing(home):
            folder.mkdir(parents=True, exist_ok=True)
            with hidden_folder_near(home) as part:
                for what, image in images.items():
                    write_image(image, inside(part, names[what], "case"))
                for modality, transform in self.transforms.items():
                    made = part / f"{self.name}_{modality}.tfm"
                    sitk.WriteTransform(transform, str(made))
                    if not made.stat().st_size:  # ITK does not say so
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                facts = {
                    "case": self.name,
                    "centre": self.centre,
                    "transforms": "points of the atlas space -> points of the scan, mm, LPS (ITK)",
                    "notes": list(self.notes),
                }
                write_json(part / f"{self.name}_preprocess.json", facts)
                if home.is_dir():  # it may hold files of somebody's own
                    for file in part.iterdir():
                        file.replace(home / file.name)
                    for file in {*home.glob("*.nii.gz")} - {home / n for n in names.values()}:
                        if notice_of(file) == PREPROCESSED:
                            file.unlink()
                else:
                    part.replace(home)
        return {m: home / names[m] for m in self.scans}


@checked
def preprocess_scans(
    images: Mapping[str, str | Path],
    name: str = "scan",
    *,
    brain: str | Path = "atlas",
    atlas: str | Path | None = None,
    centre: str | None = None,
) -> Preprocessed:
    """Register one patient's raw scans, bring them to atlas space and cut out the brain.

    Every scan is registered rigidly to the centre scan, the centre scan rigidly to the atlas, and
    each is interpolated once, by both transforms together. Volumes in ml are kept: nothing is
    stretched. The brain is cut out in atlas space. Scans lie on grids of their own, with or without
    skull; ``centre`` is the one that the others are registered to. ``brain`` is ``atlas``, a mask
    file on its grid, or a program (:data:`~pmixseg.preprocess.brain.PROGRAMS`). Without an atlas of
    one's own, MNI152 on the grid of BraTS is taken.

    Raises:
        InputError: no scan, one that cannot be read, or scans that cannot be registered.
    """
    if not images:
        raise InputError(f"case '{name}' has no scan; give at least one sequence.")
    middle = centre or next(m for m in (*CENTRES, *images) if m in images)
    if middle not in images:
        raise InputError(f"case '{name}': centre {middle} is none of its {sorted(images)}.")
    space = mni152() if atlas is None else read_atlas(Path(atlas))
    sources = {m: read_volume(Path(path), f"case '{name}', {m}") for m, path in images.items()}
    to_centre = {
        m: sitk.Euler3DTransform()
        if m == middle
        else register(sources[middle], scan, f"case '{name}': {m} and {middle}")
        for m, scan in sources.items()
    }
    what = f"case '{name}': {middle} and the atlas"
    poses = place_in_atlas(space.template, space.brain, sources[middle], what)
    transforms = {m: _joined(poses[0], own) for m, own in to_centre.items()}
    heads = {m: resampled(s, space.grid, transforms[m]) for m, s in sources.items()}
    mask, notes = brain_mask(sources[middle], brain, space, poses)
    scans = {m: sitk.Mask(head, mask) for m, head in heads.items()}
    reader = ScanReader(name)
    frames = {m: reader.frame(path) for m, path in images.items()}
    if silent := [m for m, frame in frames.items() if frame and not frame.oriented]:
        notes.append(f"its scans {', '.join(silent)} {TAKEN_AS_LAS}")  # the result says how it lies
    return Preprocessed(name, scans, mask, middle, sources, transforms, tuple(notes))


def _joined(first: Any, then: Any) -> Any:
    """Return one rigid transform that applies ``first``, then ``then``."""
    a, b = (np.asarray(t.GetMatrix()).reshape(3, 3) for t in (first, then))
    joined = sitk.Euler3DTransform()
    joined.SetMatrix((b @ a).ravel().tolist(), 1e-6)
    zero = then.TransformPoint(first.TransformPoint((0.0, 0.0, 0.0)))
    joined.SetTranslation(zero)
    return joined
