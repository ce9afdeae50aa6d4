"""The campaign on what `report`, `compare` and `load` read: records, logs, pictures, weights."""

import shutil

import pandas as pd
import pytest
import torch

import pmixseg
from pmixseg.errors import InputError
from pmixseg.evaluation.comparison.compare import compare
from pmixseg.evaluation.gap.changes import read_gap_changes
from pmixseg.evaluation.records.curves import read_curves
from pmixseg.evaluation.records.examples import Example, examples_of
from pmixseg.evaluation.records.records import Records, read_comparable
from pmixseg.evaluation.records.tables import tabulate
from pmixseg.evaluation.report.pictures import panels, viewer_case
from pmixseg.evaluation.report.summary import region_summaries
from tests.campaign.judging import Generator, Tally, campaign, damage_text, flip_bits, run
from tests.campaign.test_data_inputs import SEEDS, check
from tests.evaluation.made_up import made_up_rows, make_run
from tests.inference.tiny_models import Glance, save, tiny_student

FEW = 10
"""Seeds in the default suite."""


def asked(ask):
    """An exit code as the command line gives it."""

    def call():
        try:
            ask()
        except InputError as error:
            print(error)  # noqa: T201  # as the command does
            return 1
        return 0

    return run(call)


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


class Checkpoints(Generator):
    """A checkpoint of which the file, or a value, is damaged."""

    name = "checkpoint"
    odd = (None, -1, 1e999, float("nan"), "x", "../x", [], {}, [[]], True, 10**30, torch.ones(2))

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
        trail, here = [], content
        while isinstance(here, dict) and here and (not trail or random.random() < 0.85):
            key = sorted(here)[int(random.integers(len(here)))]
            trail.append(key)
            place, here = here, here[key]
        if kind == 3:
            del place[key]
            done = "removed"
        else:
            value = self.odd[int(random.integers(len(self.odd)))]
            place[key] = value
            done = f"is {value!r}"
        torch.save(content, path)
        return f"{trail} {done}"

    def use(self, folder):
        return asked(lambda: pmixseg.load(folder / "x.ckpt", modules=[Glance.__module__]))

    def is_right(self, folder):
        loaded = pmixseg.load(folder / "x.ckpt", modules=[Glance.__module__]).state_dict()
        same = [torch.equal(v, loaded[k]) for k, v in self.weights.items() if k in loaded]
        return len(same) == len(self.weights) and all(same)


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
def test_results(runs, tmp_path, seeds, ending):
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    tally = Tally()
    campaign(Results(runs, ending), seeds, tmp_path / "work", tmp_path / "faults", tally)
    check(tally, tmp_path / "faults")


@pytest.mark.parametrize("seeds", SIZES)
def test_checkpoints(checkpoint, tmp_path, seeds):
    tally = Tally()
    campaign(Checkpoints(checkpoint), seeds, tmp_path / "work", tmp_path / "faults", tally)
    check(tally, tmp_path / "faults")
