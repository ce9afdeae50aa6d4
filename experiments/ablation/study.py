"""What the ablation compares and what every training may cost: read by run.py and analyse.py."""

from __future__ import annotations

from dataclasses import dataclass

LAMBDAS = (0.01, 0.1, 1.0)
ANCHORS = ("normal", "uniform", "learned")

CURVE_SEEDS = (900,)
CURVE_STEPS = (75, 150, 300, 600)
BASE_STEPS = 300
"""Student alone from random weights, with which every training of the same seed begins."""
STEPS = 100
"""Of every training after that."""
DISTILLATION = 0.5
ALIGNMENT = 0.1
GRID_SEEDS = (800,)
SEEDS = (20, 21, 22, 23, 24, 25, 26, 27)

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
        shape: its voxels: a whole brain, up to a voxel at the sides of the largest, which is also
            the training patch and the inference window.
        train: training cases.
        val: validation cases, on which weights are chosen.
        test: test cases.
        width: channels of the finest level of the MultiEncoderUNet.
        levels: its levels.
        stem: stride of its first convolution.
        batch_size: patches per step.
        base_rate: peak of the one-cycle schedule of AdamW from random weights.
        rate: the same for every training that begins with the base.
    """

    spacing: float = 6.0
    shape: tuple[int, int, int] = (24, 32, 24)
    train: int = 64
    val: int = 12
    test: int = 24
    width: int = 16
    levels: int = 3
    stem: int = 2
    batch_size: int = 4
    base_rate: float = 1.2e-2
    rate: float = 6e-3


BUDGET = Budget()
COHORT_SEED = 22


@dataclass(frozen=True)
class Job:
    """One training and its test.

    Args:
        stage: ``curve``, ``confirm`` or ``grid``.
        role: ``base``, ``teacher`` or ``student``.
        anchor: what this training aligns to: ``none``, ``normal``, ``uniform`` or ``learned``.
        weight: λ of the alignment.
        seed: of weights, patches, augmentation and missingness.
        steps: optimizer steps.
        teacher: the job that trained the teacher.
        distillation: λ of the distillation.
        start: the job whose weights it begins with.
    """

    stage: str
    role: str
    anchor: str
    weight: float
    seed: int
    steps: int
    teacher: str | None = None
    distillation: float = 0.0
    start: str | None = None

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
    def needs(self) -> set[str]:
        """Names of the jobs that must have ended."""
        return {name for name in (self.teacher, self.start) if name is not None}

    @property
    def part(self) -> str:
        """Cases it is scored on: the test cases in the confirmatory stage alone."""
        return "test" if self.stage == "confirm" else "val"


def curve_jobs() -> list[Job]:
    """Students alone with growing budgets: where does the curve flatten?"""
    return [Job("curve", "base", "none", 0.0, s, n) for s in CURVE_SEEDS for n in CURVE_STEPS]


def grid_jobs() -> list[Job]:
    """Exploratory: every arm at every λ, on validation cases; teachers before their students."""
    jobs = []
    for seed in GRID_SEEDS:
        base = Job("grid", "base", "none", 0.0, seed, BASE_STEPS)
        plain = _teacher("grid", "none", 0.0, base)
        jobs += [base, _student("grid", "none", 0.0, base), plain]
        for weight in LAMBDAS:
            for anchor in ANCHORS:
                teacher = _teacher("grid", anchor, weight, base)
                jobs += [teacher, _student("grid", "none", 0.0, base, teacher.name, DISTILLATION)]
            jobs.append(_student("grid", "uniform", weight, base))
            jobs.append(_student("grid", "none", 0.0, base, plain.name, weight))
        jobs.append(_student("grid", "none", 0.0, base, plain.name, DISTILLATION))
    return jobs


def confirm_jobs() -> list[tuple[str, Job]]:
    """Pairs (arm, teacher or base, job), seed by seed, so that a stop leaves whole seeds."""
    jobs: list[tuple[str, Job]] = []
    for seed in SEEDS:
        base = Job("confirm", "base", "none", 0.0, seed, BASE_STEPS)
        jobs += [("base", base), ("alone", _student("confirm", "none", 0.0, base))]
        jobs.append(("aligned", _student("confirm", "uniform", ALIGNMENT, base)))
        for anchor in ("none", *ANCHORS):
            teacher = _teacher("confirm", anchor, 0.0 if anchor == "none" else ALIGNMENT, base)
            student = _student("confirm", "none", 0.0, base, teacher.name, DISTILLATION)
            jobs += [(f"teacher-{anchor}", teacher), (f"distilled-{anchor}", student)]
    return jobs


def _teacher(stage: str, anchor: str, weight: float, base: Job) -> Job:
    return Job(stage, "teacher", anchor, weight, base.seed, STEPS, start=base.name)


def _student(
    stage: str,
    anchor: str,
    weight: float,
    base: Job,
    teacher: str | None = None,
    distillation: float = 0.0,
) -> Job:
    return Job(stage, "student", anchor, weight, base.seed, STEPS, teacher, distillation, base.name)
