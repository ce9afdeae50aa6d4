"""One training of a study: from random weights to its records and the measures of its latents."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from experiments.study.cohorts import Cases, Cohort, StudyData
from experiments.study.plan import Training
from pmixseg.callbacks import Distillation, GapMonitor, PmixAlignment
from pmixseg.describe import build
from pmixseg.evaluation.scores.metrics import region_dice
from pmixseg.files import whole
from pmixseg.modules import SegmentationModule, TeacherModule
from pmixseg.task import format_combination

COHORT, ENDED, CHECKPOINTS, RUNNING = "cohort", "ended", "checkpoints", "running"
"""Folders of a study's work: its cases, what ended, weights that students need, scratch."""

WARM_UP = 15
"""Steps of a trial before its speed is measured: memory is taken, kernels are chosen."""

TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": -1,
    "limit_val_batches": 0,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "gradient_clip_val": 1.0,
}
"""Arguments of the trainer that a plan may replace. The last weights count: nothing is chosen."""


def checkpoint_of(work: Path, name: str) -> Path:
    """Where the weights of a training are kept."""
    return work / CHECKPOINTS / f"{name}.ckpt"


def train(training: Training, cohort: Cohort, work: Path) -> dict[str, Any]:
    """Train, score, measure; what ended is written last, in one piece.

    Args:
        training: what is trained.
        cohort: its cases, made already.
        work: folder of the study.

    Returns:
        Figures of the training, a row of ``trainings.csv``.
    """
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    began, cpu = time.monotonic(), time.process_time()
    seed_everything(training.seed, verbose=False)
    settings, own = training.settings, work / RUNNING / training.name
    module: SegmentationModule = build(settings["module"])
    data = StudyData(
        work / COHORT,
        own,
        Cases(**(settings.get("cases") or {})),
        training.seed,
        **settings["data"],
    )
    pace = Pace()
    trainer = Trainer(
        **{**TRAINER, **(settings.get("trainer") or {})},
        default_root_dir=own,
        max_steps=settings["steps"],
        logger=CSVLogger(own, name="", version=""),
        callbacks=[*callbacks(training, work), *([pace] if training.trial else [])],
    )
    trainer.fit(module, data)
    if training.trial:
        return {"speed": pace.speed}
    device = trainer.strategy.root_device  # the fit moves the module back to the CPU
    trained = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}
    logged = trainer.callback_metrics.items()
    losses = {k: float(v) for k, v in logged if k.startswith(("train/", "align/"))}
    if training.kept:
        with whole(checkpoint_of(work, training.name)) as part:
            trainer.save_checkpoint(part, weights_only=True)
    scores = score(module, data, cohort.shown_names(work / COHORT), device)
    figures: dict[str, Any] = {
        "run": training.name,
        "group": training.group,
        "arm": training.arm,
        "block": str(training.seed),
        "against": None,
        "seed": training.seed,
        "part": "test",
        "parts": training.parts,
        "steps": int(trainer.global_step),
        "settings": training.fingerprint,
        **losses,
        **measures(own / "metrics.csv"),
        **trained,
        "scoring_seconds": time.monotonic() - began - trained["seconds"],
        "scoring_cpu_seconds": time.process_time() - cpu - trained["cpu_seconds"],
    }
    with whole(work / ENDED / f"{training.name}.csv") as part:
        scores.assign(run=training.name).to_csv(part, index=False, float_format="%.4f")
    with whole(work / ENDED / f"{training.name}.json") as part:
        part.write_text(json.dumps(figures), encoding="utf-8")
    return figures


class Pace(Callback):
    """Steps per second after the warm-up."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Note the time of every fifth step; a GPU is waited for, so that the time is true."""
        if trainer.global_step % 5 == 0 and trainer.global_step >= WARM_UP:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            self.marks.append((trainer.global_step, time.monotonic()))

    @property
    def speed(self) -> float:
        """Between the first and the last mark; 0 where there are not two."""
        if len(self.marks) < 2:
            return 0.0
        (first, began), *_, (last, ended) = self.marks
        return (last - first) / max(ended - began, 1e-9)


def callbacks(training: Training, work: Path) -> list[Callback]:
    """Alignment, distillation and the monitor of the gap, where the settings have them."""
    settings = training.settings
    made: list[Callback] = []
    if settings.get("align"):
        made.append(PmixAlignment(**settings["align"]))
    if settings.get("distill"):
        arguments = dict(settings["distill"])
        if training.needs is not None:
            arguments["teacher"] = str(checkpoint_of(work, training.needs))
        made.append(Distillation(**arguments))
    if settings.get("gap"):
        made.append(GapMonitor(pictures=False, **settings["gap"]))
    return made


@torch.no_grad()
def score(
    module: SegmentationModule,
    data: StudyData,
    names: Mapping[str, str],
    device: torch.device,
) -> pd.DataFrame:
    """Dice per test case, combination and region; both masks empty 1, one empty 0.

    On the prepared grid, which is the native one where the study keeps the cases' own spacing. A
    teacher is scored on everything acquired: it is not meant for less.
    """
    module.eval()
    module.to(device)
    data.setup("test")
    rows = []
    for item in data.items("test"):
        case, label = names[item["case_id"]], item["label"].to(module.device)
        item["image"] = item["image"].to(module.device)
        shown = module.test_combinations(item)
        if isinstance(module, TeacherModule):
            shown = [module.acquired_names(item)]
        for prediction in module.predict_item(item, shown):
            classes = prediction.on_grid().to(module.device)
            dice = region_dice(classes, label, module.task)
            text = format_combination(prediction.combination)
            size = len(prediction.combination)
            rows += [
                {"case": case, "combination": text, "n_present": size, "region": r, "dice": d}
                for r, d in dice.items()
            ]
    return pd.DataFrame(rows).assign(hd95=float("nan"))


def measures(path: Path) -> dict[str, float]:
    """First and last values of the latents' measures in a training's log.

    The monitor measures before the first step and at the end; ``gap_before/`` is the former.
    """
    if not path.is_file():
        return {}
    log = pd.read_csv(path)
    values: dict[str, float] = {}
    for name in (n for n in log if str(n).startswith("gap/")):
        known = log[name].dropna()
        # Ratios of smaller combinations are a table of their own, and are left out.
        if len(known) and "/ratio/" not in name:
            values[str(name)] = float(known.iloc[-1])
            values["gap_before" + str(name).removeprefix("gap")] = float(known.iloc[0])
    return values
