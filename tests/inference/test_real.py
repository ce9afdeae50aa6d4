"""Real scans, from raw NIfTI: every combination, orientation, spacing and packing."""

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.processing import resample_to_output

from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.scans.plausibility import Verdict
from pmixseg.data.store.prepare import prepare
from pmixseg.data.store.store import Store
from pmixseg.evaluation.prediction import scans as segment
from pmixseg.evaluation.prediction.scans import SegmentSettings
from pmixseg.modules import StudentModule
from pmixseg.task import BRATS
from tests.inference.test_segment import reoriented
from tests.inference.tiny_models import Glance, tiny_student

pytestmark = pytest.mark.real

CASES = [f"BraTS2021_{number:05}" for number in (0, 2, 6, 14, 19, 24, 31)]
FEW = [("t1ce",), ("flair", "t1")]
COARSE = SegmentSettings(overlap=0.0, dtype="float32")


@pytest.fixture(scope="module")
def real_model():
    torch.manual_seed(2)
    return tiny_student(window=64, backbone=Glance())


def check_combinations(model, case, combinations, kinds, folder, monkeypatch):
    """From the raw files, from the store, and from files in other axes, packed or not.

    Voxels are identical after turning the result back.
    """
    assert not prepare([case], folder / "store", BRATS, dtype="float32", progress=False).failed
    stored = Store.open(folder / "store").read(case.case_id)
    item = {
        "image": torch.from_numpy(np.array(stored.image)),
        "case_id": stored.case_id,
        "acquired": torch.tensor(stored.acquired),
        "stored": stored,
    }
    tested = StudentModule(backbone=model.backbone, evaluation=COARSE.over(model.evaluation))
    tested.preparation = model.preparation
    files = [turned_files(case, needed(combinations), *kind, folder) for kind in kinds]
    for prediction in tested.eval().predict_item(item, combinations):
        combination = prediction.combination
        labels = in_grid_of(model, case.images, combination)
        expected = np.asarray(labels.dataobj)
        assert np.array_equal(expected, prediction.labels())
        assert len(np.unique(expected)) > 1
        with monkeypatch.context() as patch:
            # Half of the time goes into asking whether these are brains, which was just answered
            # for the same voxels.
            patch.setattr(segment, "judge", lambda case, task: Verdict(()))
            for turned in files:
                again = in_grid_of(model, turned, combination)
                back = reoriented(again, nib.aff2axcodes(labels.affine))
                assert np.array_equal(back.dataobj, expected)


def needed(combinations):
    """The modalities of some combinations."""
    return {m for combination in combinations for m in combination}


def turned_files(case, modalities, axcodes, ending, folder):
    """The case's scans written in other axes."""
    files = {}
    for m in modalities:
        image = nib.load(case.images[m])
        files[m] = folder / f"{axcodes}_{m}{ending}"
        nib.save(reoriented(image, axcodes), files[m])
    return files


def thick_files(case, modalities, folder):
    """The case's scans brought to 1 x 1 x 3 mm, packed and not."""
    plain, packed = {}, {}
    for m in modalities:
        scan = nib.load(case.images[m])
        scan = nib.Nifti1Image(np.asarray(scan.dataobj, dtype=np.float32), scan.affine)
        thick = resample_to_output(scan, (1.0, 1.0, 3.0), order=1)
        for files, ending in ((plain, ".nii"), (packed, ".nii.gz")):
            files[m] = folder / f"thick_{m}{ending}"
            nib.save(thick, files[m])
    return plain, packed


def in_grid_of(model, files, combination):
    """Segment; the result lies in the grid of the files that were given."""
    labels = model.segment({m: files[m] for m in combination}, COARSE).to_nifti()
    scan = nib.load(files[combination[0]])
    assert labels.shape == scan.shape
    np.testing.assert_allclose(labels.affine, scan.affine, atol=1e-4)
    return labels


def check_thick_slices(model, case, combinations, folder):
    """1 x 1 x 3 mm, packed and not: the same answer in the grid of the file."""
    files = thick_files(case, needed(combinations), folder)
    for combination in combinations:
        plain, packed = (in_grid_of(model, kind, combination) for kind in files)
        assert np.array_equal(plain.dataobj, packed.dataobj)
        assert len(np.unique(plain.dataobj)) > 1


def test_one_case_at_a_few_combinations(real_model, real_root, tmp_path, monkeypatch):
    (case,) = find_cases(real_root / CASES[0], BRATS)
    check_combinations(real_model, case, FEW, [("SAR", ".nii")], tmp_path, monkeypatch)
    check_thick_slices(real_model, case, [("t2",)], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
def test_every_combination_in_every_orientation_packed_or_not(
    real_model, real_root, tmp_path, name, monkeypatch
):
    (case,) = find_cases(real_root / name, BRATS)
    kinds = [("RAS", ".nii.gz"), ("LPS", ".nii"), ("SAR", ".nii.gz")]
    check_combinations(real_model, case, BRATS.combinations(), kinds, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
def test_every_combination_of_thick_slices_packed_or_not(real_model, real_root, tmp_path, name):
    (case,) = find_cases(real_root / name, BRATS)
    check_thick_slices(real_model, case, BRATS.combinations(), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_model_of_another_spacing_answers_in_the_grid_of_the_scan(real_root):
    model = tiny_student(window=48, spacing=(2.0, 2.0, 2.0), backbone=Glance())
    for name in CASES:
        (case,) = find_cases(real_root / name, BRATS)
        result = model.segment({"t1": case.images["t1"]})
        assert result.labels.shape == nib.load(case.label).shape
        assert len(np.unique(result.classes)) > 1
