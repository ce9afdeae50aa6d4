"""A synthetic glioma cohort: real files, invented patients.

Every case is a deformed MNI152 brain (:mod:`~pmixseg.data.phantom.anatomy`) with a tumour grown in
its white matter (:mod:`~pmixseg.data.phantom.tumour`), imaged in several contrasts
(:mod:`~pmixseg.data.phantom.contrast`), and written as NIfTI in the folders of BraTS 2018.

What it is not: it is not patient data, and no model of tumour biology or MRI physics. Regions,
contrasts and artefacts were chosen so that which sequence shows what, and by how much, resembles
published results on BraTS; a method's rank here says something about mechanisms, nothing about
patients. Never mix it with real cohorts or train a network for use on people with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from pmixseg.argument_checks import check_fields, checked
from pmixseg.data.formats.headers import SYNTHETIC
from pmixseg.data.phantom.anatomy import Deformation, Grid, stream
from pmixseg.data.phantom.contrast import CONTRASTS, Contrast, Scanner, Shared, scan
from pmixseg.data.phantom.tumour import GROWTH_GRID, displacement, grow
from pmixseg.describe import FRACTION, Range, Ranges
from pmixseg.errors import InputError, writing
from pmixseg.files import hidden_folder_near, write_text
from pmixseg.task import BRATS
from pmixseg.workers import results

LABEL_CODES = {"NCR": 1, "ED": 2, "ET": 4}
"""Codes of the label files, as in BraTS 2018."""

_GOLDEN = (5**0.5 - 1) / 2
_SETTINGS_FILE = "phantom.json"
_ABOUT = "synthetic phantom, no patient"
_VERSION = 2  # raised when the same seed and settings give other voxels


@dataclass(frozen=True)
class PhantomSettings:
    """What kind of cohort to make.

    Args:
        spacing: isotropic voxel size in mm, 1 to 6.
        shape: voxels per axis, centred on the 240×240×155 mm of a BraTS volume; default: all of it.
        modalities: sequences to make; each needs a contrast.
        contrasts: name -> contrast, for sequences besides or instead of
            :data:`~pmixseg.data.phantom.contrast.CONTRASTS`.
        scanner: noise, bias field, thick slices, private signal and dependence of modalities.
        high_grade: share of high-grade cases.
        not_enhancing: share of high-grade cases without enhancement; low-grade ones never enhance.
        multifocal: share of cases with two or three foci.
        mass_effect: how much tissue a core pushes aside: 0 none, 1 about its own volume.
        elastic: size of the elastic deformation; 0 leaves the affine one.

    Raises:
        InputError: a value out of its range, or a modality without a contrast.
    """

    ranges = Ranges(
        **dict.fromkeys(("high_grade", "not_enhancing", "multifocal", "mass_effect"), FRACTION),
        spacing=Range(1, 6),
    )

    spacing: float = 3.0
    shape: tuple[int, int, int] | None = None
    modalities: tuple[str, ...] = BRATS.modalities
    contrasts: Mapping[str, Contrast] = field(default_factory=dict)
    scanner: Scanner = field(default_factory=Scanner)
    high_grade: float = 0.9
    not_enhancing: float = 0.04
    multifocal: float = 0.15
    mass_effect: float = 1.0
    elastic: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        contrasts = {**CONTRASTS, **self.contrasts}
        unknown = [m for m in self.modalities if m not in contrasts]
        if unknown or not self.modalities or len(set(self.modalities)) < len(self.modalities):
            raise InputError(
                f"phantom: modalities {list(self.modalities)} must be different names among "
                f"{sorted(contrasts)}; correct them or give a contrast for {unknown or 'others'}."
            )
        if self.shape is not None:
            largest = self._whole_shape()
            if any(not 8 <= n <= m for n, m in zip(self.shape, largest, strict=True)):
                raise InputError(
                    f"phantom: shape {list(self.shape)} must be three numbers of voxels from 8 to "
                    f"{list(largest)} at {self.spacing:g} mm."
                )

    def _whole_shape(self) -> tuple[int, int, int]:
        in_plane = round(240 / self.spacing)
        return in_plane, in_plane, round(155 / self.spacing)

    @property
    def grid(self) -> Grid:
        """Voxels of every file of the cohort."""
        return Grid(self.shape or self._whole_shape(), self.spacing)

    def contrast(self, modality: str) -> Contrast:
        """Return the contrast that ``modality`` is imaged with."""
        return self.contrasts[modality] if modality in self.contrasts else CONTRASTS[modality]

    def to_dict(self) -> dict[str, Any]:
        """Return primitives only, for JSON."""
        used = {m: self.contrast(m) for m in self.modalities}
        raw: dict[str, Any] = json.loads(json.dumps(asdict(replace(self, contrasts=used))))
        return raw


@dataclass(frozen=True)
class PhantomCase:
    """One invented patient.

    Args:
        images: modality -> int16 ``[X, Y, Z]``, background exactly 0.
        label: uint8 ``[X, Y, Z]``, class indices: NCR 1, ED 2, ET 3.
        affine: voxel index to RAS mm; the axes run left, backwards, up, as in BraTS.
        grade: ``"HGG"`` or ``"LGG"``.
        case_id: name in the manner of BraTS 2018.
    """

    images: dict[str, NDArray[np.int16]]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]
    grade: str
    case_id: str


def case_name(index: int) -> str:
    """Return folder and file prefix of case ``index``.

    Example:
        >>> case_name(7)
        'Brats18_PHANTOM_007_1'
    """
    return f"Brats18_PHANTOM_{index:03d}_1"


@checked
def make_case(seed: int, index: int, settings: PhantomSettings | None = None) -> PhantomCase:
    """Make case ``index`` of cohort ``seed``; it depends on nothing else.

    Args:
        seed: the cohort's seed, 0 or more.
        index: number of the case, from 0.
        settings: the kind of cohort; default :class:`PhantomSettings`.

    Returns:
        Images, label and names; the same bits for the same arguments on the same machine.

    Raises:
        InputError: a negative seed or index.
    """
    settings = settings or PhantomSettings()
    if seed < 0 or index < 0:
        raise InputError(f"phantom: seed {seed} and index {index} must be 0 or more.")
    # What kind of tumour it is.
    high_grade = _turn(seed, index, "grade") < settings.high_grade
    enhancing = high_grade and _turn(seed, index, "enhancing") >= settings.not_enhancing
    multifocal = _turn(seed, index, "foci") < settings.multifocal
    foci = int(stream(seed, index, "foci").integers(2, 4)) if multifocal else 1

    # A brain of its own shape, and a tumour that grows in it and pushes it aside.
    anatomy = Deformation(seed, index, settings.elastic)
    grown = grow(
        seed,
        index,
        anatomy,
        high_grade=high_grade,
        foci=foci,
        enhancing=enhancing,
        mass_effect=settings.mass_effect,
    )
    grid, margins = _around_brain(settings.grid)
    tissues = anatomy.tissues(grid, displacement(grown.foci, grid))
    tumour = grown.on(grid)
    # Later labels win over earlier ones; nothing is labelled outside the brain.
    label = np.zeros(grid.shape, dtype=np.uint8)
    label[(tumour.oedema > 0) & (tissues.csf < 0.5)] = 2
    label[tumour.core > 0] = 1
    label[(tumour.core > 0) & (tumour.enhancement > 0)] = 3
    label[~tissues.brain] = 0
    shared = Shared(seed, index, grid, tissues, tumour, settings.modalities)
    images = {
        m: np.pad(scan(shared, m, settings.contrast(m), settings.scanner), margins)
        for m in settings.modalities
    }
    return PhantomCase(
        images=images,
        label=np.pad(label, margins),
        affine=settings.grid.affine(),
        grade="HGG" if high_grade else "LGG",
        case_id=case_name(index),
    )


def _turn(seed: int, index: int, what: str) -> float:
    """Return a number in [0, 1) that fills the interval evenly as ``index`` counts up.

    The golden-ratio sequence with a random start: already a small cohort has its share of rare
    cases, and a case does not depend on how many are made.
    """
    start = stream(seed, 0, f"turn {what}").random()
    return float((start + index * _GOLDEN) % 1)


def _around_brain(grid: Grid) -> tuple[Grid, list[tuple[int, int]]]:
    """Cut a grid to what can hold brain; return what was left out on either side, too."""
    shape, margins = [], []
    for n, lattice in zip(grid.shape, GROWTH_GRID.shape, strict=True):
        needed = int(np.ceil(lattice * GROWTH_GRID.spacing / grid.spacing))
        margin = max((n - needed) // 2, 0)
        shape.append(n - 2 * margin)
        margins.append((margin, margin))
    return Grid((shape[0], shape[1], shape[2]), grid.spacing), margins


@checked
def write_cohort(
    out: Path | str,
    cases: int,
    seed: int = 0,
    settings: PhantomSettings | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write a cohort in the layout of BraTS 2018, or complete one.

    ``HGG`` and ``LGG`` folders of ``Brats18_PHANTOM_<nnn>_1/Brats18_PHANTOM_<nnn>_1_flair.nii.gz``
    and so on, int16, label codes 1, 2, 4. A case appears under its name only when it is complete;
    complete ones are kept. ``phantom.json`` in ``out`` says how the cohort was made.

    Args:
        out: folder of the cohort; made if missing.
        cases: how many cases the cohort shall have.
        seed: the cohort's seed.
        settings: the kind of cohort; default :class:`PhantomSettings`.
        workers: processes; 0 or less works in this one.
        progress: called with (cases done, cases) as they are done.

    Returns:
        Identifiers of the cases, in order.

    Raises:
        InputError: ``cases`` below 1, ``out`` holds another phantom or anything else, the disk
            does not take the files, or a worker was killed.
    """
    settings, out = settings or PhantomSettings(), Path(out)
    if cases < 1:
        raise InputError(f"phantom: {cases} cases were asked for; ask for 1 or more.")
    make = partial(_write_case, out, seed, settings)
    with writing(out):
        _claim(out, seed, settings)
        made = results(make, range(cases), workers, where=f"phantom: {out}", preload=[__name__])
        for done, _ in enumerate(made, start=1):
            if progress:
                progress(done, cases)
    return [case_name(index) for index in range(cases)]


