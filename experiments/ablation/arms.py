"""The trainings of each stage: teachers and bases before what begins with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from study import COHORTS, DEFAULT, DEPENDENCES, PROTOCOLS, REAL_COHORTS, UNIFORM, Job, budget

LAMBDAS = (0.01, 0.1, 1.0)
ANCHORS = ("normal", "uniform", "learned")

CURVE_SEEDS = (900, 901, 902)
CURVE_STEPS = (300, 600, 1200, 2400, 4800)
GRID_SEEDS = (810, 811)
SEEDS = (40, 41, 42, 43, 44, 45, 46, 47)
EXPLORE_SEEDS = (710, 711)
REAL_SEED = 600

ARMS = (
    "alone",
    "aligned",
    "distilled-none",
    "distilled-normal",
    "distilled-uniform",
    "distilled-learned",
)
"""The confirmatory arms. ``distilled-X``: from a teacher aligned to anchor X; ``none``: to none."""

HYPOTHESES = (
    ("distilled-learned", "distilled-none"),
    ("distilled-uniform", "distilled-none"),
    ("distilled-normal", "distilled-none"),
    ("distilled-none", "alone"),
    ("aligned", "alone"),
)
"""Pairs (A, B) of arms whose primary endpoint is tested, A minus B, Holm-corrected."""

DISTANCES = ("mse", "smooth_l1", "cosine", "mmd", "sliced_wasserstein", "kl", "vid", "joint")
"""Besides ``nmse``, which every other training uses."""
DISTANCE_WEIGHTS = (0.1, 1.0)
LEVELS = ((2,), (1,), (0,), (0, 1, 2))
"""Besides the two coarsest (1, 2); 0 is the finest."""


@dataclass(frozen=True)
class Weights:
    """What the grid chose.

    Args:
        distillation: λ of the distillation, by the arm ``distilled-none``, for every distilled one.
        alignment: arm -> λ of the alignment of the student itself (``aligned``), or of its teacher.
    """

    distillation: float
    alignment: Mapping[str, float]


REAL_WEIGHTS = Weights(
    1.0,
    {
        "aligned": 0.1,
        "distilled-normal": 1.0,
        "distilled-uniform": 0.01,
        "distilled-learned": 0.01,
    },
)
"""Of the arms on real scans: what the grid of the second study chose, before this one's ran."""


def base(stage: str, seed: int, missing: str = UNIFORM, cohort: str = DEFAULT) -> Job:
    """A student alone, from random weights."""
    return Job(stage, "base", seed, budget(cohort).base_steps, missing=missing, cohort=cohort)


def teacher(start: Job, anchor: str, weight: float) -> Job:
    """A teacher that begins with a base, aligned unless the anchor is ``none``."""
    return continued(start, "teacher", anchor=anchor, weight=weight)


def distilled(start: Job, by: Job, weight: float, term: str | None = None) -> Job:
    """A student of a teacher."""
    return continued(start, "student", teacher=by.name, distillation=weight, term=term)


def student(
    start: Job,
    weight: float = 0.0,
    distance: str = "nmse",
    levels: tuple[int, ...] | None = None,
) -> Job:
    """A student without a teacher; aligned to the uniform mixture where ``weight`` is above 0.

    Without fill nothing would train the weights of the learned one. ``vid`` learns its own Gaussian
    in the place of the normal anchor.
    """
    anchor = "none" if not weight else "normal" if distance == "vid" else "uniform"
    return continued(
        start, "student", anchor=anchor, weight=weight, distance=distance, levels=levels
    )


def continued(start: Job, role: str, **what: Any) -> Job:
    """A training that begins with the weights of a base, on the same cases."""
    steps = budget(start.cohort).steps
    return replace(start, role=role, steps=steps, start=start.name, **what)


def curve_jobs() -> list[Job]:
    """Students alone from random weights with growing budgets: where does the curve flatten?"""
    return [Job("curve", "base", seed, steps) for seed in CURVE_SEEDS for steps in CURVE_STEPS]


def distillation_jobs() -> list[tuple[float, Job]]:
    """First half of the grid: (λ of distillation, job), students of an unaligned teacher."""
    jobs: list[tuple[float, Job]] = []
    for seed in GRID_SEEDS:
        start = base("grid", seed)
        plain = teacher(start, "none", 0.0)
        jobs += [(0.0, start), (0.0, plain), (0.0, student(start))]
        jobs += [(weight, distilled(start, plain, weight)) for weight in LAMBDAS]
    return jobs


