"""The runner of studies: plans, cases, a whole small study, stops of every kind, its tables."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from experiments.study import training as one_training
from experiments.study.__main__ import fitted, main
from experiments.study.cohorts import Cases, StudyData
from experiments.study.plan import read_plan
from experiments.study.results import StudyResults
from experiments.study.runner import Runner
from pmixseg.errors import InputError

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
SMALL = yaml.safe_load("""
name: small
title: A small study
cohort: {train: 4, val: 1, test: 2, seed: 5, spacing: 6.0, shape: [16, 16, 16]}
seeds: [1, 2]
training:
  steps: 2
  module:
    class_path: pmixseg.StudentModule
    init_args:
      backbone:
        class_path: pmixseg.backbones.MultiEncoderUNet
        init_args: {width: 4, levels: 2, stem: 2}
      fill: zero
      evaluation: {window: [16, 16, 16]}
  data: {patch_size: [16, 16, 16], batch_size: 2, foreground: 0.0}
  gap: {cases: 1, points: 32}
groups: {few: {cases: {count: 2}}}
arms:
  alone: null
  aligned:
    align:
      ratio: 0.1
      ratio_steps: 1
      anchor: {class_path: pmixseg.losses.MixtureAnchor, init_args: {weights: uniform}}
  teacher: {module.class_path: pmixseg.TeacherModule, gap: null}
  taught:
    needs: teacher
    gap: null
    distill:
      weight: 1.0
      terms: {logit: {class_path: pmixseg.losses.LogitKL, init_args: {}}}
    each: {module.init_args.combination: [t1, flair]}
tables:
- {title: Arms, kind: arms, group: few, arms: [alone, aligned, taught]}
- {title: Test, kind: tests, group: few, contrasts: [[aligned, alone]]}
- {title: Cases, kind: cases, group: few, arms: [alone, aligned]}
- title: Gap
  kind: gap
  group: few
  arms: [alone, aligned]
  measures: [ratio, rank_within, decodability, decodability/WT]
  references: {aligned: alone}
