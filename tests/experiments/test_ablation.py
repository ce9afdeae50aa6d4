"""The ablation study: its plan holds together, choices follow the numbers, tables add up."""

import dataclasses
import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from pmixseg.task import BRATS

STUDY = Path(__file__).parents[2] / "experiments" / "ablation"


@pytest.fixture(scope="module", autouse=True)
def _importable():
    sys.path.insert(0, str(STUDY))
    yield
    sys.path.remove(str(STUDY))


@pytest.fixture
def weights():
    from arms import Weights

    return Weights(
        0.1,
        {
            "aligned": 0.1,
            "distilled-normal": 0.01,
            "distilled-uniform": 1.0,
            "distilled-learned": 0.1,
        },
    )


def every_job(weights):
    from arms import (
        alignment_jobs,
        confirm_jobs,
        curve_jobs,
        distillation_jobs,
        explore_jobs,
        real_jobs,
    )

    grid = [job for _, job in distillation_jobs()] + [job for *_, job in alignment_jobs(0.1)]
    explored = [job for rows in explore_jobs(weights).values() for _, job in rows]
    named = [job for _, job in (*confirm_jobs(weights), *real_jobs())]
    return [*curve_jobs(), *grid, *named, *explored]


def write(folder, job, dice):
    folder.mkdir(exist_ok=True)
    (folder / f"{job.name}.json").write_text(json.dumps({"dice": dice}))


def test_every_training_has_a_name_of_its_own_and_follows_what_it_needs(weights):
    jobs = every_job(weights)
    by_name = {job.name: job for job in jobs}
    assert len(by_name) == len(set(jobs))
    ended = set()
    for job in jobs:
        assert job.needs <= ended, job.name
        ended.add(job.name)
    for job in by_name.values():
        for other in (by_name[name] for name in job.needs):
            assert (other.seed, other.stage, other.cohort) == (job.seed, job.stage, job.cohort)


def test_arms_of_a_seed_differ_in_what_they_are_named_after(weights):
    from arms import ARMS, SEEDS, confirm_jobs

    jobs = [(arm, job) for arm, job in confirm_jobs(weights) if job.seed == SEEDS[0]]
    arms = dict(jobs)
    assert len(arms) == len(jobs) == 1 + len(ARMS) + 4
    assert len({(j.steps, j.start, j.missing, j.cohort) for a, j in jobs if a != "base"}) == 1
    assert arms["alone"].weight == 0
    assert arms["alone"].teacher is None
    assert (arms["aligned"].anchor, arms["aligned"].weight) == ("uniform", 0.1)
    for anchor, weight in (("none", 0), ("normal", 0.01), ("uniform", 1), ("learned", 0.1)):
        teacher, student = arms[f"teacher-{anchor}"], arms[f"distilled-{anchor}"]
        assert (teacher.anchor, teacher.weight) == (anchor, weight)
        assert (student.teacher, student.distillation) == (teacher.name, 0.1)
        assert student.weight == 0


def test_seeds_that_choose_are_not_those_that_confirm_or_explore():
    from arms import CURVE_SEEDS, EXPLORE_SEEDS, GRID_SEEDS, REAL_SEED, SEEDS

    seeds = (*CURVE_SEEDS, *GRID_SEEDS, *SEEDS, *EXPLORE_SEEDS, REAL_SEED)
    assert len(set(seeds)) == len(seeds) == 3 + 2 + 8 + 2 + 1


def test_choice_takes_the_weight_that_is_best_on_average(tmp_path):
    from arms import alignment_jobs, distillation_jobs
    from choice import choose, choose_distillation

    # Seed 810 alone would choose 1, seed 811 alone 0.01; the mean is best at 0.1.
    dice = {(0.01, 810): 0.1, (0.01, 811): 0.6, (0.1, 810): 0.5, (0.1, 811): 0.5}
    dice |= {(1.0, 810): 0.6, (1.0, 811): 0.2}
    for weight, job in distillation_jobs():
        write(tmp_path, job, dice.get((weight, job.seed), 0.9))
    assert choose_distillation(tmp_path) == 0.1
    for arm, weight, job in alignment_jobs(0.1):
        value = {"aligned": weight, "distilled-normal": -weight}.get(arm, 0.5)
        write(tmp_path, job, value)
    chosen = choose(tmp_path)
    assert chosen.distillation == 0.1
    assert chosen.alignment == {
        "aligned": 1.0,
        "distilled-learned": 0.01,  # equal: the smallest
        "distilled-normal": 0.01,
        "distilled-uniform": 0.01,
    }


def test_choice_refuses_a_grid_that_has_not_ended():
    from choice import best

    with pytest.raises(ValueError, match=r"not every seed .* \[1\.0\]"):
        best([(0.1, 0.5), (0.1, 0.6), (1.0, 0.7)])


