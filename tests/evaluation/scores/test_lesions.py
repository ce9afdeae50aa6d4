from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pmixseg.evaluation.scores.metrics import LESION_MEASURES, CaseMetrics, Conventions
from pmixseg.task import BRATS
from tests.evaluation.scores.mask_pairs import lesion_pairs

GOLDEN = Path(__file__).parent / "golden"


def lesion_rows(rule, prediction, truth, spacing=(1, 1, 1)):
    case = CaseMetrics(truth, BRATS, spacing, Conventions(lesion=rule))
    rows = case.score(prediction, only=LESION_MEASURES)
    return {r["region"]: [r[name] for name in LESION_MEASURES] for r in rows}


def volume(*boxes, shape=(40, 40, 40)):
    """Class map with cubes given as (low corner, shape, class)."""
    made = np.zeros(shape, np.uint8)
    for low, size, value in boxes:
        made[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))] = value
    return made


def test_the_published_brats_2023_code_gave_these_numbers():
    golden = json.loads((GOLDEN / "brats2023.json").read_text())
    for name, prediction, truth, spacing in lesion_pairs(golden["pairs"], golden["seed"]):
        rows = lesion_rows("brats2023-gli", prediction, truth, spacing)
        for region, expected in golden["scores"][name].items():
            assert rows[region] == pytest.approx(expected, rel=1e-6), (name, region)


def test_brats_evaluation_gave_these_numbers():
    golden = json.loads((GOLDEN / "brats_evaluation.json").read_text())
    for name, prediction, truth, spacing in lesion_pairs(golden["pairs"], golden["seed"]):
        # The package takes the spacing in the reverse order of the axes.
        rows = lesion_rows("panoptica-0.0.10", prediction, truth, spacing[::-1])
        for region, (dice, hd95, *counts) in golden["scores"][name].items():
            expected = [math.nan if dice is None else dice, math.nan if hd95 is None else hd95]
            if hd95 == "inf":
                expected[1] = 373.0
            assert rows[region] == pytest.approx([*expected, *counts], nan_ok=True), (name, region)


CUBE = (4, 4, 4)


def test_found_missed_and_invented_by_hand():
    truth = volume(((2, 2, 2), CUBE, 3), ((20, 20, 20), CUBE, 3))
    prediction = volume(((2, 2, 3), CUBE, 3), ((34, 2, 2), CUBE, 3))
    brats = lesion_rows("brats2023-gli", prediction, truth)["ET"]
    # Found: Dice 48 / 64, moved by 1 mm; missed: 0 and 374; invented: 0 and 374.
    assert brats == pytest.approx([0.75 / 3, (1 + 2 * 374) / 3, 1, 1, 1])
    panoptica = lesion_rows("panoptica-0.0.10", prediction, truth)["ET"]
    assert panoptica == pytest.approx([0.75, 1.0, 1, 1, 1])


@pytest.mark.parametrize(("voxels", "counted"), [(50, False), (51, True)])
def test_brats_2023_drops_truth_lesions_of_at_most_50_mm3(voxels, counted):
    truth = np.zeros((60, 9, 9), np.uint8)
    truth[1 : 1 + voxels, 4, 4] = 1
    nothing = np.zeros_like(truth)
    missed = [0.0, 374.0, 0, 0, 1] if counted else [1.0, 0.0, 0, 0, 0]
    assert lesion_rows("brats2023-gli", nothing, truth)["TC"] == missed
    expected = [1.0, 0.0, 1, 0, 0] if counted else [1.0, 0.0, 0, 0, 0]
    # A prediction that belongs to a dropped lesion is no false positive either.
    assert lesion_rows("brats2023-gli", truth, truth)["TC"] == expected
    assert lesion_rows("panoptica-0.0.10", nothing, truth)["TC"] == [0.0, 373.0, 0, 0, 1]


@pytest.mark.parametrize(("gap", "lesions"), [(6, 1), (7, 2)])
def test_brats_2023_joins_lesions_whose_dilations_touch(gap, lesions):
    # Two cubes with ``gap`` empty voxels between them; each grows by three.
    truth = volume(((4, 4, 4), CUBE, 3), ((8 + gap, 4, 4), CUBE, 3))
    nothing = np.zeros_like(truth)
    assert lesion_rows("brats2023-gli", nothing, truth)["ET"][4] == lesions
    assert lesion_rows("panoptica-0.0.10", nothing, truth)["ET"][4] == 2


def test_a_case_without_lesions_has_the_values_of_its_convention():
    nothing = np.zeros((5, 5, 5), np.uint8)
    for map_ in (nothing, volume(((1, 1, 1), CUBE, 2))):
        assert lesion_rows("brats2023-gli", map_, map_)["ET"] == [1.0, 0.0, 0, 0, 0]
        assert lesion_rows("panoptica-0.0.10", map_, map_)["ET"] == pytest.approx(
            [math.nan, math.nan, 0, 0, 0], nan_ok=True
        )


def test_every_false_positive_counts_however_small():
    truth = volume(((2, 2, 2), CUBE, 3))
    prediction = truth.copy()
    prediction[20, 20, 20] = prediction[30, 30, 30] = 3
    assert lesion_rows("brats2023-gli", prediction, truth)["ET"] == pytest.approx(
        [1 / 3, 2 * 374 / 3, 1, 2, 0]
    )


def test_without_a_lesion_convention_there_are_no_lesion_columns():
    truth = volume(((2, 2, 2), CUBE, 3))
    row = CaseMetrics(truth, BRATS, (1, 1, 1)).score(truth)[0]
    assert not any(name.startswith("lesion") for name in row)
