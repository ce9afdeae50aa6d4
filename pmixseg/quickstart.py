"""The whole path in one file: cohort → store → teachers → students → test → report.

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
from pmixseg.callbacks import Distillation, PmixAlignment, RunCheckpoint, RunLogger
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.layouts import find_cases
from pmixseg.data.phantom import PhantomSettings, write_cohort
from pmixseg.data.prepare import prepare
from pmixseg.errors import InputError
from pmixseg.evaluation.records import Records
from pmixseg.evaluation.report import write_report
from pmixseg.modules import OneCycle, SegmentationModule, StudentModule, TeacherModule, load
from pmixseg.task import BRATS

CASES = 40
SPACING = 5.0
PATCH = (32, 40, 32)  # a whole brain at 5 mm
WIDTH = 8
LEVELS = 4
EPOCHS = 12
LEARNING_RATE = 4e-3
ALIGNMENT = 0.1
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


ARMS = (Arm("aligned", ALIGNMENT), Arm("unaligned", 0.0))


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
    say, began = Console(highlight=False), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    root = data or out / "cohort"
    if data is None:
        with stage(say, f"phantom: {CASES} synthetic patients"):
            write_cohort(root, CASES, seed, PhantomSettings(spacing=SPACING), workers=2)
    with stage(say, "prepare: canonical, cropped, z-scored, memory-mapped"):
        prepare_cohort(root, out / "store")
    runs = []
    for arm in ARMS:
        teacher = out / "runs" / f"teacher-{arm.name}"
        student = out / "runs" / f"student-{arm.name}"
        with stage(say, f"fit: teacher, {arm.name} (λ = {arm.alignment:g})"):
            train(
                TeacherModule(**network()),
                cohort(out / "store", seed),
                teacher,
                PmixAlignment(weight=arm.alignment),
            )
        with stage(say, f"fit: student of the {arm.name} teacher"):
            train(
                StudentModule(**network()),
                cohort(out / "store", seed),
                student,
                Distillation(str(teacher / "checkpoints" / "last.ckpt"), weight=DISTILLATION),
            )
        with stage(say, "test: every combination of sequences"):
            test(student, cohort(out / "store", seed))
        runs.append(student)
    with stage(say, "report"):
        report = write_report(runs, out / "report.html")
    say.print(f"\n{report} — {time.monotonic() - began:.0f} s in all. Research use only.")
    return report


def prepare_cohort(root: Path, store: Path) -> None:
    """Build the store, or bring it up to date.

    Raises:
        InputError: a case cannot be prepared.
    """
    spacing = (SPACING, SPACING, SPACING)
    report = prepare(find_cases(root, BRATS), store, BRATS, spacing=spacing, workers=2)
    if report.failed:
        raise InputError(" ".join(report.failed.values()))


def cohort(store: Path, seed: int) -> BraTSDataModule:
    """Patches of the prepared cohort, split by cases."""
    return BraTSDataModule(
        store=store,
        patch_size=PATCH,
        patches_per_case=1,
        foreground=0.0,
        batch_size=2,
        seed=seed,
    )


def network() -> dict[str, Any]:
    """Arguments that teacher and student share."""
    return {
        "backbone": MultiEncoderUNet(
            modalities=BRATS.modalities, num_classes=BRATS.num_classes, width=WIDTH, levels=LEVELS
        ),
        "optimizer": functools.partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=1e-4),
        "scheduler": OneCycle(),
    }


def train(module: SegmentationModule, data: BraTSDataModule, run: Path, *terms: Callback) -> None:
    """Fit one module; Lightning does the rest."""
    seed_everything(data.seed, verbose=False)
    callbacks = [*terms, RunCheckpoint(run)]
    trainer(run, max_epochs=EPOCHS, logger=RunLogger(run), callbacks=callbacks).fit(module, data)


def test(run: Path, data: BraTSDataModule) -> Records:
    """Score the last checkpoint on every combination; the module writes the records."""
    trainer(run, logger=False).test(load(run / "checkpoints" / "last.ckpt"), data, verbose=False)
    return Records.read(run)


def trainer(run: Path, **arguments: Any) -> Trainer:
    """A trainer that writes into the run's folder."""
    return Trainer(
        default_root_dir=run,
        accelerator="auto",
        use_distributed_sampler=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        check_val_every_n_epoch=EPOCHS,
        **arguments,
    )


@contextmanager
def stage(say: Console, what: str) -> Iterator[None]:
    """Name a stage and how long it took."""
    say.print(f"[bold]{what}[/bold]")
    began = time.monotonic()
    yield
    say.print(f"  {time.monotonic() - began:.0f} s")
