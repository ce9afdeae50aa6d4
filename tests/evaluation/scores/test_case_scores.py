from __future__ import annotations

import math
import pickle
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pmixseg.errors import InputError
from pmixseg.evaluation.scores.case_scores import CaseScores
from pmixseg.evaluation.scores.metrics import CaseMetrics, Conventions
from pmixseg.task import BRATS

RULES = Conventions(hd95="one", lesion="brats2023-gli")
MEASURES = tuple(
    m
    for m in CaseMetrics(np.zeros((1, 1, 1), np.uint8), BRATS, (1, 1, 1), RULES).measures
    if m != "empty"
)


def case(i):
    rng = np.random.default_rng(i)
    truth = rng.integers(0, 4 if i % 3 else 3, (6, 7, 8)).astype(np.uint8)
    return rng.integers(0, 4, truth.shape).astype(np.uint8), truth, (1.0, 1.0, 2.0), f"case{i}"


def filled(numbers):
    scores = CaseScores(BRATS, MEASURES, RULES)
    for i in numbers:
        scores.update(*case(i))
    return scores


def test_means_of_case_metrics_by_region():
    assert len(MEASURES) == 17  # every number that a record holds, lesion-wise ones included
    found = filled(range(4)).compute()
    for region in range(3):
        rows = []
        for i in range(4):
            prediction, truth, spacing, _ = case(i)
            rows.append(CaseMetrics(truth, BRATS, spacing, RULES).score(prediction)[region])
        for measure in MEASURES:
            values = [float(r[measure]) for r in rows]
            expected = np.nanmean(values)
            name = f"{measure}/{rows[0]['region']}"
            assert found[name].item() == pytest.approx(expected, rel=1e-6), name
    by_region = [found[f"dice/{r}"].item() for r in BRATS.regions]
    assert found["dice"].item() == pytest.approx(np.mean(by_region))


def test_a_repeated_case_counts_once():
    once, twice = filled([0, 1, 2]).compute(), filled([0, 1, 2, 1, 0, 0]).compute()
    assert {k: v.item() for k, v in once.items()} == {k: v.item() for k, v in twice.items()}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_reset_forgets_and_no_case_gives_nan():
    scores = filled([0, 1])
    scores.reset()
    assert all(math.isnan(v) for v in scores.compute().values())
    scores.update(*case(2))
    assert scores.compute()["dice"] == filled([2]).compute()["dice"]


def test_unknown_measures_are_refused():
    for measures in (("dicee",), ("empty",), ()):
        with pytest.raises(InputError, match="measures"):
            CaseScores(BRATS, measures)


# Uneven shares with a repeated case, and a rank that sees nothing.
SHARES = (([0, 2, 4], [1, 3, 0]), ([0, 1, 2, 3, 4], []))


def _rank(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for i, shares in enumerate(SHARES):
        found = filled(shares[rank]).compute()
        results[rank, i] = {k: v.item() for k, v in found.items()}
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_equal_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (port, results), nprocs=2)
        alone = {k: v.item() for k, v in filled(range(5)).compute().items()}
        assert dict(results) == {(rank, i): alone for rank in range(2) for i in range(len(SHARES))}


def test_moves_and_survives_pickling():
    scores = filled([0, 1])
    copy = pickle.loads(pickle.dumps(scores)).to(torch.device("cpu"))
    assert copy.compute()["hd95"] == scores.compute()["hd95"]
