"""The campaign on what `report`, `compare` and `load` read: records, logs, pictures, weights."""

import shutil

import pandas as pd
import pytest
import torch

import pmixseg
from pmixseg.evaluation.comparison.compare import compare
from pmixseg.evaluation.gap.changes import read_gap_changes
from pmixseg.evaluation.records.curves import read_curves
from pmixseg.evaluation.records.examples import Example, examples_of
from pmixseg.evaluation.records.records import Records, read_comparable
from pmixseg.evaluation.records.tables import tabulate
from pmixseg.evaluation.report.pictures import panels, viewer_case
from pmixseg.evaluation.report.summary import region_summaries
from tests.campaign.judging import (
    Generator,
    Tally,
    asked,
    campaign,
    command,
    damage_text,
    flip_bits,
)
from tests.campaign.test_command_inputs import SMALL
from tests.campaign.test_data_inputs import SEEDS, check
from tests.evaluation.made_up import made_up_rows, make_run
from tests.inference.tiny_models import Glance, save, tiny_student

FEW = 10
"""Seeds in the default suite."""


class Results(Generator):
    """A file of a run folder, damaged."""

    name = "results"

    def __init__(self, healthy, ending):
        self.healthy, self.ending = healthy, ending
        self.table = Records.read(healthy / "a").table

    def damage(self, folder, random):
        shutil.copytree(self.healthy, folder / "runs")
        made = folder / "runs" / "a"
        if self.ending == ".parquet":
            (made / "records.csv").unlink()
            (made / "records.json").unlink()
            Records.read(self.healthy / "a").write(made / "records.parquet")
        files = sorted(p for p in made.rglob("*") if p.suffix == self.ending)
        path = files[int(random.integers(len(files)))]
        raw = path.read_bytes()
        if self.ending in (".csv", ".json"):
            path.write_bytes(damage_text(raw.decode(), random))
        elif random.random() < 0.3:
            path.write_bytes(raw[: int(random.integers(len(raw)))])
        else:
            path.write_bytes(flip_bits(raw, random))
        return f"{path.relative_to(made)}"

    def use(self, folder):
        def ask():
            runs = read_comparable([folder / "runs" / "a", folder / "runs" / "b"])
            tabulate(runs).frame()
            region_summaries(runs)
            compare([runs[0].table], [runs[1].table], "dice", [])
            for picture in examples_of(folder / "runs" / "a").values():
                shown = {"a": Example.load(picture)}
                viewer_case(shown)
                panels(shown, runs[0].task)
            read_curves(folder / "runs" / "a")
            read_gap_changes(folder / "runs" / "a", best=True)

        return asked(ask)

    def is_right(self, folder):
        """Results are those that were written, or are known to be altered."""
        records = Records.read(folder / "runs" / "a")
        return records.altered or self.ending != ".csv" or records.table.equals(self.table)


ODD = (None, -1, 1e999, float("nan"), "x", "../x", [], {}, [[]], True, 10**30, torch.ones(2))


def damage_value(content, random, *, remove):
    """Remove a value of a checkpoint, at any depth, or put an odd one in its place."""
    trail, here = [], content
    while isinstance(here, dict | list) and here and (not trail or random.random() < 0.85):
        keys = sorted(here, key=str) if isinstance(here, dict) else range(len(here))
        key = keys[int(random.integers(len(keys)))]
        trail.append(key)
        place, here = here, here[key]
    if remove:
        del place[key]
        return f"{trail} removed"
    place[key] = ODD[int(random.integers(len(ODD)))]
    return f"{trail} is {place[key]!r}"


