"""Real scans, from raw NIfTI: every combination, orientation, spacing and packing."""

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.processing import resample_to_output
from tiny_models import Glance, tiny_student

from pmixseg.data.layouts import find_cases
from pmixseg.data.prepare import prepare
from pmixseg.data.store import Store
from pmixseg.evaluation.segment import SegmentSettings
from pmixseg.task import BRATS

pytestmark = pytest.mark.real

CASES = [f"BraTS2021_{number:05}" for number in (0, 2, 6, 14, 19, 24, 31)]
FEW = [("t1ce",), ("flair", "t1"), BRATS.modalities]
COARSE = SegmentSettings(overlap=0.0)
FORCED = SegmentSettings(overlap=0.0, force=True)


@pytest.fixture(scope="module")
def real_model():
    torch.manual_seed(2)
    return tiny_student(window=64, backbone=Glance())


def check_store(model, case, folder, combinations):
    assert not prepare([case], folder, BRATS, dtype="float32", progress=False).failed
    stored = Store.open(folder).read(case.case_id)
    evaluation, model.evaluation = model.evaluation, COARSE.over(model.evaluation)
    item = {
        "image": torch.from_numpy(np.array(stored.image)),
        "case_id": stored.case_id,
        "acquired": torch.tensor(stored.acquired),
        "stored": stored,
    }
    settings = SegmentSettings(overlap=0.0, dtype="float32")
    for prediction in model.predict_item(item, combinations):
        images = {m: case.images[m] for m in prediction.combination}
        found = model.segment(images, settings, codes=case.codes)
        assert np.array_equal(found.classes, prediction.labels())
        assert len(np.unique(found.classes)) > 1
        assert found.labels.shape == nib.load(case.label).shape
    model.evaluation = evaluation


def reoriented(image, axcodes):
    wanted = nib.orientations.axcodes2ornt(tuple(axcodes))
    return image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted)
    )


def check_orientations(model, case, combination, axcodes):
    images = {m: nib.load(case.images[m]) for m in combination}
    expected = model.segment(images, COARSE).to_nifti()
    for codes in axcodes:
        turned = {m: reoriented(i, codes) for m, i in images.items()}
        found = model.segment(turned, COARSE).to_nifti()
        back = reoriented(found, nib.aff2axcodes(expected.affine))
        assert np.array_equal(back.dataobj, expected.dataobj)


def check_thick_slices(model, case, combination, folder):
    """1 x 1 x 3 mm, packed and not: the result has the grid of the file that was given."""
    images = {}
    for m in combination:
        scan = nib.load(case.images[m])
        scan = nib.Nifti1Image(np.asarray(scan.dataobj, dtype=np.float32), scan.affine)
        images[m] = resample_to_output(scan, (1.0, 1.0, 3.0), order=1)
    answers = []
    for ending in (".nii", ".nii.gz"):
        paths = {m: folder / f"thick_{m}{ending}" for m in combination}
        for m, path in paths.items():
            nib.save(images[m], path)
        found = model.segment(paths, FORCED)
        assert found.classes.shape == images[combination[0]].shape
        np.testing.assert_allclose(found.affine, images[combination[0]].affine, atol=1e-4)
        answers.append(found.classes)
    assert np.array_equal(*answers)
    assert len(np.unique(answers[0])) > 1


def test_one_case_at_a_few_combinations(real_model, real_root, tmp_path):
    (case,) = find_cases(real_root / CASES[0], BRATS)
    check_store(real_model, case, tmp_path / "store", FEW[:2])
    check_orientations(real_model, case, ("t1",), ["SAR"])
    check_thick_slices(real_model, case, ("t2",), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CASES)
def test_every_combination(real_model, real_root, tmp_path, name):
    (case,) = find_cases(real_root / name, BRATS)
    check_store(real_model, case, tmp_path, BRATS.combinations())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CASES)
def test_every_orientation_spacing_and_packing(real_model, real_root, tmp_path, name):
    (case,) = find_cases(real_root / name, BRATS)
    for combination in FEW:
        check_orientations(real_model, case, combination, ["RAS", "LPS", "SAR"])
        check_thick_slices(real_model, case, combination, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_of_another_spacing_answers_in_the_grid_of_the_scan(real_root):
    model = tiny_student(window=48, spacing=(2.0, 2.0, 2.0), backbone=Glance())
    for name in CASES:
        (case,) = find_cases(real_root / name, BRATS)
        found = model.segment({"t1": case.images["t1"]})
        assert found.labels.shape == nib.load(case.label).shape
        assert len(np.unique(found.classes)) > 1
