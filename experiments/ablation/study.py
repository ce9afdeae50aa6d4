"""What the ablation compares and what every training may cost: read by run.py and analyse.py."""

from __future__ import annotations

from dataclasses import dataclass

LAMBDAS = (0.01, 0.1, 1.0)
ANCHORS = ("normal", "uniform", "learned")

CURVE_SEEDS = (900,)
CURVE_STEPS = (50, 100, 200, 400)
STEPS = 200
"""What the time allows, flat or not."""
DISTILLATION = 0.5
ALIGNMENT = 0.1
GRID_SEEDS = (800,)
SEEDS = (10, 11, 12, 13, 14, 15, 16, 17)

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


@dataclass(frozen=True)
class Budget:
    """What is equal in every training of the study.

    Args:
        spacing: voxel size of the phantom in mm.
        shape: its voxels: the inner 120×168×120 mm of the brain, which are also the training patch
            and the inference window.
        train: training cases.
        val: validation cases, on which weights are chosen.
        test: test cases.
        width: channels of the finest level of the MultiEncoderUNet.
        levels: its levels.
        batch_size: patches per step.
        learning_rate: peak of the one-cycle schedule of AdamW.
    """

    spacing: float = 6.0
    shape: tuple[int, int, int] = (20, 28, 20)
    train: int = 64
    val: int = 12
    test: int = 24
    width: int = 8
    levels: int = 3
    batch_size: int = 2
    learning_rate: float = 4e-3


BUDGET = Budget()
COHORT_SEED = 21


@dataclass(frozen=True)
class Job:
    """One training and its test.

    Args:
        stage: ``curve``, ``confirm`` or ``grid``.
        role: ``teacher`` or ``student``.
        anchor: what this training aligns to: ``none``, ``normal``, ``uniform`` or ``learned``.
        weight: λ of the alignment.
        seed: of weights, patches, augmentation and missingness.
        steps: optimizer steps.
        teacher: the job that trained the teacher.
        distillation: λ of the distillation.
    """

    stage: str
    role: str
    anchor: str
    weight: float
    seed: int
    steps: int
    teacher: str | None = None
    distillation: float = 0.0

    @property
    def name(self) -> str:
        """Unique, and the name of its files."""
        own = self.role if self.anchor == "none" else f"{self.role}-{self.anchor}-{self.weight:g}"
        taught = ""
        if self.teacher is not None:
            taught = f"_by-{self.teacher.split('_')[1]}_d{self.distillation:g}"
        budget = f"_{self.steps}" if self.stage == "curve" else ""
        return f"{self.stage}_{own}{taught}{budget}_s{self.seed}"

    @property
    def part(self) -> str:
        """Cases it is scored on: the test cases in the confirmatory stage alone."""
        return "test" if self.stage == "confirm" else "val"


def curve_jobs() -> list[Job]:
    """Students alone with growing budgets: where does the curve flatten?"""
    return [Job("curve", "student", "none", 0.0, s, n) for s in CURVE_SEEDS for n in CURVE_STEPS]


def grid_jobs() -> list[Job]:
    """Exploratory: every arm at every λ, on validation cases; teachers before their students."""
    jobs = []
    for seed in GRID_SEEDS:
        for anchor in ANCHORS:
            for weight in LAMBDAS:
                teacher = Job("grid", "teacher", anchor, weight, seed, STEPS)
                student = Job(
                    "grid", "student", "none", 0.0, seed, STEPS, teacher.name, DISTILLATION
                )
                jobs += [teacher, student]
        teacher = Job("grid", "teacher", "none", 0.0, seed, STEPS)
        jobs.append(teacher)
        jobs += [
            Job("grid", "student", "none", 0.0, seed, STEPS, teacher.name, weight)
            for weight in (*LAMBDAS, DISTILLATION)
        ]
        jobs.append(Job("grid", "student", "none", 0.0, seed, STEPS))
        jobs += [Job("grid", "student", "uniform", weight, seed, STEPS) for weight in LAMBDAS]
    return jobs


def confirm_jobs() -> list[tuple[str, Job]]:
    """Pairs (arm or teacher, job), seed by seed, so that a stop leaves whole seeds."""
    jobs: list[tuple[str, Job]] = []
    for seed in SEEDS:
        jobs.append(("alone", Job("confirm", "student", "none", 0.0, seed, STEPS)))
        jobs.append(("aligned", Job("confirm", "student", "uniform", ALIGNMENT, seed, STEPS)))
        for anchor in ("none", *ANCHORS):
            weight = 0.0 if anchor == "none" else ALIGNMENT
            teacher = Job("confirm", "teacher", anchor, weight, seed, STEPS)
            student = Job(
                "confirm", "student", "none", 0.0, seed, STEPS, teacher.name, DISTILLATION
            )
            jobs += [(f"teacher-{anchor}", teacher), (f"distilled-{anchor}", student)]
    return jobs
