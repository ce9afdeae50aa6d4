"""Two methods over seed-matched runs; whether more sequences are ever worse."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pmixseg.errors import InputError
from pmixseg.evaluation.comparison.compare import compare, matching_notes
from pmixseg.evaluation.comparison.monotonicity import added_modalities, violations
from pmixseg.evaluation.comparison.paired_tests import holm, paired_t, two_way_bootstrap
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.records.sidecar import Sidecar
from pmixseg.task import BRATS, format_combination
from tests.docs.pages import DOCS

TRUTH = "truth_volume_ml"
COMBINATIONS = [format_combination(c) for c in BRATS.combinations()]


def run(seed, gain=0.0, cases=10, combinations=COMBINATIONS, name="a", spread=0.02):
    """Records of one training: a case's ease is shared by all runs, the rest is this run's luck."""
    rng = np.random.default_rng(seed)
    ease = np.random.default_rng(1000).normal(0, 0.03, cases)
    luck = rng.normal(0, spread)
    rows = []
    for case in range(cases):
        for combination in combinations:
            for j, region in enumerate(BRATS.regions):
                size = len(combination.split("+"))
                dice = 0.7 - 0.05 * j + 0.03 * size + ease[case] + luck + gain
                dice += rng.normal(0, 0.02)
                row = {"run": f"{name}{seed}", "case": f"c{case:02d}", "combination": combination}
                row |= {"n_present": size, "region": region, "dice": dice, "hd95": 50 * (1 - dice)}
                rows.append(row)
    return pd.DataFrame(rows)


def runs(count, gain=0.0, first=0, name="a", **more):
    return [run(first + s, gain, name=name, **more) for s in range(count)]


# What docs/method/evidence.md simulates: no effect; seed, case and residual SD 1, 1, 2; 50 cases.
def no_effect(rng, seeds, cases=50):
    ease = rng.normal(0, 1, cases)

    def arm():
        return rng.normal(0, 1, (seeds, 1)) + ease + rng.normal(0, 2, (seeds, cases))

    return arm() - arm()


def test_the_primary_test_is_wrong_in_one_of_twenty_and_a_test_over_cases_is_not():
    rng = np.random.default_rng(0)
    studies = 2000
    differences = [no_effect(rng, 8) for _ in range(studies)]
    rate = np.mean([paired_t(d).p < 0.05 for d in differences])
    # Two standard errors of a rate of 5 % in 2000 studies are 1 %.
    assert 0.04 <= rate <= 0.06
    covered = np.mean(
        [low <= 0 <= high for low, high in (paired_t(d).interval for d in differences)]
    )
    assert covered == pytest.approx(1 - rate)
    by_case = np.mean([stats.wilcoxon(d[0]).pvalue < 0.05 for d in differences[:500]])
    assert by_case > 0.4


@pytest.mark.slow
def test_the_primary_test_through_records_is_wrong_as_rarely():
    few = {"cases": 3, "combinations": ["flair", "t1"]}
    p_values = [
        compare(runs(4, first=8 * study, **few), runs(4, first=8 * study + 4, **few)).primary.p
        for study in range(400)
    ]
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.085


def test_the_bootstrap_interval_covers_zero_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = [
        low <= 0 <= high
        for low, high in (two_way_bootstrap(no_effect(rng, 10), 400) for _ in range(300))
    ]
    assert 0.88 <= np.mean(covered) <= 1.0


def test_primary_endpoint_is_a_paired_t_over_means_of_runs():
    a, b = runs(8, gain=0.01), runs(8, first=50, name="b")
    comparison = compare(a, b)
    of_a, of_b = ([r.groupby("case")["dice"].mean().mean() for r in side] for side in (a, b))
    oracle = stats.ttest_rel(of_a, of_b)
    assert comparison.primary.p == pytest.approx(oracle.pvalue)
    assert comparison.primary.t == pytest.approx(oracle.statistic)
    interval = oracle.confidence_interval()
    assert comparison.primary.interval == pytest.approx((interval.low, interval.high))
    assert comparison.mean_a == pytest.approx(np.mean(of_a))
    assert comparison.by_pair == pytest.approx(np.subtract(of_a, of_b))
    low, high = comparison.bootstrap
    assert low < comparison.primary.difference < high
    assert sum(comparison.wins) == 10


def test_four_in_five_studies_find_the_difference_that_is_called_detectable():
    shift = paired_t(np.array([[-1.0], [1.0]] * 4)).detectable / stats.sem([-1, 1] * 4)
    assert stats.nct.sf(stats.t.ppf(0.975, 7), 7, shift) == pytest.approx(0.8, abs=0.03)


def test_a_case_with_fewer_combinations_weighs_as_much_as_any_other():
    full = [run(s, combinations=["flair", "t1", "flair+t1"], cases=2) for s in (0, 1)]
    few = [r[~((r["case"] == "c01") & (r["combination"] != "t1"))] for r in full]
    comparison = compare(few[:1], few[1:])
    per_case = few[0].groupby("case")["dice"].mean() - few[1].groupby("case")["dice"].mean()
    assert comparison.primary.difference == pytest.approx(per_case.mean())


def test_a_clear_effect_is_found_and_named():
    comparison = compare(
        runs(8, gain=0.05, spread=0.005), runs(8, first=50, name="b", spread=0.005)
    )
    assert comparison.primary.p < 0.001
    assert comparison.of_methods
    assert "A is better" in comparison.to_text()
    reverse = compare(runs(8, first=50, name="b", spread=0.005), runs(8, gain=0.05, spread=0.005))
    assert "B is better" in reverse.to_text()
    assert reverse.primary.difference == pytest.approx(-comparison.primary.difference)
    assert reverse.wins == (comparison.wins[1], comparison.wins[0], comparison.wins[2])


def test_one_run_a_side_compares_checkpoints():
    comparison = compare(runs(1), runs(1, gain=0.1, first=9, name="b"))
    assert not comparison.of_methods
    assert np.isnan(comparison.primary.p)
    text = comparison.to_text()
    assert "Two checkpoints, not two methods" in text
    assert "is better" not in text
    assert comparison.to_dict()["compares"] == "checkpoints"
    assert comparison.to_dict()["primary"]["p"] is None


def test_the_same_run_twice_is_no_second_training():
    a, b = run(0), run(1, name="b")
    comparison = compare([a, a], [b, b])
    assert np.isnan(comparison.primary.p)
    assert any("not independent" in note for note in comparison.notes)
    assert compare([a, a], [a, a]).primary.difference == 0.0


def test_limits_are_said():
    comparison = compare(runs(3), runs(3, first=9))
    notes = " ".join(comparison.notes)
    points = 100 * comparison.primary.detectable  # the unit of everything beside it
    assert f"a true difference below {points:.2f} points of Dice would be missed" in notes
    assert "3 pairs of runs are few" in notes
    assert "10 cases are too few" in notes
    assert compare(runs(8, cases=25), runs(8, first=9, cases=25)).notes == ()


def test_exploratory_table_row_by_row():
    a, b = runs(3), runs(3, gain=0.01, first=9)
    table = compare(a, b).exploratory
    assert len(table) == 45
    assert list(table["region"].unique()) == ["WT", "TC", "ET"]
    assert table["combination"].tolist()[:15] == COMBINATIONS
    row = table[(table["region"] == "TC") & (table["combination"] == "flair+t2")].iloc[0]

    def pick(r):
        return r[(r["region"] == "TC") & (r["combination"] == "flair+t2")].set_index("case")["dice"]

    differences = [pick(x) - pick(y) for x, y in zip(a, b, strict=True)]
    by_run = stats.ttest_1samp([d.mean() for d in differences], 0)
    d = sum(differences) / 3
    assert row["difference"] == pytest.approx(d.mean())
    assert row["p"] == pytest.approx(by_run.pvalue)
    assert (row["low"], row["high"]) == pytest.approx(tuple(by_run.confidence_interval()))
    assert (row["wins"], row["losses"]) == ((d > 0).sum(), (d < 0).sum())
    assert row["low"] < row["difference"] < row["high"]
    assert table["p_holm"].tolist() == holm(table["p"].to_numpy()).tolist()


def test_no_star_without_an_effect():
    """Two trainings, or five, that differ by luck alone, in every cell a little otherwise."""
    rng = np.random.default_rng(0)

    def arm(count):
        """SD over runs 1 point, of a run's cell another point, of the rest 2."""
        tables = []
        for _ in range(count):
            cells = 0.7 + rng.normal(0, 0.01) + rng.normal(0, 0.01, 45)
            dice = cells + rng.normal(0, 0.02, (30, 45))
            keys = [(c, r) for c in COMBINATIONS for r in BRATS.regions]
            tables.append(
                pd.DataFrame(
                    {
                        "run": f"r{len(tables)}",
                        "case": np.repeat([f"c{i}" for i in range(30)], 45),
                        "combination": [c for c, _ in keys] * 30,
                        "n_present": [c.count("+") + 1 for c, _ in keys] * 30,
                        "region": [r for _, r in keys] * 30,
                        "dice": dice.ravel(),
                    }
                )
            )
        return tables

    one = compare(arm(1), arm(1))
    assert one.exploratory["p"].isna().all()
    assert "*" not in one.to_text()
    starred = [(compare(arm(5), arm(5)).exploratory["p_holm"] < 0.05).any() for _ in range(12)]
    assert sum(starred) <= 2  # 12 studies at 5 %: three or more in one of 50


