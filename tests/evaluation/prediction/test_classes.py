"""The class of a voxel: the most probable one, and of equal ones the first."""

import numpy as np
import pytest
import torch

from pmixseg.data.scans.boxes import Box
from pmixseg.data.scans.geometry import Geometry
from pmixseg.evaluation.prediction.cases import CasePrediction
from pmixseg.task import BRATS


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
