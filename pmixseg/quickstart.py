"""The whole way in one file: cohort, store, teachers, students, test, report.

Two arms, equal in everything but alignment: an aligned teacher and the student it teaches, an
unaligned teacher and the student it teaches. Every step is the library's public interface.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.callbacks import Distillation, GapMonitor, PmixAlignment, RunCheckpoint, RunLogger
from pmixseg.callbacks.silence import silence_lightning
from pmixseg.data.augment import Augmentation
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
from pmixseg.data.store.prepare import prepare
from pmixseg.errors import InputError
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.report.page import write_report
from pmixseg.losses import DiceCE, MixtureAnchor
from pmixseg.modules import (
    OneCycle,
    SegmentationModule,
    StudentModule,
    TeacherModule,
    load,
)
from pmixseg.modules.checkpoint import read_checkpoint, restore
from pmixseg.plurals import count_of
from pmixseg.task import BRATS

CASES = 28
SPACING = 5.0
WORKERS = 2
PATCH = (32, 40, 32)  # a whole brain at 5 mm
WIDTH = 16
LEVELS = 3
STEM = 2
BATCH = 4
TEACHER_STEPS = 145
STUDENT_STEPS = 80
TEACHER_RATE = 1.2e-2
STUDENT_RATE = 6e-3
GRADIENT_NORM = 1.0
DISTANCE = "case_nce"
ALIGNMENT = 0.1
ALIGNED = (1, 2)
DISTILLATION = 0.5


@dataclass(frozen=True)
class Arm:
    """One way to train, from teacher to student.

    Args:
        name: prefix of the run folders.
        alignment: weight of the alignment term in the teacher.
    """

    name: str
    alignment: float


UNALIGNED = Arm("unaligned", 0.0)
ARMS = (UNALIGNED, Arm("aligned", ALIGNMENT))


def quickstart(out: Path, data: Path | None = None, seed: int = 0) -> Path:
    """Run everything and write ``report.html``.

    Args:
        out: folder of cohort, store, runs and report; what is there is used again.
        data: root of a real cohort; by default a phantom is made.
        seed: of cohort, split and training.

    Returns:
        Path of the report.

    Raises:
        InputError: an unusable cohort.
    """
    console, began = Console(highlight=False, markup=False, soft_wrap=True), time.monotonic()
    silence_lightning()
    out.mkdir(parents=True, exist_ok=True)
    root = data or out / "cohort"
    if data is None:
        with stage(console, f"phantom: {CASES} synthetic patients"):
            write_cohort(root, CASES, seed, PhantomSettings(spacing=SPACING), workers=WORKERS)
    with stage(console, "prepare: canonical, cropped, z-scored, memory-mapped"):
        prepare_cohort(root, out / "store")
    runs = []
    for arm in ARMS:
        teacher = out / "runs" / f"teacher-{arm.name}"
        student = out / "runs" / f"student-{arm.name}"
        with stage(console, f"fit: teacher, {arm.name} (λ = {arm.alignment:g})"):
            seed_everything(seed, verbose=False)  # the initial weights
            train(
                TeacherModule(**network(TEACHER_RATE)),
                cohort(out / "store", seed),
                teacher,
                TEACHER_STEPS,
                PmixAlignment(weight=arm.alignment, distance=DISTANCE, levels=ALIGNED),
            )
        with stage(console, f"fit: student of the {arm.name} teacher"):
            checkpoint = teacher / "checkpoints" / "last.ckpt"
            module = StudentModule(**network(STUDENT_RATE))
            # Born with its teacher's weights, it needs a fraction of the steps.
            restore(module, read_checkpoint(checkpoint))
            train(
                module,
                cohort(out / "store", seed),
                student,
                STUDENT_STEPS,
                Distillation(str(checkpoint), weight=DISTILLATION),
            )
        with stage(console, "test: every combination of sequences"):
            test(student, cohort(out / "store", seed))
        runs.append(student)
    with stage(console, "report"):
        report = write_report(runs, out / "report.html")
    console.print(f"\n{report} — {time.monotonic() - began:.0f} s in all. Research use only.")
    return report


def prepare_cohort(root: Path, store: Path) -> None:
    """Build the store, or bring it up to date.

    Raises:
        InputError: a case cannot be prepared, or the store holds cases of another cohort.
    """
    spacing = (SPACING, SPACING, SPACING)
    report = prepare(
        find_cases(root, BRATS), store, BRATS, spacing=spacing, workers=WORKERS, prune=True
    )
    if report.failed:
        raise InputError(" ".join(report.failed.values()))
    if report.elsewhere:
        others = count_of(len(report.elsewhere), "case that is", "cases that are")
        raise InputError(
            f"{store} holds {others} not under {root}, such as "
            f"'{report.elsewhere[0]}'; delete it or choose another folder with --out."
        )


def cohort(store: Path, seed: int) -> BraTSDataModule:
    """Patches of the prepared cohort, split by cases."""
    return BraTSDataModule(
        store=store,
        patch_size=PATCH,
        patches_per_case=1,
        foreground=0.0,
        batch_size=BATCH,
        # Left and right only: in so few steps there is no time to learn heads upside down.
        augmentation=Augmentation(flip=(0.5, 0.0, 0.0), resample=0.2),
        seed=seed,
    )


def network(rate: float) -> dict[str, Any]:
    """Arguments of teacher and student, which differ in the highest learning rate."""
    return {
        "backbone": MultiEncoderUNet(
            modalities=BRATS.modalities,
            num_classes=BRATS.num_classes,
            width=WIDTH,
            levels=LEVELS,
            stem=STEM,
        ),
        # What is missing is filled by what the others say it would be, at the aligned levels. A
        # learned mixture would cost the teacher a second pass through the decoder.
        "fill": "anchor",
        "anchor": MixtureAnchor(weights="uniform"),
        "fill_levels": list(ALIGNED),
        "criterion": DiceCE(include_background=False, batch_dice=True),
        "optimizer": functools.partial(torch.optim.AdamW, lr=rate, weight_decay=1e-4),
        "scheduler": OneCycle(warmup_fraction=0.1),
    }


def train(
    module: SegmentationModule, data: BraTSDataModule, run: Path, steps: int, *terms: Callback
) -> None:
    """Fit one module for whole epochs of at least so many steps; Lightning does the rest."""
    epochs = -(-steps // max(len(data.parts.train) // BATCH, 1))
    trainer(
        run,
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        gradient_clip_val=GRADIENT_NORM,
        logger=RunLogger(run),
        callbacks=[*terms, *gap_monitor(run, data), RunCheckpoint(run)],
    ).fit(module, data)


def gap_monitor(run: Path, data: BraTSDataModule) -> list[Callback]:
    """Measures how far apart the modalities' latents are, where a validation case has them all.

    Latents that only shrank or fell onto a line are close as well; so the aligned arm is held
    against the unaligned one.
    """
    reference = run.with_name(f"{run.name.split('-')[0]}-{UNALIGNED.name}")
    complete = any(all(data.store.read(case).acquired) for case in data.parts.val)
    return [GapMonitor(reference=None if run == reference else reference)] if complete else []


def test(run: Path, data: BraTSDataModule) -> Records:
    """Score the last checkpoint on every combination; the module writes the records."""
    trainer(run, logger=False).test(load(run / "checkpoints" / "last.ckpt"), data, verbose=False)
    return Records.read(run)


def trainer(run: Path, **arguments: Any) -> Trainer:
    """Return a trainer that writes into the run's folder."""
    return Trainer(
        default_root_dir=run,
        accelerator="auto",
        enable_model_summary=False,
        log_every_n_steps=1,
        **arguments,
    )


@contextmanager
def stage(console: Console, what: str) -> Iterator[None]:
    """Name a stage and how long it took."""
    console.print(what, style="bold")
    began = time.monotonic()
    yield
    console.print(f"  {time.monotonic() - began:.0f} s")