class Checkpoints(Generator):
    """A checkpoint of which the file, or a value, is damaged."""

    name = "checkpoint"

    def __init__(self, healthy):
        self.healthy = healthy
        self.weights = pmixseg.load(healthy, modules=[Glance.__module__]).state_dict()

    def damage(self, folder, random):
        path = folder / "x.ckpt"
        raw = self.healthy.read_bytes()
        kind = int(random.integers(5))
        if kind == 0:
            path.write_bytes(raw[: int(random.integers(len(raw)))])
            return "cut"
        if kind <= 2:
            path.write_bytes(flip_bits(raw, random))
            return "bits"
        content = torch.load(self.healthy, weights_only=True)
        done = damage_value(content, random, remove=kind == 3)
        torch.save(content, path)
        return done

    def use(self, folder):
        return asked(lambda: pmixseg.load(folder / "x.ckpt", modules=[Glance.__module__]))

    def is_right(self, folder):
        loaded = pmixseg.load(folder / "x.ckpt", modules=[Glance.__module__]).state_dict()
        same = [torch.equal(v, loaded[k]) for k, v in self.weights.items() if k in loaded]
        return len(same) == len(self.weights) and all(same)


class Trainings(Generator):
    """A checkpoint of which a value of the training's state is damaged, resumed."""

    name = "training"

    def __init__(self, root, store):
        self.healthy = root / "healthy" / "checkpoints" / "last.ckpt"
        self.store = store

    def fit(self, run, epochs, *words):
        return command(
            *("fit", f"--data.store={self.store}", f"--run={run}"),
            *(word for word in SMALL if "fast_dev_run" not in word),
            *("--data.split=pmixseg.data.splits.Fractions", "--model.evaluation.window=[16,16,16]"),
            *("--align.weight=0.1", "--align.distance=case_nce", "--model.scheduler=Polynomial"),
            *("--trainer.callbacks=EMAWeightAveraging", "--trainer.limit_train_batches=1"),
            *("--trainer.limit_val_batches=1", f"--trainer.max_epochs={epochs}", *words),
        )

    def damage(self, folder, random):
        content = torch.load(self.healthy, weights_only=True)
        weights = content.pop("state_dict")  # those are damaged above
        done = damage_value(content, random, remove=random.random() < 0.2)
        torch.save({**content, "state_dict": weights}, folder / "x.ckpt")
        return done

    def use(self, folder):
        return self.fit(folder / "run", 2, f"--ckpt_path={folder / 'x.ckpt'}")

    def is_right(self, folder):
        """A value may be another that is as good; what cannot be used is said."""
        return True


@pytest.fixture(scope="module")
def training(phantom_store, tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    training = Trainings(root, phantom_store)
    assert training.fit(root / "healthy", 1).code == 0
    return training


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name in ("a", "b"):
        rows = [r for r in made_up_rows(3, seed=ord(name)) if "+" not in r["combination"][5:]]
        made = make_run(root, name, rows, pictures=("case_000",))
        log = pd.read_csv(made / "metrics.csv")
        log["gap/level0/ratio"] = log["gap/level0/collapsed"] = [0.5, None, 0.25, None]
        log.to_csv(made / "metrics.csv", index=False)
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tiny_student(backbone=Glance()), tmp_path_factory.mktemp("weights") / "a.ckpt")


SIZES = [
    pytest.param(range(FEW), id="few"),
    pytest.param(range(FEW, SEEDS), id="many", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("seeds", SIZES)
@pytest.mark.parametrize("ending", [".csv", ".json", ".npz", ".parquet"])
def test_damaged_results_cause_no_fault(runs, tmp_path, seeds, ending):
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    tally = Tally()
    campaign(Results(runs, ending), seeds, tmp_path / "work", tmp_path / "faults", tally)
    check(tally, tmp_path / "faults")


@pytest.mark.parametrize("seeds", SIZES)
def test_damaged_checkpoints_cause_no_fault(checkpoint, tmp_path, seeds):
    tally = Tally()
    campaign(Checkpoints(checkpoint), seeds, tmp_path / "work", tmp_path / "faults", tally)
    check(tally, tmp_path / "faults")


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(2), id="few"),
        pytest.param(range(2, 150), id="many", marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
    ],
)
def test_trainings_resumed_from_damage_cause_no_fault(training, tmp_path, seeds):
    tally = Tally()
    campaign(training, seeds, tmp_path / "work", tmp_path / "faults", tally)
    check(tally, tmp_path / "faults")
