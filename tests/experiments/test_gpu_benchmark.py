"""The benchmark of a card runs on a CPU: it counts, and rehearses its rows."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "experiments" / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    yield gpu
    for name in ("gpu", "card", "operations", "backbones", "measuring"):
        sys.modules.pop(name, None)  # names that another script may have


def test_without_a_card_it_counts_operations(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu.operations, "STEPS", {})
    monkeypatch.setattr(gpu.operations, "count_host", lambda levels: [(1234, 56)])
    sides = []
    monkeypatch.setattr(gpu.operations, "count_fit", lambda side: sides.append(side) or {"all": 7})
    assert gpu.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("No card here: operations that one would start.")
    assert sides == [32]
    assert "| all | 7 |" in printed
    assert "| Python functions called around the loss of 56 tensors | 1234 |" in printed
    assert "| 36 windows | 34 |" in printed


def test_products_of_attention_are_operations(gpu):
    from measuring import gflop

    keys = torch.randn(1, 2, 50, 8)
    attended = partial(torch.nn.functional.scaled_dot_product_attention, keys, keys, keys)
    # 2 heads; 50 × 50 scores of 8 products each, and as many for the values.
    assert gflop(attended) == pytest.approx(2 * 2 * 2 * 50 * 50 * 8 / 1e9)


def test_rows_are_rehearsed_and_one_that_fails_is_said(gpu, monkeypatch, capsys):
    def broken(bench):
        raise RuntimeError("no such thing")

    monkeypatch.setitem(gpu.ROWS, "several", broken)
    assert gpu.main(["--rehearse", "--rows", "ceilings", "loader", "several"]) == 1
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert sum("convolution 64-64" in row for row in rows) == 4
    assert any(row.startswith("| augmenting a batch | s ") for row in rows)
    assert rows[-1] == "| several failed | RuntimeError: no such thing |"


def test_calls_of_the_driver_are_summed_per_step(gpu):
    calls = gpu.DriverCalls(10)
    events = {"cudaGraphLaunch": (4000, 4), "cudaLaunchKernel": (60, 9), "aten::add": (9000, 2)}
    calls.profile = SimpleNamespace(
        stop=lambda: None,
        key_averages=lambda: [
            SimpleNamespace(key=key, self_cpu_time_total=us, count=n)
            for key, (us, n) in events.items()
        ],
    )
    calls.on_train_end(SimpleNamespace(global_step=12))
    # 4,000 microseconds in two steps; 30 microseconds a step are too few to be told.
    assert calls.milliseconds == {"cudaGraphLaunch (2)": 2.0}


def test_the_host_s_work_does_not_grow_with_the_number_of_parameters(gpu):
    """A walk over a module's parameters, in every step, takes longer than the fused optimizer."""
    (few, tensors), (more, others) = gpu.operations.count_host(2, 3)
    assert others > tensors + 20
    assert more - few <= 3 * (others - tensors)  # torch's own optimizer makes two
    assert few < 1900  # nine tenths of them Lightning's


def test_a_step_of_fit_stays_below_its_bound(gpu):
    counts = gpu.operations.count_fit(side=16)
    assert counts["optimizer"] <= 8
    assert counts["clipping"] <= 12
    assert sum(counts.values()) <= 950
    few, many = (gpu.operations.count_augmentation(16, samples) for samples in (2, 8))
    assert many - few == 6  # one field of noise for each sample