def test_a_method_is_not_compared_with_itself_and_a_changed_table_is_told():
    same = [Records(run(0), Sidecar(BRATS))]
    with pytest.raises(InputError, match=r"of A and run '.*' of B hold the same results"):
        matching_notes(same, [Records(run(0, name="b"), Sidecar(BRATS))])
    (note,) = matching_notes(same, [Records(run(1, name="b"), Sidecar(BRATS), altered=True)])
    assert note == "The table of b1 was changed after it was written."


@pytest.mark.parametrize("measure", ["hd95", "volume_error_ml"])
def test_for_distances_and_errors_less_is_a_win(measure):
    sides = (run(0), run(0, gain=-0.2, name="b"))
    sides = [[one.assign(volume_error_ml=-one["hd95"])] for one in sides]
    table = compare(*sides, measure=measure).exploratory
    assert (table["difference"] < 0).all()
    assert (table["wins"] == table["cases"]).all()


def test_holm_equals_its_definition():
    p = np.array([0.3, np.nan, 0.01, 0.02, 0.011])
    # Sorted: 0.01·4, 0.011·3 → 0.04, 0.02·2 → 0.04, 0.3.
    assert holm(p) == pytest.approx([0.3, np.nan, 0.04, 0.04, 0.04], nan_ok=True)
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]


