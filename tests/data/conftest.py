"""Small synthetic cases, to be damaged at will."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pmixseg.data.cohorts.layouts import Case
from pmixseg.task import BRATS

LPS = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
SHAPE = (44, 40, 36)


@pytest.fixture
def volume() -> Callable[..., np.ndarray]:
    """A brain of positive int16, with holes, inside a box that differs by seed."""

    def make(seed: int = 0, shape=SHAPE) -> np.ndarray:
        random = np.random.default_rng(seed)
        data = np.zeros(shape, np.int16)
        inner = tuple(slice(1 + 4 * (seed % 4), n - 1 - 3 * (seed % 3)) for n in shape)
        data[inner] = random.integers(20, 900, data[inner].shape)
        data[inner] *= random.random(data[inner].shape) > 0.1
        return data

    return make


@pytest.fixture
def label() -> np.ndarray:
    data = np.zeros(SHAPE, np.uint8)
    data[8:20, 8:18, 6:14] = 2
    data[10:16, 10:15, 8:12] = 1
    data[12:14, 11:13, 9:11] = 4
    return data


@pytest.fixture
def save() -> Callable[..., Path]:
    def write(path: Path, data: np.ndarray, affine: np.ndarray = LPS) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data, affine), path)
        return path

    return write


@pytest.fixture
def make_case(tmp_path, volume, label, save) -> Callable[..., Case]:
    """A case in BraTS 2021 layout under ``tmp_path / 'cohort'``."""

    def make(
        name: str = "BraTS2021_00001", modalities=BRATS.modalities, labelled: bool = True
    ) -> Case:
        folder = tmp_path / "cohort" / name
        images = {
            m: save(folder / f"{name}_{m}.nii.gz", volume(BRATS.modalities.index(m)))
            for m in modalities
        }
        seg = save(folder / f"{name}_seg.nii.gz", label) if labelled else None
        return Case(name, images, seg, {"NCR": 1, "ED": 2, "ET": 4}, patient=name)

    return make


@pytest.fixture
def touch(tmp_path):
    """Empty files: recognition looks at names, not into images."""

    def make(*names: str) -> Path:
        for name in names:
            path = tmp_path / "cohort" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "cohort"

    return make