def test_dice_under_a_protocol_by_hand():
    from exploratory import under

    records = pd.DataFrame(
        {
            "case": ["a", "a", "b", "b"],
            "combination": ["t1", "t1+t1ce", "t1", "t1+t1ce"],
            "dice": [0.2, 0.6, 0.4, 1.0],
        }
    )
    chances = pd.DataFrame(
        {"case": ["a", "a", "b"], "combination": ["t1", "t1+t1ce", "t1"], "weight": [0.25, 0.75, 1]}
    )
    assert under(records, "uniform", chances) == pytest.approx(0.55)
    assert under(records, "no-contrast", chances) == pytest.approx(0.3)
    # a: 0.25 · 0.2 + 0.75 · 0.6 = 0.5; b: 0.4.
    assert under(records, "not-at-random", chances) == pytest.approx(0.45)
    with pytest.raises(ValueError, match="use one of"):
        under(records, "lunar", chances)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Every kind of training, two steps long, in this process."""
    import arms
    import cohorts
    import study

    budget = dataclasses.replace(study.BUDGET, train=4, val=2, test=2, base_steps=2, steps=2)
    work = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "BUDGET", budget)
        patch.setattr(cohorts, "BUDGET", budget)
        weights = arms.Weights(
            0.1, dict.fromkeys(("aligned", *(f"distilled-{a}" for a in arms.ANCHORS)), 0.1)
        )
        confirm = [j for _, j in arms.confirm_jobs(weights) if j.seed == arms.SEEDS[0]]
        explored = arms.explore_jobs(weights)
        some = [
            job
            for question in ("missingness", "modalities")
            for row, job in explored[question]
            if job.seed == arms.EXPLORE_SEEDS[0] and not row.startswith(("3", "4", "5", "6"))
        ]
        yield work, weights, confirm, list(dict.fromkeys(some))


def test_trainings_run_and_their_tables_are_written(tiny, tmp_path):
    import analyse
    import cohorts
    import confirmatory
    import exploratory
    import training
    from results import Results

    work, weights, confirm, some = tiny
    folder = tmp_path / "results"
    for job in [*confirm, *some]:
        cohorts.make_cohort(work, job.cohort)
        found = training.train_job(job, work, folder)
        assert 0 <= found["dice"] <= 1
        assert json.loads((folder / f"{job.name}.json").read_text())["job"]["seed"] == job.seed
    results = Results(folder)
    for job in confirm:  # a second seed, a little worse
        other = folder / job.name.replace("_s40", "_s41")
        wide = pd.read_csv(folder / f"{job.name}.csv")
        wide[list(BRATS.regions)] *= 0.9 if job.weight else 0.8
        wide.to_csv(f"{other}.csv", index=False)
        other.with_name(f"{other.name}.json").write_text((folder / f"{job.name}.json").read_text())

    table = results.records(confirm[1])
    assert len(table) == 2 * 15 * 3
    teacher = next(job for job in confirm if job.role == "teacher")
    assert set(results.records(teacher)["n_present"]) == {4}  # not meant for less

    seeds = confirmatory.whole_seeds(results, weights)
    assert list(seeds) == [40, 41]
    tested = confirmatory.comparisons(results, seeds)
    written = confirmatory.primary(tested)
    dice = {
        (s, arm): results.records(seeds[s][arm])["dice"].mean()
        for s in seeds
        for arm in ("aligned", "alone")
    }
    shift = 50 * sum(dice[s, "aligned"] - dice[s, "alone"] for s in seeds)
    assert f"| aligned − alone | {shift:+.2f} |" in written

    chances = cohorts.protocol_weights(work, draws=20)
    assert chances.groupby("case")["weight"].sum().tolist() == pytest.approx([1, 1])
    chances.to_csv(folder / exploratory.TEST_WEIGHTS, index=False)
    titles = [title for title, _ in exploratory.tables(results, weights)]
    assert titles == ["Exploratory: missingness in training × at test (1 of 2 seeds)"]
    assert analyse.sections(results) == []  # nothing before the grid has ended

    (folder / f"{confirm[-1].name}.json").unlink()
    assert list(confirmatory.whole_seeds(results, weights)) == [41]


def test_protocols_take_modalities_for_good(tiny):
    import cohorts
    from study import Job

    work, *_ = tiny
    cohorts.make_cohort(work, "default")

    def acquired(missing):
        data = cohorts.data_module(Job("explore", "base", 0, 2, missing=missing), work)
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        return batch["acquired"], batch["image"]

    flags, _ = acquired("uniform")
    assert flags.all()
    flags, image = acquired("no-contrast")
    ce = BRATS.modalities.index("t1ce")
    assert not flags[:, ce].any()
    assert flags.sum() == 12
    assert not image[:, ce].any()
    flags, _ = acquired("not-at-random")
    assert flags.any(1).all()
    assert not flags.all()


@pytest.mark.real
def test_real_scans_are_left_out_one_by_one(tmp_path, real_root, weights, monkeypatch):
    import arms
    import cohorts
    import real
    import study
    import training
    from results import Results

    quick = dataclasses.replace(study.REAL_BUDGET, base_steps=1, steps=1, shape=(16, 16, 16))
    monkeypatch.setattr(study, "REAL_BUDGET", quick)
    cohorts.make_real(tmp_path, real_root)
    jobs = dict(arms.real_jobs()[:2])
    for arm in ("base", "alone"):
        training.train_job(jobs[arm], tmp_path, tmp_path / "results")
    results = Results(tmp_path / "results")
    assert set(results.records(jobs["alone"])["case"]) == {"BraTS2021_00000"}
    train = json.loads((tmp_path / "real0" / "split.json").read_text())["train"]
    assert len(train) == 6
    assert "BraTS2021_00000" not in train
    assert real.whole_folds(results) == []  # the other arms have not ended
