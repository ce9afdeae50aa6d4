from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
from pmixseg.data.store.prepare import prepare
from pmixseg.modules import load
from pmixseg.task import BRATS
from tests.inference.tiny_models import save, tiny_student


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return save(tiny_student(), tmp_path_factory.mktemp("weights") / "tiny.ckpt")


@pytest.fixture(scope="session")
def model(checkpoint):
    return load(checkpoint)


SPACING = 5.0


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory) -> Path:
    """Finer than elsewhere: an image is larger than a window, and is resampled to another grid."""
    root = tmp_path_factory.mktemp("phantom")
    write_cohort(root, 3, seed=3, settings=PhantomSettings(spacing=SPACING))
    return root


@pytest.fixture(scope="session")
def phantom_store(phantom_root, tmp_path_factory) -> Path:
    """Their store; the fixture of all folders would hand it on to tests of the coarser cohort."""
    out = tmp_path_factory.mktemp("finer") / "store"
    assert not prepare(find_cases(phantom_root, BRATS), out, BRATS, progress=False).failed
    return out


@pytest.fixture(scope="session")
def case(phantom_root):
    return find_cases(phantom_root, BRATS)[0]


@pytest.fixture(scope="session")
def images(case):
    return {m: nib.load(p) for m, p in case.images.items()}


@pytest.fixture(scope="session")
def cropped_root(phantom_root, tmp_path_factory) -> Path:
    """Two phantom cases of which every modality covers another part of the brain."""
    root = tmp_path_factory.mktemp("cropped")
    slabs = {"flair": (2, slice(0, 9)), "t1ce": (2, slice(-9, None)), "t2": (0, slice(0, 13))}
    for folder in sorted(p.parent for p in phantom_root.rglob("*_flair.nii.gz"))[:2]:
        for path in folder.iterdir():
            image = nib.load(path)
            data = np.array(image.dataobj)
            modality = path.name.split("_")[-1].removesuffix(".nii.gz")
            if modality in slabs:
                axis, slab = slabs[modality]
                box = [np.flatnonzero(data.any(axis=tuple({0, 1, 2} - {a}))) for a in range(3)]
                inside = range(box[axis][0], box[axis][-1] + 1)[slab]
                data[tuple(list(inside) if a == axis else slice(None) for a in range(3))] = 0
            target = root / folder.parent.name / folder.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(data, image.affine), target)
    return root
