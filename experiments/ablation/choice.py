"""Which weights the grid chose: the best mean Dice on validation cases over the grid's seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from arms import GRID_SEEDS, Weights, alignment_jobs, distillation_jobs
from study import Job


def dice(results: Path, job: Job) -> float:
    """Mean Dice of a training over cases, combinations and regions."""
    found: dict[str, Any] = json.loads((results / f"{job.name}.json").read_text())
    return float(found["dice"])


def best(scores: Iterable[tuple[float, float]]) -> float:
    """The weight with the largest mean score; of equal ones the smallest.

    Args:
        scores: pairs (weight, score), one per seed.
    """
    by_weight: dict[float, list[float]] = {}
    for weight, score in scores:
        by_weight.setdefault(weight, []).append(score)
    short = [weight for weight, found in by_weight.items() if len(found) != len(GRID_SEEDS)]
    if short or not by_weight:
        raise ValueError(f"not every seed of the grid has ended for the weights {short}.")
    return max(sorted(by_weight), key=lambda weight: mean(by_weight[weight]))


def choose_distillation(results: Path) -> float:
    """λ of the distillation, by the students of unaligned teachers."""
    told = [(weight, job) for weight, job in distillation_jobs() if job.teacher is not None]
    return best((weight, dice(results, job)) for weight, job in told)


def choose(results: Path) -> Weights:
    """Everything the confirmatory arms need."""
    told = choose_distillation(results)
    students = [row for row in alignment_jobs(told) if row[2].role == "student"]
    names = sorted({arm for arm, _, _ in students})
    return Weights(
        told,
        {
            name: best((weight, dice(results, job)) for arm, weight, job in students if arm == name)
            for name in names
        },
    )
