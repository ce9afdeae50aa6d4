"""What alignment adds to a training step, in time and memory.

Run ``python experiments/benchmarks/alignment.py``. Whole steps of the module (encode, fill, decode,
Dice + cross-entropy, terms, backward, optimizer), arm after arm in turn within one process, so
that whatever else the machine does meets all alike; the ratio is the median over rounds of an
arm's processor time over that of its baseline in the same round. Memory: growth of the peak
resident set over three steps, a process per arm.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from pmixseg import BRATS, PmixAlignment, SegmentationModule, StudentModule, TeacherModule
from pmixseg.backbones import MultiEncoderUNet
from pmixseg.losses.term import TermWeight

BASELINES = {"teacher": TeacherModule, "student": StudentModule}
DISTANCES = (
    "case_nce",
    "nmse",
    "mse",
    "smooth_l1",
    "cosine",
    "kl",
    "joint",
    "mmd",
    "sliced_wasserstein",
)
ARMS = (
    "teacher",
    *(f"teacher {d}" for d in DISTANCES),
    "student",
    "student case_nce",
    "student nmse",
    "student complete",
    "student complete case_nce",
    "student complete nmse",
)
"""``complete``: the student is shown everything, so that nothing is encoded for alignment alone."""


def silent(*args: Any, **kwargs: Any) -> None:
    """Stands in for Lightning's log."""


def make(arm: str, size: int, batch: int) -> Callable[[], None]:
    """One training step of an arm."""
    torch.manual_seed(0)
    kind, *rest = arm.split()
    net = MultiEncoderUNet(BRATS.modalities, BRATS.num_classes, width=16, levels=4)
    module: SegmentationModule = BASELINES[kind](backbone=net)
    module.log = module.log_dict = silent  # type: ignore[method-assign]  # there is no Trainer
    if rest and rest[-1] != "complete":
        callback = PmixAlignment(weight=0.1, distance=rest[-1])
        module.add_term("align", callback.build_term(module), TermWeight(0.1))
    if "complete" in rest:
        module.draw_present = lambda step: step["acquired"]  # type: ignore[method-assign]  # see ARMS
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    data: Any = {
        "image": torch.randn(batch, 4, size, size, size, generator=generator),
        "label": torch.randint(0, 4, (batch, size, size, size), generator=generator),
        "case_id": [str(i) for i in range(batch)],
        "acquired": torch.ones(batch, 4, dtype=torch.bool),
        "key": torch.arange(batch) + 5,
    }

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(data, 0).backward()
        optimizer.step()

    return step


def baseline(arm: str) -> str:
    """The arm without alignment."""
    return " ".join(word for word in arm.split() if word in ("teacher", "student", "complete"))


def measure_times(arms: list[str], rounds: int, size: int, batch: int) -> dict[str, list[float]]:
    """Processor seconds of every arm in every round, on one thread."""
    torch.set_num_threads(1)
    steps = {arm: make(arm, size, batch) for arm in arms}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(rounds):
        # Turned around every other round, so that no arm always follows the same one.
        for arm in arms if number % 2 else arms[::-1]:
            began = time.process_time()
            steps[arm]()
            times[arm].append(time.process_time() - began)
    return times


def peak_growth(arm: str, size: int, batch: int) -> float:
    """MB by which three steps raise the peak resident set, in this process."""
    torch.set_num_threads(1)
    step = make(arm, size, batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", choices=ARMS, metavar="ARM", help="used by the script itself")
    args = parser.parse_args()
    if args.peak:
        print(peak_growth(args.peak, args.size, args.batch))
        return
    # Memory first: Linux counts a new process's peak from that of the process that started it.
    peaks: dict[str, float] = {}
    for arm in () if args.no_memory else args.arms:
        command = [sys.executable, __file__, "--peak", arm, "--size", str(args.size)]
        done = subprocess.run(
            [*command, "--batch", str(args.batch)], capture_output=True, text=True, check=True
        )
        peaks[arm] = float(done.stdout)
    times = measure_times(args.arms, args.rounds, args.size, args.batch)
    print("| step | ms | time | 10 % to 90 % | MB | memory |")
    print("|---|---|---|---|---|---|")
    for arm in args.arms:
        base = baseline(arm)
        if base not in times:
            continue
        ratios = [a / b for a, b in zip(times[arm], times[base], strict=True)]
        deciles = statistics.quantiles(ratios, n=10) if len(ratios) > 1 else [ratios[0]] * 9
        memory = f"{peaks[arm]:.0f} | {peaks[arm] / peaks[base]:.3f} ×" if peaks else "– | –"
        print(
            f"| {arm} | {1000 * statistics.median(times[arm]):.0f} "
            f"| {statistics.median(ratios):.3f} × | {deciles[0]:.3f} to {deciles[-1]:.3f} "
            f"| {memory} |"
        )


if __name__ == "__main__":
    main()
