"""Tables of the curve and of the grid of weights."""

from __future__ import annotations

from arms import (
    CURVE_SEEDS,
    CURVE_STEPS,
    GRID_SEEDS,
    alignment_jobs,
    curve_jobs,
    distillation_jobs,
)
from confirmatory import full_dice
from results import Results, markdown, percent


def curve(results: Results) -> str:
    """Student alone by number of steps; each seed and their mean."""
    ended = [job for job in curve_jobs() if results.has(job)]
    rows = []
    for steps in CURVE_STEPS:
        found = [results.read(job)["dice"] for job in ended if job.steps == steps]
        if found:
            each = ", ".join(percent(value) for value in found)
            rows.append([str(steps), percent(sum(found) / len(found)), each])
    named = f"seeds {', '.join(map(str, CURVE_SEEDS))}"
    return markdown(["steps from random weights", "mean Dice on validation cases, %", named], rows)


def distillation(results: Results) -> str:
    """Students of an unaligned teacher by λ of the distillation, 0 the student alone."""
    students = [(w, job) for w, job in distillation_jobs() if job.role == "student"]
    rows = []
    for weight in sorted({w for w, _ in students}):
        found = [results.read(job)["dice"] for w, job in students if w == weight]
        mean = percent(sum(found) / len(found))
        rows.append([f"{weight:g}", mean, *(percent(value) for value in found)])
    return markdown(["λ of distillation", "mean", *(f"seed {s}" for s in GRID_SEEDS)], rows)


def alignment(results: Results, told: float) -> str:
    """Every arm at every λ of alignment; of a teacher the Dice with all four sequences shown."""
    jobs = alignment_jobs(told)
    rows = []
    for arm, weight in dict.fromkeys((arm, weight) for arm, weight, _ in jobs):
        own = [job for a, w, job in jobs if (a, w) == (arm, weight)]
        gaps = [results.read(job)["gap_after"] for job in own]
        dice = [results.read(job)["dice"] for job in own]
        if own[0].role == "teacher":
            dice = [full_dice(results, job) for job in own]
        last = max(gaps[0])
        rows.append(
            [
                arm,
                f"{weight:g}",
                percent(sum(dice) / len(dice)),
                *(percent(value) for value in dice),
                f"{sum(g[last]['ratio'] for g in gaps) / len(gaps):.3f}",
                f"{sum(g[last]['effective_rank'] for g in gaps) / len(gaps):.1f}",
            ]
        )
    seeds = (f"seed {s}" for s in GRID_SEEDS)
    header = ["trained", "λ of alignment", "mean", *seeds, "gap, coarsest level", "effective rank"]
    return markdown(header, sorted(rows, key=lambda row: row[0]))