def test_bootstrap_of_one_run_draws_cases_only():
    d = np.random.default_rng(0).normal(0.3, 1, 40)
    low, high = two_way_bootstrap(d[None], 4000)
    error = d.std() / np.sqrt(40)
    assert (low, high) == pytest.approx(
        (d.mean() - 1.96 * error, d.mean() + 1.96 * error), abs=0.03
    )
    assert np.isnan(two_way_bootstrap(np.ones((1, 1)))).all()


def test_rows_that_some_run_lacks_are_left_out_and_said():
    a, b = run(0), run(1, name="b")
    b = b[b["case"] != "c03"]
    a.loc[5, "dice"] = np.nan
    comparison = compare([a], [b])
    assert len(comparison.cases) == 9
    assert any("46 of 450 rows" in note and "1 whole case." in note for note in comparison.notes)
    # Of which the means of the headline are then not.
    b = b[(b["region"] != "ET") & (b["combination"] != "t1")]
    told = compare([a], [b]).notes
    assert any("1 whole case, 1 whole combination, 1 whole region." in note for note in told)


def test_wrong_records_are_refused():
    good = run(0)
    with pytest.raises(InputError, match="A has 2 runs and B 1"):
        compare([good, good], [good])
    with pytest.raises(InputError, match="A has 0 runs"):
        compare([], [])
    with pytest.raises(InputError, match="lacks the columns"):
        compare([good.drop(columns="region")], [good])
    with pytest.raises(InputError, match=r"'nsd' .* one of dice, hd95, or test the run again"):
        compare([good], [good], measure="nsd")
    with pytest.raises(InputError, match="no case, combination and region"):
        compare([good], [good[:0].astype(object)])
    with pytest.raises(InputError, match="twice"):
        compare([pd.concat([good, good])], [good])
    with pytest.raises(InputError, match="same cases"):
        compare([good], [good.assign(case="elsewhere" + good["case"])])
    one, other = good.assign(**{TRUTH: 2.0}), run(1).assign(**{TRUTH: 3.5})
    with pytest.raises(InputError, match=r"'c00' has 2 ml of WT in one table and 3\.5 ml in an"):
        compare([one], [other])
    assert compare([one], [run(1)]).mean_a == compare([one], [run(1).assign(**{TRUTH: 2.0})]).mean_a


