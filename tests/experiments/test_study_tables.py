"""Tables of a study: from made results, by hand; from the committed records, as published."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from experiments.study import training as one_training
from experiments.study.__main__ import main
from experiments.study.analysis import analyse
from experiments.study.plan import read_plan
from experiments.study.results import StudyResults
from experiments.study.tables import endpoint
from pmixseg.describe import build
from pmixseg.errors import InputError
from pmixseg.evaluation.records.sidecar import Sidecar
from pmixseg.task import BRATS


def made_results(dice):
    """Results with the given Dice, ``{arm: [seeds][cases]}``, the same for two combinations."""
    rows, trainings = [], []
    for arm, by_seed in dice.items():
        for seed, by_case in enumerate(by_seed):
            run = f"{arm}_s{seed}"
            trainings.append({"run": run, "group": "g", "arm": arm, "block": str(seed)})
            rows += [
                {"run": run, "case": f"c{i}", "combination": c, "region": "WT", "dice": d}
                for i, d in enumerate(by_case)
                for c in ("flair", "flair+t1ce")
            ]
    table = pd.DataFrame(rows)
    table["n_present"] = table["combination"].str.count(r"\+") + 1
    return StudyResults(table, pd.DataFrame(trainings), Sidecar(BRATS))


def test_a_contrast_of_four_arms_is_the_interaction_by_hand():
    rng = np.random.default_rng(0)
    dice = {arm: rng.uniform(0.3, 0.9, (5, 3)).tolist() for arm in "abcd"}
    weights = {"a": 1, "b": -1, "c": -1, "d": 1}
    entry = {
        "title": "t",
        "kind": "tests",
        "group": "g",
        "contrasts": [{"name": "interaction", "weights": weights}, ["a", "b"]],
    }
    text = analyse(made_results(dice), [entry])
    mean = {arm: np.mean(values, axis=1) for arm, values in dice.items()}
    by_seed = mean["a"] - mean["b"] - mean["c"] + mean["d"]
    p = stats.ttest_1samp(by_seed, 0).pvalue
    low, high = stats.t.interval(0.95, 4, by_seed.mean(), stats.sem(by_seed))
    assert f"| interaction | {100 * by_seed.mean():+.2f} |" in text
    assert f"{100 * low:+.2f} to {100 * high:+.2f}" in text
    other = stats.ttest_rel(mean["a"], mean["b"]).pvalue
    assert f"| {p:.3g} | {min(1, max(2 * min(p, other), p)):.3g} |" in text


def test_only_blocks_that_are_whole_are_compared_and_missing_ones_are_said():
    results = made_results({"a": [[0.5], [0.6], [0.9]], "b": [[0.4], [0.4]]})
    entry = {"title": "t", "kind": "tests", "group": "g", "planned": 3, "contrasts": [["a", "b"]]}
    text = analyse(results, [entry])
    assert "+15.00" in text  # (0.1 + 0.2) / 2
    assert "Fewer than the 3 seeds planned. Seeds 0, 1; 1 cases." in text


def test_tables_say_which_seeds_they_hold_where_arms_have_not_the_same():
    """An arm of more seeds has another mean in a test than in the table of arms."""
    results = made_results({"a": [[0.5], [0.6], [0.9]], "b": [[0.4], [0.4]]})
    results.trainings["steps"] = 7
    arms = analyse(results, [{"title": "t", "kind": "arms", "group": "g"}])
    assert "| a | 55.0 |" in arms and arms.endswith("\n\nSeeds 0, 1, which all of these arms have.")
    entry = {"title": "t", "kind": "figures", "group": "g", "columns": ["steps"]}
    assert analyse(results, [entry]).endswith("\n\nMeans over all seeds of each: a 3; b 2.")
    alone = {"title": "t", "kind": "arms", "group": "g", "arms": ["a"]}
    assert "Seeds" not in analyse(results, [alone])


def test_results_that_came_at_different_times_stand_in_the_order_of_the_plan():
    first, second = made_results({"b": [[0.5]]}), made_results({"a": [[0.4]], "b": [[0.9]]})
    both = first.joined(second, ["a_s0", "b_s0"])
    assert both.trainings["run"].tolist() == ["a_s0", "b_s0"]
    assert both.records["run"].tolist() == ["a_s0"] * 2 + ["b_s0"] * 2
    assert both.records["dice"].tolist() == [0.4, 0.4, 0.5, 0.5]  # what was there stays


def test_one_seed_has_a_difference_and_no_interval():
    entry = {"title": "t", "kind": "tests", "group": "g", "contrasts": [["a", "b"]]}
    text = analyse(made_results({"a": [[0.5, 0.6]], "b": [[0.4, 0.4]]}), [entry])
    assert "| a − b | +15.00 | – | " in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([0.02, 0.03, 0.04], "helps.** +3.00 points"),
        ([-0.02, -0.03, -0.04], "harms.** -3.00 points"),
        ([-0.001, 0.0, 0.001], "refuted.** +0.00 points"),
        ([-0.05, 0.0, 0.05], "not decided.** +0.00 points"),
        ([0.03], "not decided.** +3.00 points (–; one seed). Without an interval"),
    ],
)
def test_a_verdict_follows_from_the_interval_and_what_would_be_worth_having(gains, said):
    dice = {"a": [[0.5 + gain] for gain in gains], "b": [[0.5] for _ in gains]}
    entry = {"title": "t", "kind": "verdict", "group": "g", "worth": 0.5, "contrasts": [["a", "b"]]}
    assert f"- **a − b: {said}" in analyse(made_results(dice), [entry])


def test_a_group_that_has_not_begun_and_an_arm_that_is_half_done_are_no_result():
    results = made_results({"a": [[0.5]], "b": [[0.4]]})
    entry = {"title": "t", "kind": "tests", "group": "g", "contrasts": [["a", "b"]]}
    later = {**entry, "group": "h"}
    assert analyse(results, [later, later], {"g", "h"}) == "Not run: h."
    with pytest.raises(InputError, match="no group 'h'"):
        analyse(results, [later])
    assert "+10.00" in analyse(results, [entry], {"g"})
    results.trainings["parts"] = [1.0, 2.0]  # b is to be two trainings
    assert analyse(results, [entry], {"g"}) == "### t\n\nNo seed has ended."


def test_a_collapse_is_counted_against_the_arm_without_alignment_of_the_same_seed():
    results = made_results({"a": [[0.5]] * 3, "b": [[0.5]] * 3})
    results.trainings["gap/level1/rank_within"] = [4.0, 4.0, 4.0, 10.0, 7.0, 4.0]
    results.trainings["gap/level1/decodability"] = [0.5, 0.5, 0.3, 0.5, 0.5, 0.5]
    entry = {"title": "t", "kind": "gap", "group": "g", "measures": ["rank_within"]}
    # Against b: rank 4 of 10 and decodability 0.3 of 0.5 are too low, rank 4 of 7 is not.
    text = analyse(results, [{**entry, "references": {"a": "b"}}])
    assert "| a | 1 | 4.0 | 2 of 3 |" in text
    assert "| b | 1 | 7.0 | – |" in text


def test_an_endpoint_may_be_about_the_combinations_that_hold_one_sequence():
    results = made_results({"a": [[0.5], [0.7]], "b": [[0.4], [0.5]]})
    with_contrast = results.records["combination"] == "flair+t1ce"
    results.records.loc[with_contrast & (results.records["run"] == "a_s0"), "dice"] = 0.9
    results = StudyResults(results.records, results.trainings, results.sidecar)
    entry = {"title": "t", "kind": "tests", "group": "g", "contrasts": [["a", "b"]]}
    assert "| a − b | +25.00 |" in analyse(results, [entry])  # ((0.7 - 0.4) + 0.2) / 2
    assert "| a − b | +35.00 |" in analyse(results, [{**entry, "shown": "t1ce"}])


def test_a_page_closes_the_tables_that_do_not_answer_the_question():
    results = made_results({"a": [[0.5, 0.6], [0.4, 0.7]], "b": [[0.4, 0.4], [0.3, 0.2]]})
    entry = {"title": "t", "group": "g", "contrasts": [["a", "b"]]}
    closed, answers = {**entry, "kind": "each"}, {**entry, "kind": "tests"}
    assert analyse(results, [answers], fold=True) == analyse(results, [answers])
    plain, page = analyse(results, [closed]), analyse(results, [closed], fold=True)
    opened = '<details markdown="1"><summary>2 rows</summary>\n\n| '
    assert "<details" not in plain and opened in page and page.endswith("|\n\n</details>")
    assert page.replace(opened, "| ").removesuffix("\n\n</details>") == plain
    later = {**closed, "group": "h"}
    assert analyse(results, [later], {"h"}, fold=True) == "Not run: h."


STUDY = Path(__file__).parents[2] / "experiments" / "study"

PUBLISHED = {
    "first": [
        "| 600 steps | 57.2 | 57.2 |",
        "| alone | 55.4 | 1.5 | 67.7 | 57.2 | 41.4 | 47.5 | 56.5 | 60.2 | 61.8 |",
        "| aligned − alone | +0.26 | +0.11 to +0.42 | +0.05 to +0.52 | 0.00486 | 0.0243 | 0.21 | "
        "+0.3 +0.0 +0.5 +0.1 +0.5 +0.4 +0.2 +0.1 |",
        "| distilled-none − alone | -0.64 | -1.21 | +0.79 | -0.05 | -0.50 | -0.48 | -0.14 | "
        "0 better, 0 worse |",
    ],
    "second": [
        "| 6, aligned | 61.9 | 74.3 | 66.2 | 45.2 | -0.15 | -0.22 -0.09 | 0.013 | 4.3 |",
    ],
    "third": [
        "| 2400 steps | 62.3 | 61.9, 63.4, 61.7 |",
        "| distilled-none − alone | +0.10 | -0.00 to +0.20 | -0.06 to +0.30 | 0.0535 | 0.267 | "
        "0.14 | +0.2 +0.1 +0.0 -0.0 +0.3 +0.1 -0.0 +0.1 |",
        "| teacher-uniform | 1 | 0.75 → 0.136 | 0.112 | 0.743 | 4.4 | 0.12 | 0.81 | 0.59 | 19.94 |",
        "| base | 37.0 | 49.8, 56.3, 57.6, 8.0, 34.8, 29.8, 22.6 |",
        "| nmse, λ 1 | 63.2 | 75.2 | 66.5 | 47.8 | +0.28 | +0.02 +0.54 | 0.003 | 3.9 |",
        "| distilled-learned | 62.6 | 75.0 | 65.3 | 47.5 | -0.59 | -0.25 -0.94 | 0.252 | 7.2 |",
    ],
    "backbones": [
        "| unet, plain | 52.9 | 53.7, 52.0, 53.0 |",
        "| rfnet, aligned − rfnet, plain | +0.04 | -2.15 to +2.24 |",
    ],
}


@pytest.mark.parametrize("study", PUBLISHED)
def test_an_older_study_prints_its_published_tables(study, capsys):
    assert main(["analyse", str(STUDY / "plans" / f"{study}.yaml")]) == 0
    printed = capsys.readouterr().out
    for line in PUBLISHED[study]:
        assert line in printed


FOUND = ("README.md", "docs/results/studies.md")


@pytest.mark.parametrize(
    ("pages", "study", "group", "a", "b", "said"),
    [
        (FOUND[:1], "e1", "long", "anchor, case_nce", "anchor, none", "{0} ({1} to {2})"),
        (FOUND[1:], "e1", "long", "anchor, case_nce", "anchor, none", "none | {0} ({1} to {2})"),
        (FOUND, "e1", "long", "anchor, none", "zero, none", "{0} ({1} to {2})"),
        (FOUND[1:], "e1", "short", "anchor, nmse", "anchor, none", "none | {0} ({1} to {2})"),
        (FOUND[1:], "e2", "N = 16", "case_nce", "none", "none | {0} ({1} to {2})"),
        (FOUND[1:], "e2", "N = 32", "case_nce", "none", "none | {0} ({1} to {2})"),
        (FOUND[1:], "e2", "N = 16", "case_nce", "balanced", "often | {0} ({1} to {2})"),
        (FOUND[1:], "e2", "N = 32", "case_nce", "balanced", "often | {0} ({1} to {2})"),
        (FOUND[:1], "e3", "N = 64", "case_nce", "unaligned", "{0} ({1} to {2})"),
        (FOUND[1:], "e3", "N = 16", "nmse", "unaligned", "unaligned | {0} ({1} to {2})"),
        (FOUND[:1], "real", "real", "anchor, case_nce", "anchor, none", "{0} ({1} to {2}, seven"),
        (FOUND[1:], "real", "real", "anchor, case_nce", "anchor, none", "none | {0} ({1} to {2})"),
        (FOUND[:1], "real", "real", "anchor, nmse", "anchor, none", "`nmse` {0} ({1} to {2}"),
        (FOUND[1:], "real", "real", "anchor, nmse", "anchor, none", "none | {0} ({1} to {2})"),
        (FOUND, "real", "real", "anchor, none", "zero, none", "{0} ({1} to {2})"),
    ],
)
def test_sentences_round_what_the_records_say(pages, study, group, a, b, said):
    """Not what a table has rounded already: -0.4504 is -0.45 there, and -0.5 in a sentence."""
    results = StudyResults.read(STUDY / "results" / study)
    blocks = results.whole_blocks(group, [a, b])
    entry = {"group": group, "shown": "t1ce"} if study == "e2" else {"group": group}
    first, second = (endpoint(results, entry, arm, blocks).mean(1) for arm in (a, b))
    ends = stats.ttest_rel(first, second).confidence_interval()
    numbers = ((first - second).mean(), ends.low, ends.high)
    sentence = said.format(*(f"{100 * v:+.1f}".replace("-", "−") for v in numbers))
    for page in pages:
        text = (STUDY.parents[1] / page).read_text(encoding="utf-8")
        assert sentence in " ".join(text.split())


def test_a_study_has_three_files_of_its_own():
    for study in PUBLISHED:
        names = {path.name for path in (STUDY / "results" / study).iterdir()}
        assert names == {"records.parquet", "records.json", "trainings.csv"}


def test_results_are_the_same_after_writing_and_reading(tmp_path):
    results = StudyResults.read(STUDY / "results" / "backbones")
    results.write(tmp_path / "copy")
    again = StudyResults.read(tmp_path / "copy")
    assert again.records.equals(results.records)
    assert again.trainings.equals(results.trainings)
    assert again.sidecar == results.sidecar


def test_a_table_of_an_unknown_kind_group_or_arm_is_refused_with_what_there_is(tmp_path):
    results = StudyResults.read(STUDY / "results" / "backbones")
    with pytest.raises(InputError, match="no kind 'pie'; use one of arms"):
        analyse(results, [{"title": "t", "kind": "pie", "group": "confirm"}])
    with pytest.raises(InputError, match="no group 'explore'; it has confirm, pilot"):
        analyse(results, [{"title": "t", "kind": "arms", "group": "explore"}])
    with pytest.raises(InputError, match="no arm 'none'"):
        analyse(results, [{"title": "t", "kind": "each", "group": "confirm", "arms": ["none"]}])
    with pytest.raises(InputError, match="holds no whole study"):
        StudyResults.read(tmp_path)


def test_a_plan_whose_study_is_missing_is_one_sentence(tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({"name": "none", "title": "none", "tables": []}))
    assert main(["analyse", str(plan), "--results", str(tmp_path)]) == 1
    assert "holds no whole study" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["e1", "e2", "e3", "real"])
def test_a_committed_plan_compares_arms_that_it_can_train(name, tmp_path):
    path = STUDY / "plans" / f"{name}.yaml"
    plan = read_plan(path)
    there = {(t.group, t.arm) for t in plan.trainings}
    for table in plan.tables:
        named = list(table.get("arms", []))
        for item in table.get("contrasts", []):
            named += item["weights"] if isinstance(item, dict) else item
        group = table["group"]
        assert {(group, arm) for arm in named} <= there, table["title"]
        assert group in {t.group for t in plan.trainings}
    for one in {(t.group, t.arm): t for t in plan.trainings}.values():
        build(one.settings["module"])
        names = {type(c).__name__ for c in one_training.callbacks(one, tmp_path)}
        kinds = {"align": "PmixAlignment", "distill": "Distillation", "gap": "GapMonitor"}
        assert names == {kind for key, kind in kinds.items() if one.settings.get(key)}
    # Any beginning of the order has every arm of its seeds: a study cut short stays balanced.
    first = [t for t in plan.trainings if t.seed == plan.trainings[0].seed]
    group = first[0].group
    assert [t.arm for t in plan.trainings[: len([t for t in first if t.group == group])]] == [
        t.arm for t in first if t.group == group
    ]
