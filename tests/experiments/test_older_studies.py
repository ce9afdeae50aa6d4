"""Committed studies: records give the tables that were published, plans can be trained."""

from pathlib import Path

import pytest
import yaml

from experiments.study import training as one_training
from experiments.study.__main__ import main
from experiments.study.analysis import analyse
from experiments.study.plan import read_plan
from experiments.study.results import StudyResults
from pmixseg.describe import build
from pmixseg.errors import InputError

STUDY = Path(__file__).parents[2] / "experiments" / "study"

PUBLISHED = {
    "first": [
        "| 600 steps | 57.2 | 57.2 |",
        "| alone | 55.4 | 1.5 | 67.7 | 57.2 | 41.4 | 47.5 | 56.5 | 60.2 | 61.8 |",
        "| aligned − alone | +0.26 | +0.11 to +0.42 | +0.05 to +0.52 | 0.00486 | 0.0243 | 0.21 | "
        "+0.3 +0.0 +0.5 +0.1 +0.5 +0.4 +0.2 +0.1 |",
        "| distilled-none − alone | -0.64 | -1.21 | +0.79 | -0.05 | -0.50 | -0.48 | -0.14 | "
        "0 better, 5 worse |",
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