def test_everything_goes_to_json_and_text():
    comparison = compare(runs(2), runs(2, first=9, name="b"))
    raw = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert raw["runs_b"] == ["b9", "b10"]
    assert len(raw["exploratory"]["rows"]) == 45
    text = comparison.to_text()
    for part in ("PRIMARY", "EXPLORATORY", "paired t over runs", "prove none", "flair+t1ce+t1+t2"):
        assert part in text


@pytest.mark.parametrize("measure", ["empty", "case", "region", "run", "n_present", "dcie"])
def test_only_columns_of_numbers_are_measures(measure):
    a, b = (run(seed, cases=2).assign(empty="none", missed=seed > 1) for seed in (1, 2))
    with pytest.raises(InputError, match=rf"run a1 of A: '{measure}' .* one of dice, hd95, missed"):
        compare([a], [b], measure)
    exploratory = compare([a], [b], "missed").exploratory
    assert (exploratory["difference"] == -1).all()
    words = a.assign(dice="good")
    with pytest.raises(InputError, match="'dice' is no column of numbers"):
        compare([words], [b])


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
    run.loc[run["combination"] == "flair+t1", "dice"] += [0.01, -0.01] * 3
    (row,) = violations([run]).itertuples()
    assert (row.region, row.combination, row.added) == ("WT", "t1", "flair")
    assert (row.cases, row.hurt, row.clear) == (6, 6, True)
    every = added_modalities([run])
    assert every["change"].tolist() == pytest.approx([-0.05, 0.05])
    assert every["clear"].tolist() == [True, False]  # a rise is no fall


def test_runs_are_averaged_before_a_case_counts_as_hurt():
    better, worse = records({"a": 0.5, "a+b": 0.6}), records({"a": 0.5, "a+b": 0.45})
    assert violations([better, worse]).empty
    assert violations([worse]).iloc[0]["hurt"] == 4
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


def test_noise_of_many_combinations_is_not_clear():
    rng = np.random.default_rng(0)
    clear = []
    for _ in range(8):
        run = pd.concat(
            records(dict.fromkeys(COMBINATIONS, 0.7), region, cases=30) for region in BRATS.regions
        )
        table = added_modalities([run.assign(dice=run["dice"] + rng.normal(0, 0.02, len(run)))])
        assert len(table) == 84
        assert (table["high"] < 0).any()  # an interval that is not corrected leaves out 0
        clear.append(int(table["clear"].sum()))
    assert sum(n > 0 for n in clear) <= 1


def test_no_run_is_refused():
    with pytest.raises(InputError, match="no run"):
        added_modalities([])


def test_the_page_says_how_often_each_test_finds_what_is_not_there():
    draw = np.random.default_rng(0)

    def trainings():  # 2000 studies of 5 seeds and 50 cases
        luck, suits = draw.normal(size=(2000, 5, 1)), draw.normal(size=(2000, 1, 50))
        return luck + suits + 2 * draw.normal(size=(2000, 5, 50))

    differences = trainings() - trainings()
    one, means = differences[:, 0], differences.mean(1)
    simulated = [np.mean(stats.wilcoxon(d, axis=1).pvalue < 0.05) for d in (one, means)]
    simulated.append(np.mean([paired_t(d).p < 0.05 for d in differences]))
    page = (DOCS / "method" / "evidence.md").read_text(encoding="utf-8")
    stated = [int(share) / 100 for share in re.findall(r"\| (\d+) % \|", page)]
    np.testing.assert_allclose(simulated, stated, atol=0.02)
