"""The whole way in one file: cohort, store, teachers, students, test, report.

Two arms, equal in everything but alignment: an aligned teacher and the student it teaches, an
unaligned teacher and the student it teaches. Every step is the library's public interface.
"""

from __future__ import annotations

import functools
import io
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from multiprocessing import parent_process
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
from pmixseg.errors import InputError, count_of
from pmixseg.evaluation.report.page import write_report
from pmixseg.losses import DiceCE, MixtureAnchor
from pmixseg.modules import OneCycle, SegmentationModule, StudentModule, TeacherModule, load
from pmixseg.modules.checkpoint import read_checkpoint, restore
from pmixseg.task import BRATS
from pmixseg.workers import results

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

CONSOLE = Console(highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Arm:
    """One way to train, from teacher to student."""

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
    began = time.monotonic()
    silence_lightning()
    out.mkdir(parents=True, exist_ok=True)
    # Data, if there are none, then the store and its split.
    root = data or out / "cohort"
    if data is None:
        with stage(f"phantom: {CASES} synthetic patients"):
            write_cohort(root, CASES, seed, PhantomSettings(spacing=SPACING), workers=WORKERS)
    with stage("prepare: canonical, cropped, z-scored, memory-mapped"):
        prepare_cohort(root, out / "store")
        parts = cohort(out / "store", seed).parts
        sizes = f"{len(parts.train)} train, {len(parts.val)} val, {len(parts.test)} test"
        CONSOLE.print(f"  split: {sizes}")
    # Each stage does both arms at once.
    for what, work in (("fit: the teachers", teach), ("fit and test: the students", study)):
        title = f"{what}, without alignment and with it, side by side"
        with stage(title), CONSOLE.status("training"):
            task = functools.partial(printed, work, out, seed)
            for _, text in results(task, ARMS, WORKERS, where=out, preload=[__name__]):
                CONSOLE.print(text, end="")
    with stage("report"):
        runs = [out / "runs" / f"student-{arm.name}" for arm in ARMS]
        report = write_report(runs, out / "report.html")
    CONSOLE.print(f"\n{report} — {time.monotonic() - began:.0f} s in all. Research use only.")
    return report


def prepare_cohort(root: Path, store: Path) -> None:
    """Build the store, or bring it up to date."""
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


def printed(work: Callable[[Path, int, Arm], None], out: Path, seed: int, arm: Arm) -> str:
    """Do a piece of work in its own process, and return what it prints: lines of two would mix."""
    if parent_process() is not None:
        silence_lightning()
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the split is told
    with redirect_stdout(io.StringIO()) as text:
        work(out, seed, arm)
    return text.getvalue()


def teach(out: Path, seed: int, arm: Arm) -> None:
    """Fit the teacher of an arm, which sees all sequences."""
    data, run = cohort(out / "store", seed), out / "runs" / f"teacher-{arm.name}"
    seed_everything(seed, verbose=False)  # the initial weights
    callbacks: list[Callback] = []
    if arm.alignment:
        callbacks.append(PmixAlignment(weight=arm.alignment, distance=DISTANCE, levels=ALIGNED))
    if arm == UNALIGNED and can_measure_gap(data):
        callbacks.append(GapMonitor())
    train(TeacherModule(**network(TEACHER_RATE)), data, run, TEACHER_STEPS, callbacks)


def study(out: Path, seed: int, arm: Arm) -> None:
    """Fit the student of an arm's teacher, and score it on every combination of sequences.

    Latents that only shrank or fell onto a line are close as well; so those of both students are
    compared with those of the teacher without alignment.
    """
    data, run = cohort(out / "store", seed), out / "runs" / f"student-{arm.name}"
    checkpoint = out / "runs" / f"teacher-{arm.name}" / "checkpoints" / "last.ckpt"
    module = StudentModule(**network(STUDENT_RATE))
    # Born with its teacher's weights, it needs a fraction of the steps.
    restore(module, read_checkpoint(checkpoint))
    callbacks: list[Callback] = [Distillation(str(checkpoint), weight=DISTILLATION)]
    if can_measure_gap(data):
        callbacks.append(GapMonitor(reference=out / "runs" / f"teacher-{UNALIGNED.name}"))
    train(module, data, run, STUDENT_STEPS, callbacks)
    model = load(run / "checkpoints" / "last.ckpt")
    trainer(run, logger=False).test(model, data, verbose=False)  # it writes the records


def cohort(store: Path, seed: int) -> BraTSDataModule:
    """Load patches of the prepared cohort, split by cases."""
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
    """Return arguments of teacher and student, which differ in the highest learning rate."""
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


def can_measure_gap(data: BraTSDataModule) -> bool:
    """Say whether a validation case has all sequences, whose latents can be compared."""
    return any(all(data.store.read(case).acquired) for case in data.parts.val)


def train(
    module: SegmentationModule,
    data: BraTSDataModule,
    run: Path,
    steps: int,
    callbacks: list[Callback],
) -> None:
    """Fit one module for whole epochs of at least so many steps; Lightning does the rest."""
    began = time.monotonic()
    epochs = -(-steps // max(len(data.parts.train) // BATCH, 1))
    fit = trainer(
        run,
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        gradient_clip_val=GRADIENT_NORM,
        logger=RunLogger(run),
        callbacks=[*callbacks, RunCheckpoint(run)],
    )
    fit.fit(module, data)
    dice = f"{fit.callback_metrics['val/dice']:.3f}" if data.parts.val else "not measured"
    seconds = time.monotonic() - began
    CONSOLE.print(f"  {run.name}: {epochs} epochs, val/dice {dice}, {seconds:.0f} s")


def trainer(run: Path, **arguments: Any) -> Trainer:
    """Return a trainer that writes into the run's folder."""
    return Trainer(
        default_root_dir=run,
        accelerator="auto",
        devices=1,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        **arguments,
    )


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Name a stage and how long it took."""
    CONSOLE.print(what, style="bold")
    began = time.monotonic()
    yield
    CONSOLE.print(f"  {time.monotonic() - began:.0f} s")