def _claim(out: Path, seed: int, settings: PhantomSettings) -> None:
    """Write ``phantom.json``, or see that the one that is there agrees."""
    described = {"about": _ABOUT, "version": _VERSION, "seed": seed, **settings.to_dict()}
    marker = out / _SETTINGS_FILE
    if marker.exists():
        try:
            written = json.loads(marker.read_text(encoding="utf-8"))
        except ValueError:
            written = None
        if written != described:
            raise InputError(
                f"phantom: {out} holds a cohort made with another seed or other settings "
                f"(see {marker.name}); choose another folder or delete it."
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    if any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise InputError(
            f"phantom: {out} is not empty and holds no {marker.name}; choose an empty folder."
        )
    write_text(marker, json.dumps(described, indent=1) + "\n")


def _write_case(out: Path, seed: int, settings: PhantomSettings, index: int) -> None:
    """Write one case under a hidden name, then rename its folder."""
    name = case_name(index)
    if any((out / grade / name).is_dir() for grade in ("HGG", "LGG")):
        return
    case = make_case(seed, index, settings)
    final = out / case.grade / name
    final.parent.mkdir(parents=True, exist_ok=True)
    with hidden_folder_near(out / name) as folder:
        codes = np.array([0, *LABEL_CODES.values()], dtype=np.int16)
        files = {**case.images, "seg": codes[case.label]}
        for kind, values in files.items():
            image = nib.Nifti1Image(values, case.affine)
            image.header["descrip"] = SYNTHETIC + b": synthetic, no patient"
            image.header.set_xyzt_units("mm")
            nib.save(image, folder / f"{name}_{kind}.nii.gz")
        try:
            folder.rename(final)
        except OSError:
            # Another process finished the same case, with the same content, in the meantime.
            if not final.is_dir():
                raise
