"""Who wins by a measure."""

import numpy as np
import pandas as pd
import pytest

from pmixseg.errors import InputError
from pmixseg.evaluation.comparison.comparison import compare
from pmixseg.evaluation.records.measures import DIRECTIONS
from pmixseg.evaluation.scores.metrics import LESION_MEASURES, MEASURES


def table(name, column, value):
    ease = np.random.default_rng(0).random(12)
    rows = [
        {"run": name, "case": f"c{i}", "combination": "t1", "n_present": 1, "region": "WT"}
        | {"dice": 0.5 + e / 10, column: value}
        for i, e in enumerate(ease)
    ]
    return [pd.DataFrame(rows)]


@pytest.mark.parametrize(
    "measure", ["lesion_fp", "lesion_fn", "presence_fp", "presence_fn", "hd95", "volume_error_ml"]
)
def test_the_smaller_error_wins(measure):
    worse = -5.0 if measure == "volume_error_ml" else 5.0
    found = compare(table("a", measure, worse), table("b", measure, 1.0), measure)
    assert found.exploratory[["wins", "losses"]].to_numpy().tolist() == [[0, 12]]
    assert any("distance from 0" in n for n in found.notes) == (measure == "volume_error_ml")


@pytest.mark.parametrize("measure", ["volume_ml", "truth_volume_ml"])
def test_a_volume_is_no_contest(measure):
    with pytest.raises(InputError, match="no better direction"):
        compare(table("a", measure, 2.0), table("b", measure, 1.0), measure)


def test_every_column_of_numbers_has_a_stated_direction():
    columns = {*MEASURES, *LESION_MEASURES, "ece", "brier"} - {"empty"}
    assert columns == set(DIRECTIONS)


def test_a_column_of_ones_own_is_better_when_higher_and_it_is_said():
    found = compare(table("a", "mine", 2.0), table("b", "mine", 1.0), "mine")
    assert found.exploratory[["wins", "losses"]].to_numpy().tolist() == [[12, 0]]
    assert any("higher number counts as a win" in note for note in found.notes)