def alignment_jobs(distillation: float) -> list[tuple[str, float, Job]]:
    """Second half: (arm or teacher, λ of alignment, job), at the chosen λ of distillation."""
    jobs: list[tuple[str, float, Job]] = []
    for seed in GRID_SEEDS:
        start = base("grid", seed)
        for weight in LAMBDAS:
            jobs.append(("aligned", weight, student(start, weight)))
            for anchor in ANCHORS:
                taught = teacher(start, anchor, weight)
                jobs.append((f"teacher-{anchor}", weight, taught))
                own = distilled(start, taught, distillation)
                jobs.append((f"distilled-{anchor}", weight, own))
    return jobs


def six_arms(start: Job, weights: Weights) -> list[tuple[str, Job]]:
    """Pairs (arm, teacher or base, job) of one base."""
    jobs = [
        ("base", start),
        ("alone", student(start)),
        ("aligned", student(start, weights.alignment["aligned"])),
    ]
    for anchor in ("none", *ANCHORS):
        arm = f"distilled-{anchor}"
        taught = teacher(start, anchor, weights.alignment.get(arm, 0.0))
        jobs.append((f"teacher-{anchor}", taught))
        jobs.append((arm, distilled(start, taught, weights.distillation)))
    return jobs


def confirm_jobs(weights: Weights) -> list[tuple[str, Job]]:
    """Seed by seed, so that a stop leaves whole seeds."""
    return [pair for seed in SEEDS for pair in six_arms(base("confirm", seed), weights)]


def real_jobs() -> list[tuple[str, Job]]:
    """The six arms on real scans, case by case left out; weights are those of a phantom."""
    bases = [base("real", REAL_SEED, cohort=cohort) for cohort in REAL_COHORTS]
    return [pair for start in bases for pair in six_arms(start, REAL_WEIGHTS)]


def from_scratch(start: Job, weights: Weights) -> list[tuple[str, Job]]:
    """Alignment and distillation from the first step, as long as the base, which is the arm alone.

    Args:
        start: the base; its weights are not used.
        weights: of the terms.
    """

    def fresh(job: Job) -> Job:
        return replace(job, start=None, steps=start.steps)

    plain = fresh(teacher(start, "none", 0.0))
    taught = fresh(teacher(start, "learned", weights.alignment["distilled-learned"]))
    return [
        ("alone", start),
        ("aligned", fresh(student(start, weights.alignment["aligned"]))),
        ("teacher-none", plain),
        ("teacher-learned", taught),
        ("distilled-none", fresh(distilled(start, plain, weights.distillation))),
        ("distilled-learned", fresh(distilled(start, taught, weights.distillation))),
    ]


def explore_jobs(weights: Weights) -> dict[str, list[tuple[str, Job]]]:
    """Question -> pairs (row of its table, job); what several questions need is in each."""
    aligned = weights.alignment["aligned"]
    found: dict[str, list[tuple[str, Job]]] = {
        "modalities": [],
        "dependence": [],
        "missingness": [],
        "levels": [],
        "distances": [],
        "terms": [],
        "scratch": [],
    }
    for seed in EXPLORE_SEEDS:
        start = base("explore", seed)
        plain = teacher(start, "none", 0.0)
        shared = [("base", start), ("alone", student(start))]
        ours = ("1, 2", student(start, aligned))
        found["terms"] += [*shared, ("teacher", plain)]
        for term in (None, "LogitKL", "LatentMatch"):
            row = term or "both"
            found["terms"].append((row, distilled(start, plain, weights.distillation, term)))
        found["levels"] += [*shared, ours]
        found["levels"] += [
            (", ".join(map(str, levels)), student(start, aligned, levels=levels))
            for levels in LEVELS
        ]
        found["distances"] += shared
        found["distances"] += [
            (f"{distance}, λ {weight:g}", student(start, weight, distance))
            for distance in ("nmse", *DISTANCES)
            for weight in DISTANCE_WEIGHTS
        ]
        found["scratch"] += from_scratch(start, weights)
        for value in DEPENDENCES:
            of = base("explore", seed, cohort=f"dep{value:g}")
            found["dependence"] += [
                (f"{value:g}, base", of),
                (f"{value:g}, alone", student(of)),
                (f"{value:g}, factorised", student(of, aligned)),
                (f"{value:g}, joint", student(of, aligned, "joint")),
            ]
        cohorts = {"m4": DEFAULT, **{c: c for c in COHORTS if c[0] == "m"}}
        for cohort, made in sorted(cohorts.items()):
            of = base("explore", seed, cohort=made)
            found["modalities"] += [
                (f"{cohort[1:]}, base", of),
                (f"{cohort[1:]}, alone", student(of)),
                (f"{cohort[1:]}, aligned", student(of, aligned)),
            ]
        for protocol in PROTOCOLS:
            of = base("explore", seed, missing=protocol)
            found["missingness"] += [
                (f"{protocol}, base", of),
                (f"{protocol}, alone", student(of)),
                (f"{protocol}, aligned", student(of, aligned)),
            ]
    return found
