"""Settings of evaluation are refused when they are made, not after a training."""

import numpy as np
import pytest

from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.evaluation.prediction.scans import SegmentSettings

WRONG = {
    "window": [((0, 0, 0), "three voxel counts"), ((32, 32), "three voxel counts")],
    "overlap": [(1.0, "overlap is 1.0"), (-1.0, "overlap is -1.0"), (np.nan, "overlap is nan")],
    "blend": [("gausian", "'gausian' is unknown; use gaussian or uniform")],
    "batch_size": [(0, "at least 1 window"), (-3, "at least 1 window")],
    "postprocess": [(("nope",), "'nope' is unknown"), ("fill_holes", "give a list")],
    "examples": [(-1, "0 or more cases")],
}
CASES = [(name, value, words) for name, several in WRONG.items() for value, words in several]


@pytest.mark.parametrize(("name", "value", "words"), CASES)
def test_what_does_not_exist(name, value, words):
    with pytest.raises(InputError, match=words):
        EvaluationSettings(**{name: value})
    with pytest.raises(InputError, match=words):
        EvaluationSettings.of({name: value})
    if name in ("window", "overlap", "postprocess"):
        with pytest.raises(InputError, match=words):
            SegmentSettings(**{name: value})


def test_lists_of_yaml_become_tuples():
    given = {"window": [32, 32, 16], "postprocess": ["fill_holes"]}
    for made in (EvaluationSettings(**given), EvaluationSettings.of(given)):
        assert made == EvaluationSettings(window=(32, 32, 16), postprocess=("fill_holes",))
    assert EvaluationSettings.of({"postprocess": None}) == EvaluationSettings()
