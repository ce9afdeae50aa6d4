"""What every training of the ablation has in common, and what tells one from another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pmixseg.data.phantom.contrast import CONTRASTS
from pmixseg.task import BRATS, Task


@dataclass(frozen=True)
class Budget:
    """What is equal in every training of the study.

    Args:
        spacing: voxel size of the phantom in mm.
        shape: its voxels: a whole brain, up to a voxel at the sides of the largest; also the
            training patch.
        train: training cases.
        val: validation cases, on which weights are chosen and gaps measured.
        test: test cases.
        width: channels of the finest level of the MultiEncoderUNet.
        levels: its levels.
        stem: stride of its first convolution.
        window: of inference.
        batch_size: patches per step.
        base_steps: of a base, a student alone from random weights.
        steps: of every training that begins with the weights of a base.
        base_rate: peak of the one-cycle schedule of AdamW from random weights.
        rate: the same for every training that begins with a base.
    """

    spacing: float = 6.0
    shape: tuple[int, int, int] = (24, 32, 24)
    train: int = 64
    val: int = 12
    test: int = 24
    width: int = 16
    levels: int = 3
    stem: int = 2
    window: tuple[int, int, int] = (24, 32, 24)
    batch_size: int = 4
    base_steps: int = 2400
    steps: int = 240
    base_rate: float = 1.2e-2
    rate: float = 6e-3


BUDGET = Budget()

REAL_BUDGET = Budget(
    spacing=2.0,
    shape=(48, 48, 48),
    window=(72, 88, 72),
    train=6,
    val=0,
    test=1,
    batch_size=2,
    base_steps=480,
    steps=120,
)
"""Of real scans, whose patches are half of tumour; steps are what the time allows."""
REAL_COHORTS = tuple(f"real{number}" for number in range(7))
"""Seven cases, each left out once."""


@dataclass(frozen=True)
class Cohort:
    """A phantom cohort; all have the same seed.

    Args:
        modalities: its sequences.
        dependence: correlation between the modalities' errors
            (:class:`pmixseg.data.phantom.contrast.Scanner`).
    """

    modalities: tuple[str, ...] = BRATS.modalities
    dependence: float = 0.4

    @property
    def task(self) -> Task:
        """BraTS with these sequences."""
        return Task(f"m{len(self.modalities)}", self.modalities, BRATS.labels, dict(BRATS.regions))


COHORT_SEED = 23
DEFAULT = "default"
DEPENDENCES = (0.0, 0.5, 1.0)
COHORTS: Mapping[str, Cohort] = {
    DEFAULT: Cohort(),
    **{f"dep{value:g}": Cohort(dependence=value) for value in DEPENDENCES},
    **{f"m{n}": Cohort(tuple(CONTRASTS)[:n]) for n in (2, 3, 5, 6)},
}
"""By name. The default one has four sequences, so there is no ``m4``."""


def budget(cohort: str) -> Budget:
    """What is equal in the trainings of a cohort."""
    return REAL_BUDGET if cohort in REAL_COHORTS else BUDGET


def task(cohort: str) -> Task:
    """Sequences, labels and regions of a cohort."""
    return BRATS if cohort in REAL_COHORTS else COHORTS[cohort].task


UNIFORM, NO_CONTRAST, NOT_AT_RANDOM = "uniform", "no-contrast", "not-at-random"
PROTOCOLS = (UNIFORM, NO_CONTRAST, NOT_AT_RANDOM)
"""Missingness: all combinations alike; never T1ce; the odds of FLAIR follow the tumour's size."""


@dataclass(frozen=True)
class Job:
    """One training and its test.

    Args:
        stage: ``curve``, ``grid``, ``confirm``, ``explore`` or ``real``.
        role: ``base``, ``teacher`` or ``student``.
        seed: of weights, patches, augmentation and missingness.
        steps: optimizer steps.
        anchor: what this training aligns to: ``none``, ``normal``, ``uniform`` or ``learned``.
        weight: λ of the alignment.
        distance: of the alignment.
        levels: that are aligned; default: the two coarsest.
        teacher: the job that trained the teacher.
        distillation: λ of the distillation.
        term: the only term of the distillation; default: both.
        start: the job whose weights it begins with; default: random ones.
        missing: the protocol it is trained with.
        cohort: a name of :data:`COHORTS` or :data:`REAL_COHORTS`.
    """

    stage: str
    role: str
    seed: int
    steps: int
    anchor: str = "none"
    weight: float = 0.0
    distance: str = "nmse"
    levels: tuple[int, ...] | None = None
    teacher: str | None = None
    distillation: float = 0.0
    term: str | None = None
    start: str | None = None
    missing: str = UNIFORM
    cohort: str = field(default=DEFAULT)

    @property
    def name(self) -> str:
        """Unique, and the name of its files: what differs from the default."""
        parts = [self.role]
        if self.role == "base":
            parts.append(str(self.steps))
        if self.anchor != "none":
            parts.append(f"{self.anchor}-{self.distance}-{self.weight:g}")
        if self.start is None and self.role != "base":
            parts.append("scratch")
        if self.levels is not None:
            parts.append("levels" + "".join(map(str, self.levels)))
        if self.teacher is not None:
            taught = self.teacher.split("_")[2]
            parts.append(
                f"by-{'none' if taught.startswith('s') else taught}-d{self.distillation:g}"
            )
        if self.term is not None:
            parts.append(self.term)
        parts += [part for part in (self.missing, self.cohort) if part not in (UNIFORM, DEFAULT)]
        return "_".join([self.stage, *parts, f"s{self.seed}"])

    @property
    def needs(self) -> set[str]:
        """Names of the jobs that must have ended."""
        return {name for name in (self.teacher, self.start) if name is not None}

    @property
    def part(self) -> str:
        """Cases it is scored on: validation cases where something is chosen by it."""
        return "val" if self.stage in ("curve", "grid") else "test"
