from __future__ import annotations

import pickle
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pmixseg.evaluation.scores.case_scores import CaseMeans
from pmixseg.evaluation.scores.metrics import CaseMetrics, Conventions
from pmixseg.task import BRATS
from tests.processes import run_two

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


def numbers_of(i):
    """Every measure of every region of one case."""
    prediction, truth, spacing, _ = case(i)
    rows = CaseMetrics(truth, BRATS, spacing, RULES).score(prediction)
    return torch.tensor([[float(row[m]) for m in MEASURES] for row in rows])


def filled(numbers):
    means = CaseMeans([len(BRATS.regions), len(MEASURES)])
    for i in numbers:
        means.update(numbers_of(i), f"case{i}")
    return means


def test_means_of_case_metrics_by_region():
    assert len(MEASURES) == 17  # every number that a record holds, lesion-wise ones included
    expected = np.nanmean([numbers_of(i).double().numpy() for i in range(4)], axis=0)
    np.testing.assert_allclose(filled(range(4)).compute().numpy(), expected, rtol=1e-6)


def test_a_repeated_case_counts_once():
    once, twice = filled([0, 1, 2]).compute(), filled([0, 1, 2, 1, 0, 0]).compute()
    torch.testing.assert_close(once, twice, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_reset_forgets_and_no_case_gives_nan():
    scores = filled([0, 1])
    scores.reset()
    assert scores.compute().isnan().all()
    scores.update(numbers_of(2), "case2")
    torch.testing.assert_close(
        scores.compute(), filled([2]).compute(), rtol=0, atol=0, equal_nan=True
    )


# Uneven shares with a repeated case, and a rank that sees nothing.
SHARES = (([0, 2, 4], [1, 3, 0]), ([0, 1, 2, 3, 4], []))


def _rank(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for i, shares in enumerate(SHARES):
        results[rank, i] = filled(shares[rank]).compute().numpy().tobytes()
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_equal_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        run_two(_rank, port, results)
        alone = filled(range(5)).compute().numpy().tobytes()
        assert dict(results) == {(rank, i): alone for rank in range(2) for i in range(len(SHARES))}


def test_scores_survive_pickling_and_a_move():
    scores = filled([0, 1])
    copy = pickle.loads(pickle.dumps(scores)).to(torch.device("cpu"))
    torch.testing.assert_close(copy.compute(), scores.compute(), rtol=0, atol=0, equal_nan=True)
