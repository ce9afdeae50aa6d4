"""Post-processing; before it the class of a voxel, the most probable, of equal ones the first."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from pmixseg.data.scans.boxes import Box
from pmixseg.data.scans.geometry import Geometry
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import CasePrediction
from pmixseg.evaluation.prediction.postprocess import STEPS, check_steps, postprocess
from pmixseg.task import BRATS, Task

NCR, ED, ET = 1, 2, 3
MM = np.eye(4)
maps = arrays(np.uint8, st.tuples(*[st.integers(1, 6)] * 3), elements=st.integers(0, 3))


def enhancing(voxels):
    labels = np.full((12, 12, 12), ED, np.uint8)
    labels.ravel()[:voxels] = ET
    return labels


@pytest.mark.parametrize(
    ("voxels", "affine", "stays"),
    [
        (499, MM, False),
        (500, MM, True),
        (249, np.diag([1, 1, 2, 1]), False),
        (250, np.diag([1, 1, 2, 1]), True),
    ],
)
def test_little_enhancement_becomes_core(voxels, affine, stays):
    labels = enhancing(voxels)
    result = postprocess(labels, ["et_below_500"], BRATS, affine)
    assert np.count_nonzero(result == ET) == (voxels if stays else 0)
    assert np.count_nonzero(result == NCR) == (0 if stays else voxels)
    assert np.array_equal(result == ED, labels == ED)


def test_the_class_that_takes_its_place_is_of_the_smallest_region_around_it():
    task = Task("edema first", BRATS.modalities, ("ED", "NCR", "ET"), BRATS.regions)
    labels = np.full((2, 2, 2), 3, np.uint8)
    assert (postprocess(labels, ["et_below_500"], task, MM) == task.labels.index("NCR") + 1).all()


@settings(max_examples=40)
@given(maps)
def test_the_enhancement_rule_leaves_the_other_regions(labels):
    result = postprocess(labels, ["et_below_500"], BRATS, MM)
    for region in ("WT", "TC"):
        classes = BRATS.region_classes(region)
        assert np.array_equal(np.isin(result, classes), np.isin(labels, classes))


def test_the_largest_piece_stays_whole():
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[0:2, 0:2, 0:2] = [[[1, 2], [3, 1]]] * 2
    labels[2, 2, 2] = ED  # touches the first by a corner
    labels[6:8, 6:8, 6:8] = ET
    result = postprocess(labels, ["largest_component"], BRATS, MM)
    assert np.array_equal(result[:3, :3, :3], labels[:3, :3, :3])
    assert not result[3:, 3:, 3:].any()


def test_a_hole_takes_the_class_that_touches_it_most():
    labels = np.zeros((7, 7, 7), np.uint8)
    labels[1:6, 1:6, 1:6] = ED
    labels[3, 3, 3] = 0
    labels[2, 3, 3] = labels[4, 3, 3] = ET
    assert postprocess(labels, ["fill_holes"], BRATS, MM)[3, 3, 3] == ED  # 4 faces against 2
    labels[3, 2, 3] = labels[3, 4, 3] = ET
    assert postprocess(labels, ["fill_holes"], BRATS, MM)[3, 3, 3] == ET  # 2 against 4
    labels[3, 2, 3] = NCR
    labels[3, 4, 3] = NCR
    assert postprocess(labels, ["fill_holes"], BRATS, MM)[3, 3, 3] == NCR  # a tie of three


def test_a_tunnel_is_no_hole_and_a_diagonal_gap_does_not_open_one():
    labels = np.full((5, 5, 5), ED, np.uint8)
    labels[2, 2, :] = 0
    assert np.array_equal(postprocess(labels, ["fill_holes"], BRATS, MM), labels)
    labels = np.full((5, 5, 5), ED, np.uint8)
    labels[2, 2, 2] = labels[1, 1, 2] = labels[0, 1, 2] = 0
    result = postprocess(labels, ["fill_holes"], BRATS, MM)
    assert result[2, 2, 2] == ED
    assert result[1, 1, 2] == result[0, 1, 2] == 0


@settings(max_examples=60)
@given(maps)
def test_filling_agrees_with_scipy_on_where(labels):
    before = labels.copy()
    result = postprocess(labels, ["fill_holes"], BRATS, MM)
    assert np.array_equal(result > 0, ndimage.binary_fill_holes(labels > 0))
    assert np.array_equal(result[labels > 0], labels[labels > 0])
    assert np.array_equal(labels, before)


@settings(max_examples=30)
@given(maps, st.sampled_from(sorted(STEPS)))
def test_a_step_done_twice_is_done_once(labels, step):
    before = labels.copy()
    once = postprocess(labels, [step], BRATS, MM)
    assert once.dtype == np.uint8
    assert np.array_equal(postprocess(once, [step], BRATS, MM), once)
    assert np.array_equal(labels, before)


def test_no_step_is_the_default_and_order_counts():
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[:3, :3, :3] = ED
    labels[1, 1, 1] = 0
    labels[5:8, 5:8, 5:8] = ED
    labels[5, 5, 5] = 0
    assert postprocess(labels, [], BRATS, MM) is labels
    first = postprocess(labels, ["fill_holes", "largest_component"], BRATS, MM)
    assert np.count_nonzero(first) == 27
    assert np.count_nonzero(first[5:, 5:, 5:]) == 0
    second = postprocess(labels, ["largest_component", "fill_holes"], BRATS, MM)
    assert np.count_nonzero(second) == 27


def test_what_cannot_be_done_is_said():
    with pytest.raises(InputError, match="'smooth' is unknown"):
        check_steps(["smooth"], BRATS)
    other = Task("lesions", ("t1",), ("lesion",), {"lesion": ("lesion",)})
    with pytest.raises(InputError, match="needs a region ET"):
        check_steps(["et_below_500"], other)
    check_steps(["fill_holes", "largest_component"], other)


@pytest.mark.parametrize("last", [False, True])
def test_of_equal_classes_the_first_is_taken(last):
    shape = (7, 6, 5)
    torch.manual_seed(0)
    probabilities = torch.randint(0, 3, (4, *shape)) / 4  # many of them are equal
    if last:  # in memory the classes of a voxel lie side by side
        probabilities = probabilities.movedim(0, -1).contiguous().movedim(-1, 0)
    geometry = Geometry.of(shape, np.eye(4), None)
    prediction = CasePrediction(("t1",), probabilities, Box.whole(shape), geometry, BRATS)
    expected = np.argmax(probabilities.numpy(), axis=0)
    assert (np.sort(probabilities.numpy(), axis=0)[-1] == probabilities.numpy()[0]).any()
    np.testing.assert_array_equal(prediction.classes.numpy(), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("spacing", [None, (2.0, 2.0, 2.0), (1.5, 0.7, 3.0)])
def test_labels_are_the_most_probable_of_the_probabilities_beside_them(spacing, temperature):
    geometry = Geometry.of((32, 32, 32), np.diag([-1.0, 1, 1, 1]), spacing)
    box = Box((3, 4, 2), (9, 12, 7))
    torch.manual_seed(0)
    probabilities = (2 * torch.randn(4, *box.shape)).softmax(0)
    made = CasePrediction(("t1",), probabilities, box, geometry, BRATS, temperature=temperature)
    written = made.source_probabilities()
    np.testing.assert_array_equal(made.labels(), written.argmax(0))
    np.testing.assert_allclose(written.sum(0), 1, atol=1e-6)
    np.testing.assert_array_equal(written[:, -1, -1, -1], [1, 0, 0, 0])


def test_outside_the_box_a_resampled_prediction_is_background():
    box = Box((8, 8, 8), (24, 24, 24))
    geometry = Geometry.of((64, 64, 64), MM, (2.0, 2.0, 2.0), {"flair": box})
    probabilities = torch.tensor([0.4, 0, 0.6, 0])[:, None, None, None].expand(4, *box.shape)
    labels = CasePrediction(("flair",), probabilities, box, geometry, BRATS).labels()
    # ED is the more probable from 5/6 of the way in: a voxel of 1 mm less than the box, each side.
    assert set(np.unique(labels)) == {0, ED} and np.count_nonzero(labels) == 30**3
    assert labels[17:47, 17:47, 17:47].all()
