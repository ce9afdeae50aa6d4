"""The published preprocessing of RFNet and mmFormer, against values worked by hand and a loop."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch

from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.scans.boxes import Box
from pmixseg.data.scans.canonical import canonicalise
from pmixseg.data.scans.normalisation import (
    JOINT_MASK,
    NORMALISATIONS,
    check_normalisation,
    normalised,
    published_crop,
)
from pmixseg.data.store.store import Store, prepare
from pmixseg.errors import InputError
from pmixseg.modules.preparation import Preparation
from pmixseg.task import BRATS
from tests.inference.tiny_models import tiny_student

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def case_of(scans, label=None, affine=LPS):
    """A canonical case of arrays in the axes of a file."""
    files = {m: nib.Nifti1Image(scan, affine) for m, scan in scans.items()}
    seg = None if label is None else nib.Nifti1Image(label, affine)
    return canonicalise(files, seg, BRATS, dtype="float32")


def in_file_order(array):
    """Canonical axes count to the right and front, those of BraTS files to the left and back."""
    return np.asarray(array)[..., ::-1, ::-1, :]


def test_values_by_hand():
    """Voxels of FLAIR: 2, 4; of T1: 1, 1, 4. The joint mask has three voxels."""
    flair, t1 = np.zeros((2, 200, 3, 2), np.float32)
    flair[[10, 190], 1, 0] = 2, 4
    t1[[10, 190, 100], 1, 1] = 1, 1, 4
    t1[10, 1, 0] = 3
    t1[120, 1, 0] = -5  # a sum below 0 is outside of the mask
    # Sum above 0 at (10,0), (190,0), (10,1), (190,1), (100,1), inside of the crop: the last slice
    # of each axis is lost, and only x is long enough to lose one that the volume has.
    case = normalised(case_of({"flair": flair, "t1": t1}), JOINT_MASK, "float32")
    assert case.acquired == (True, False, True, False)
    assert case.image.shape == (4, 180, 3, 2)
    image = in_file_order(case.image)
    # x = 190 is lost. FLAIR over the mask {(10,0), (10,1), (100,1)}: 2, 0, 0; T1: 3, 1, 4.
    mean, deviation = 2 / 3, np.sqrt(8) / 3
    expected = (np.array([2, 0, 0]) - mean) / deviation
    places = image[0, 0, 1, 0], image[0, 0, 1, 1], image[0, 90, 1, 1]
    np.testing.assert_allclose(places, expected, rtol=1e-6)
    np.testing.assert_allclose(image[0, 50, 2, 1], -mean / deviation, rtol=1e-6)
    mean, deviation = 8 / 3, np.std([3, 1, 4])
    expected = (np.array([3, 1, 4]) - mean) / deviation
    places = image[2, 0, 1, 0], image[2, 0, 1, 1], image[2, 90, 1, 1]
    np.testing.assert_allclose(places, expected, rtol=1e-6)
    assert not image[1].any() and not image[3].any(), "what was not acquired stays 0"


def side(first, last, size):
    """One side as the published code moves it, and where numpy's slice then ends."""
    if last - first < 128:
        half = int((128 - (last - first)) / 2)
        first, last = first - half, last + half + 1
    if first < 0:
        first, last = 0, last - first
    return range(size)[first:last]


@pytest.mark.parametrize("size", [100, 155, 240])
def test_the_crop_is_that_of_the_code_on_every_side(size):
    for first, last in itertools.product(range(0, size, 7), range(0, size, 4)):
        if last <= first:
            continue
        kept = side(first, last, size)
        box = published_crop(Box((0, 0, first), (size, size, last + 1)), (size, size, size))
        assert (box.lo[2], box.hi[2]) == (kept.start, kept.stop)
        mirrored = Box((size - 1 - last, 0, 0), (size - first, size, size))
        box = published_crop(mirrored, (size, size, size))
        assert (size - box.hi[0], size - box.lo[0]) == (kept.start, kept.stop)


def test_the_label_goes_along_and_what_the_crop_cuts_is_kept():
    rng = np.random.default_rng(0)
    scan = np.zeros((180, 140, 20), np.float32)
    scan[5:175, 2:138, 1:19] = rng.uniform(1, 9, (170, 136, 18))
    label = np.zeros(scan.shape, np.uint8)
    label[60:70, 60:70, 5:10] = 2
    case = normalised(case_of({"t1": scan}, label), JOINT_MASK, "float32")
    assert case.label_native is None
    kept = (label[5:174, 2:137], case.label)
    np.testing.assert_array_equal(kept[0], in_file_order(kept[1]))
    label[174, 137, 10] = 3  # in the slice that is lost
    cut = normalised(case_of({"t1": scan}, label), JOINT_MASK, "float32")
    np.testing.assert_array_equal(cut.label, case.label)
    full = np.zeros(scan.shape, np.uint8)
    full[cut.label_box.slices] = cut.label_native
    np.testing.assert_array_equal(in_file_order(full), label)


def test_a_store_and_a_model_of_it(phantom_root, phantom_store, tmp_path):
    """Test and segment see the same scans, where a case has all four."""
    case = find_cases(phantom_root, BRATS)[0]
    options = {"dtype": "float32", "normalisation": JOINT_MASK, "progress": False}
    assert not prepare([case], tmp_path / "store", BRATS, **options).failed
    store = Store.open(tmp_path / "store")
    stored = store.read(case.case_id)
    assert store.normalisation == JOINT_MASK
    truth = np.asarray(nib.load(case.label).dataobj)
    np.testing.assert_array_equal(np.array([0, 1, 2, 4])[stored.native_label()], truth)
    ready = canonicalise(case.images, None, BRATS, dtype="float32")
    np.testing.assert_array_equal(stored.image, normalised(ready, JOINT_MASK, "f4").image)

    model = tiny_student()
    model.preparation = Preparation(normalisation=JOINT_MASK, dtype="float32", patch=(32,) * 3)
    ours = Preparation(normalisation=Store.open(phantom_store).normalisation)
    with pytest.raises(InputError, match="trained with normalisation zscore-joint-mask"):
        model.preparation.refuse_other(ours)
    result = model.segment(case.images)
    assert result.settings["normalisation"] == JOINT_MASK
    item = {"image": torch.from_numpy(np.array(stored.image)), "stored": stored}
    (tested,) = model.predict_item(item, [BRATS.modalities])
    np.testing.assert_array_equal(result.classes, tested.labels())
    assert len(np.unique(result.classes)) > 1


def test_a_name_that_does_not_exist(tmp_path, phantom_root):
    with pytest.raises(InputError, match="use one of zscore-own-mask, zscore-joint-mask"):
        check_normalisation("minmax")
    with pytest.raises(InputError, match="normalisation 'minmax' is not known"):
        prepare(find_cases(phantom_root, BRATS)[:1], tmp_path, BRATS, normalisation="minmax")
    assert NORMALISATIONS[0] == "zscore-own-mask", "ours stays the default"