- {title: Cost, kind: figures, group: few, columns: [cpu_seconds]}
""")


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL, sort_keys=False))
    return path


def command(plan_file, folder, *more):
    places = ["--work", str(folder / "work"), "--results", str(folder / "results")]
    return ["run", str(plan_file), *places, *more]


@pytest.fixture(scope="module")
def ran(plan_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ran")
    assert main(command(plan_file, folder)) == 0
    return folder


# ------------------------------------------------------------------------------ plans


def test_a_plan_runs_seed_by_seed_and_a_teacher_before_its_students(plan_file):
    plan = read_plan(plan_file)
    assert [t.name for t in plan.trainings[:5]] == [
        "few_alone_s1",
        "few_aligned_s1",
        "few_teacher_s1",
        "few_taught_t1_s1",
        "few_taught_flair_s1",
    ]
    assert [t.seed for t in plan.trainings] == [1] * 5 + [2] * 5
    teacher, student = plan.trainings[2:4]
    assert (teacher.kept, student.kept) == (True, False)
    assert student.needs == teacher.name
    assert student.settings["module"]["init_args"]["combination"] == "t1"
    assert "combination" not in plan.trainings[0].settings["module"]["init_args"]
    assert plan.trainings[0].settings["cases"] == {"count": 2}


def test_groups_may_be_the_outer_order_and_an_arm_may_keep_to_one(tmp_path):
    path = tmp_path / "plan.yaml"
    raw = {**SMALL, "groups": {"a": None, "b": {"steps": 7}}, "order": "group"}
    raw["arms"] = {"alone": None, "extra": {"groups": ["b"]}}
    path.write_text(yaml.safe_dump(raw))
    plan = read_plan(path)
    assert [(t.group, t.arm, t.seed) for t in plan.trainings] == [
        ("a", "alone", 1),
        ("a", "alone", 2),
        ("b", "alone", 1),
        ("b", "extra", 1),
        ("b", "alone", 2),
        ("b", "extra", 2),
    ]
    assert [t.settings["steps"] for t in plan.trainings] == [2, 2, 7, 7, 7, 7]
    assert [t.group for t in plan.only(groups=["a"]).trainings] == ["a", "a"]
    with pytest.raises(InputError, match="its groups are a, b"):
        plan.only(groups=["c"])


def test_a_plan_with_an_unknown_key_or_arm_is_refused(tmp_path):
    path = tmp_path / "plan.yaml"
    for change, message in (
        ({"stages": []}, r"unknown keys \['stages'\]"),
        ({"training": {**SMALL["training"], "speed": 1}}, r"unknown keys \['speed'\]"),
        ({"arms": {"x": {"needs": "y"}}}, r"arms \['y'\] are needed"),
    ):
        path.write_text(yaml.safe_dump({**SMALL, **change}))
        with pytest.raises(InputError, match=message):
            read_plan(path)


def test_a_fingerprint_follows_the_settings_and_the_seed(plan_file):
    first = read_plan(plan_file).trainings[0]
    assert first.fingerprint == read_plan(plan_file).trainings[0].fingerprint
    changed = read_plan(plan_file, {"training.steps": 3}).trainings[0]
    assert changed.settings["steps"] == 3
    assert len({first.fingerprint, changed.fingerprint, replace(first, seed=9).fingerprint}) == 3


# ------------------------------------------------------------------------------ cases


def test_cases_are_drawn_by_the_seed_and_the_rare_are_among_them():
    names = [f"c{i}" for i in range(10)]
    chosen, having = Cases(count=6, rare="t1ce", having=2).draw(names, seed=3)
    assert len(chosen) == 6
    assert len(having) == 2
    assert set(having) < set(chosen) < set(names)
    assert Cases(count=6, rare="t1ce", having=2).draw(names, seed=3) == (chosen, having)
    assert Cases(count=6, rare="t1ce", having=2).draw(names, seed=4) != (chosen, having)
    assert Cases().draw(names, seed=3) == (names, names)
    with pytest.raises(InputError, match="cannot be drawn from 10"):
        Cases(count=11).draw(names, seed=3)


def test_a_rare_sequence_is_withheld_in_training_only_and_balance_draws_it_as_often(ran, tmp_path):
    folder = ran / "work" / "small" / one_training.COHORT
    common = {"patch_size": (16, 16, 16), "batch_size": 1, "augmentation": False}
    plain = Cases(rare="t1ce", having=1)
    data = StudyData(folder, tmp_path / "plain", plain, 1, **common)
    data.setup("fit")
    shown = [bool(batch["acquired"][0, 1]) for batch in data.train_dataloader()]
    assert sorted(shown) == [False, False, False, True]
    assert all(bool(item["acquired"].all()) for item in data.items("test"))
    even = StudyData(folder, tmp_path / "even", replace(plain, balanced=True), 1, **common)
    even.setup("fit")
    shown = [bool(batch["acquired"][0, 1]) for batch in even.train_dataloader()]
    assert sorted(shown) == [False] * 3 + [True] * 3
    assert set(even.training_cases) == set(data.training_cases)


# ------------------------------------------------------------------------------ running


def test_a_whole_study_leaves_three_files_and_prints_its_tables(ran, plan_file, capsys):
    results = StudyResults.read(ran / "results" / "small")
    assert len(results.trainings) == 10
    # 15 combinations of two cases and three regions; a teacher has one, a student of one as well.
    rows = results.records.groupby("run").size()
    assert rows["few_alone_s1"] == 15 * 2 * 3
    assert rows["few_teacher_s2"] == rows["few_taught_t1_s1"] == 2 * 3
    assert set(results.run("few_taught_t1_s1")["combination"]) == {"t1"}
    first = results.trainings.set_index("run").loc["few_aligned_s1"]
    assert first["gap/level1/ratio"] > 0
    assert first["gap_before/level1/ratio"] > 0
    assert first["steps"] == 2
    assert first["align/weight"] > 0
    assert main(["analyse", str(plan_file), "--results", str(ran / "results")]) == 0
    printed = capsys.readouterr().out
    assert "| aligned − alone |" in printed
    assert "Seeds 1, 2; 2 cases." in printed
    gap = printed.split("### Gap")[1].split("###")[0]
    assert "| collapsed |" in gap
    assert gap.count(" of 2 |") == 2  # of the aligned arm, at both levels


def test_what_has_ended_is_not_repeated(ran, plan_file, capsys):
    before = {p: p.stat().st_mtime_ns for p in (ran / "work").rglob("*.json")}
    assert main(command(plan_file, ran)) == 0
    assert {p: p.stat().st_mtime_ns for p in (ran / "work").rglob("*.json")} == before
    assert main(["status", str(plan_file), "--results", str(ran / "results")]) == 0
    assert "small: 10 of 10 ended" in capsys.readouterr().out


class Begun(Exception):
    """A training would begin with this module and these data."""


def test_the_seed_drives_weights_batches_augmentation_and_missingness(
    ran, plan_file, monkeypatch, caplog
):
    # A training silences Lightning for its process; caplog takes that back at the end.
    caplog.set_level("INFO", logger="lightning.pytorch")

    def begin(trainer, module, data):
        raise Begun(module, data)

    monkeypatch.setattr(one_training.Trainer, "fit", begin)
    plan = read_plan(plan_file, {"groups": {"few": None}, "training.data.batch_size": 4})
    trainings = {(t.arm, t.seed): t for t in plan.trainings}

    def beginning(arm, seed):
        with pytest.raises(Begun) as begun:
            one_training.train(trainings[arm, seed], plan.cohort, ran / "work" / "small")
        module, data = begun.value.args
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        # A patch, its augmentation and what is hidden of it are functions of its key.
        shown = module.draw_present(batch)
        weights = torch.cat([p.detach().flatten() for p in module.backbone.parameters()])
        return {
            "weights": weights,
            "order": torch.tensor([int(case[-3:]) for case in batch["case_id"]]),
            "keys": batch["key"],
            "missingness": shown,
        }

    first, again, arm, other = (
        beginning(*which) for which in [("alone", 1), ("alone", 1), ("aligned", 1), ("alone", 2)]
    )
    for name, value in first.items():
        assert torch.equal(value, again[name]) and torch.equal(value, arm[name]), name
        assert not torch.equal(value, other[name]), name


def descendants(process):
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [*children, *(each for child in children for each in descendants(child))]


def test_a_study_killed_at_any_moment_goes_on_to_the_same_results(ran, plan_file, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first_seed = command(plan_file, tmp_path, "--set", "seeds=[1]")
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.study", *first_seed, "--jobs", "2"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    ended = tmp_path / "work" / "small" / one_training.ENDED
    for _ in range(1200):
        if list(ended.glob("*.json")):
            break
        time.sleep(0.1)
    children = descendants(process.pid)
    assert len(children) > 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < len(list(ended.glob("*.json"))) < 5
    assert not (tmp_path / "results" / "small").exists()
    for _ in range(100):
        if not any(Path(f"/proc/{child}/cmdline").exists() for child in children):
            break
        time.sleep(0.1)
    else:
        pytest.fail("processes outlived the one that began them")
    assert main(first_seed) == 0
    whole = StudyResults.read(ran / "results" / "small").records
    again = StudyResults.read(tmp_path / "results" / "small").records
    of_first = whole[whole["run"].str.endswith("_s1")].reset_index(drop=True)
    pd.testing.assert_frame_equal(again.reset_index(drop=True), of_first)


def test_nothing_is_begun_that_would_not_end_in_time(plan_file, tmp_path, capsys):
    (tmp_path / "work").mkdir()
    more = ["--minutes", "0.05", "--set", "training.seconds=60"]
    assert main(command(plan_file, tmp_path, *more)) == 3
    assert "small: 0 of 10 ended" in capsys.readouterr().out
    assert not (tmp_path / "work" / "small" / one_training.ENDED).exists()


def test_steps_are_fitted_to_the_time_once_and_alike(ran, plan_file, tmp_path):
    class Clock(Runner):
        """A runner of two processes with 200 s left, in each of which 10 steps take a second."""

        def speed(self, trainings):
            assert [t.trial for t in trainings] == [True, True]
            assert {t.settings["gap"] for t in trainings} == {None}
            return 10.0

    plan = read_plan(plan_file, {"training.steps": 10_000})
    # Five trainings of one seed are three waves: 10 · (200 · 0.85 / 3 − 15) = 416.7.
    runner = Clock(plan.cohort, tmp_path, jobs=2, until=time.monotonic() + 200, tell=str)
    first = fitted(plan, 1, runner, tmp_path / "steps.json", tmp_path)
    assert {t.settings["steps"] for t in first.trainings} == {400}
    assert len(first.trainings) == len(plan.trainings)
    # Ten of two seeds are five waves, but the choice stands.
    again = fitted(plan, 2, runner, tmp_path / "steps.json", tmp_path)
    assert {t.settings["steps"] for t in again.trainings} == {400}
    other = fitted(plan, 2, runner, tmp_path / "other.json", tmp_path)
    assert {t.settings["steps"] for t in other.trainings} == {180}
    few = fitted(read_plan(plan_file), 1, runner, tmp_path / "few.json", tmp_path)
    assert {t.settings["steps"] for t in few.trainings} == {2}
    shutil.copytree(ran / "results" / "small", tmp_path / "results")
    known = fitted(plan, 2, runner, tmp_path / "none.json", tmp_path / "results")
    assert {t.settings["steps"] for t in known.trainings} == {2}
    late = replace(runner, until=time.monotonic() + 30)
    with pytest.raises(InputError, match="too few for a training"):
        fitted(plan, 2, late, tmp_path / "late.json", tmp_path)


def test_steps_of_two_lengths_are_not_fitted(plan_file, tmp_path, capsys):
    two = ["--fit", "1", "--set", "groups={a: {}, b: {steps: 3}}"]
    assert main(command(plan_file, tmp_path, *two)) == 1
    assert "needs one length, and the plan has [2, 3]" in capsys.readouterr().err


def test_a_trial_tells_its_speed_and_leaves_nothing(ran, plan_file, tmp_path):
    plan = read_plan(plan_file, {"training.steps": 25, "training.gap": None})
    work = tmp_path / "work"
    work.mkdir()
    (work / one_training.COHORT).symlink_to(ran / "work" / "small" / one_training.COHORT)
    runner = Runner(plan.cohort, work)
    speed = runner.speed([replace(plan.trainings[0], trial=True)])
    runner.stop()
    assert speed > 0
    assert not (work / one_training.ENDED).exists()


def test_a_training_that_fails_is_named_and_stops_no_other(ran, plan_file, tmp_path):
    plan = read_plan(plan_file)
    bad = replace(plan.trainings[0], settings={**plan.trainings[0].settings, "steps": "many"})
    told = []
    work = ran / "work" / "small"
    runner = Runner(plan.cohort, work, tell=told.append)
    good = replace(plan.trainings[1], group="again")
    figures = runner.run([bad, good], set())
    runner.stop()
    assert [f["run"] for f in figures] == ["again_aligned_s1"]
    assert list(runner.failed) == [bad.name]
    assert any(f"{bad.name} failed" in line for line in told)


def test_results_of_other_settings_are_not_mixed(ran, plan_file, capsys):
    assert main(command(plan_file, ran, "--set", "training.steps=3")) == 1
    assert "ended with other settings" in capsys.readouterr().err


def test_records_of_scans_hold_no_names(ran, plan_file):
    cohort = replace(read_plan(plan_file).cohort, anonymous=True)
    shown = cohort.shown_names(ran / "work" / "small" / one_training.COHORT)
    assert sorted(shown.values()) == [f"case0{n}" for n in range(1, 8)]


def test_tables_go_between_the_marks_of_a_page(ran, plan_file, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("head\n<!-- small: begin -->\nold\n<!-- small: end -->\ntail\n")
    command = ["analyse", str(plan_file), "--results", str(ran / "results"), "--into", str(page)]
    assert main(command) == 0
    first = page.read_text()
    assert first.startswith("head\n<!-- small: begin -->\n\n### Arms")
    assert first.endswith("<!-- small: end -->\ntail\n")
    assert "old" not in first
    assert main(command) == 0
    assert page.read_text() == first
    page.write_text("nothing")
    assert main(command) == 1
    assert "lacks the lines" in capsys.readouterr().err
