from __future__ import annotations

import pandas as pd
import pytest

from pmixseg.errors import InputError
from pmixseg.evaluation.comparison.monotonicity import added_modalities, violations


def records(values, region="WT", cases=4):
    """Dice per combination, the same in every case but for a small step."""
    return pd.DataFrame(
        [
            {"case": f"c{i}", "combination": c, "region": region, "dice": dice + 0.001 * i}
            for c, dice in values.items()
            for i in range(cases)
        ]
    )


def test_the_one_modality_that_hurts_is_listed():
    run = records({"flair": 0.6, "t1": 0.7, "flair+t1": 0.65}, cases=6)
    table = violations([run])
    assert len(table) == 1
    row = table.iloc[0]
    assert (row["region"], row["combination"], row["added"]) == ("WT", "t1", "flair")
    assert row["change"] == pytest.approx(-0.05)
    assert (row["cases"], row["hurt"], row["clear"]) == (6, 6, True)
    every = added_modalities([run])
    assert len(every) == 2
    assert every["change"].tolist() == pytest.approx([-0.05, 0.05])


def test_runs_are_averaged_before_a_case_counts_as_hurt():
    better, worse = records({"a": 0.5, "a+b": 0.6}), records({"a": 0.5, "a+b": 0.45})
    assert violations([better, worse]).empty
    alone = violations([worse]).iloc[0]
    assert alone["hurt"] == 4
    both = added_modalities([better, worse]).iloc[0]
    assert both["change"] == pytest.approx(0.025)
    assert both["hurt"] == 0


def test_only_cases_with_both_combinations_count():
    run = records({"a": 0.5, "b": 0.5, "a+b": 0.4})
    run = run[~((run["case"] == "c0") & (run["combination"] == "a+b"))]
    assert violations([run])["cases"].tolist() == [3, 3]
    # The case counts only if every run has both.
    full = records({"a": 0.5, "b": 0.5, "a+b": 0.4})
    table = violations([full, run])
    assert table["cases"].tolist() == [3, 3]
    assert table["change"].tolist() == pytest.approx([-0.1, -0.1])


def test_the_order_of_names_in_a_combination_does_not_matter():
    one, two = records({"a": 0.5, "a+b": 0.4}), records({"a": 0.5, "b+a": 0.3})
    assert violations([one, two]).iloc[0]["change"] == pytest.approx(-0.15)


def test_regions_are_kept_apart():
    run = pd.concat([records({"a": 0.5, "a+b": 0.4}), records({"a": 0.5, "a+b": 0.6}, "ET")])
    assert violations([run])["region"].tolist() == ["WT"]


def test_an_uncertain_fall_is_not_called_clear():
    run = records({"a": 0.5, "a+b": 0.499}, cases=2)
    run.loc[run["combination"] == "a+b", "dice"] += [0.1, -0.1]
    row = violations([run]).iloc[0]
    assert not row["clear"]
    assert row["hurt"] == 1


def test_nothing_is_clear_of_few_cases():
    # Two cases that both fall are one coin in four.
    for cases, clear in ((2, False), (5, False), (6, True)):
        row = violations([records({"a": 0.5, "a+b": 0.4}, cases=cases)]).iloc[0]
        assert row["high"] < 0
        assert row["hurt"] == cases
        assert bool(row["clear"]) is clear


def test_no_run_is_refused():
    with pytest.raises(InputError, match="no run"):
        added_modalities([])
