"""Who wins by a measure."""

import numpy as np
import pandas as pd
import pytest

from pmixseg.errors import InputError
from pmixseg.evaluation.comparison.compare import compare
from pmixseg.evaluation.records.measures import MEASURES, direction_of
from pmixseg.evaluation.scores.conventions import Conventions
from pmixseg.evaluation.scores.metrics import CaseMetrics
from pmixseg.task import BRATS


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


def test_the_table_is_what_is_scored_in_the_order_of_a_record():
    truth = np.zeros((6, 6, 6), np.uint8)
    truth[1:4, 1:4, 1:4] = 3
    scorer = CaseMetrics(truth, BRATS, (1, 1, 1), Conventions(lesion="brats2023-gli"))
    row = scorer.score(truth)[0]
    assert [*row] == ["region", *(name for name in MEASURES if name not in ("ece", "brier"))]
    for name, value in row.items():
        if name != "region":
            assert isinstance(value, str) != MEASURES[name].numeric, name


def test_every_measure_says_how_it_is_printed_and_which_way_it_is_better():
    undecided = {n for n, m in MEASURES.items() if m.direction is None}
    assert undecided == {"volume_ml", "truth_volume_ml", "empty"}
    assert all(m.title and m.name == n for n, m in MEASURES.items())
    assert len({m.title for m in MEASURES.values()}) == len(MEASURES)
    for measure in MEASURES.values():
        assert (measure.scale == 100) == (measure.unit in ("%", "× 100"))
    assert direction_of("hd95") == "lower" and direction_of("mine") == "higher"


def test_a_column_of_ones_own_is_better_when_higher_and_it_is_said():
    found = compare(table("a", "mine", 2.0), table("b", "mine", 1.0), "mine")
    assert found.exploratory[["wins", "losses"]].to_numpy().tolist() == [[12, 0]]
    assert any("higher number counts as a win" in note for note in found.notes)
