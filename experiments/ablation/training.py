"""One job of the ablation: train a module, score it, measure its gap. Public classes only."""

from __future__ import annotations

import functools
import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from cohorts import data_module
from lightning.pytorch import Callback, Trainer, seed_everything
from study import UNIFORM, Budget, Job, budget, task
from torch.nn.functional import adaptive_avg_pool3d

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.callbacks import Distillation, PmixAlignment
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.evaluation.gap.measure import measure_gap, voxel_vectors
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.evaluation.scores.metrics import region_dice
from pmixseg.losses import DiceCE
from pmixseg.losses.anchors import MixtureAnchor, NormalAnchor
from pmixseg.losses.distillation import DistillationTerm, LatentMatch, LogitKL
from pmixseg.losses.joint import JointKL
from pmixseg.modules import OneCycle, SegmentationModule, StudentModule, TeacherModule, load
from pmixseg.task import BRATS, format_combination

TERMS: dict[str, Callable[[], DistillationTerm]] = {
    "LogitKL": LogitKL,
    "LatentMatch": LatentMatch,
}
GAP_POINTS = 256
"""Brain voxels per validation case and level that the gap is measured on."""


def build_module(job: Job) -> SegmentationModule:
    """Teacher or student; every teacher with the learned mixture, every student with zeros as fill.

    The recipe of ``pmixseg quickstart``, which was found on another phantom cohort.
    """
    kind = TeacherModule if job.role == "teacher" else StudentModule
    own, of = budget(job.cohort), task(job.cohort)
    return kind(
        backbone=MultiEncoderUNet(
            modalities=of.modalities,
            num_classes=of.num_classes,
            width=own.width,
            levels=own.levels,
            stem=own.stem,
        ),
        task=of,
        fill="anchor" if job.role == "teacher" else "zero",
        optimizer=functools.partial(
            torch.optim.AdamW, lr=own.rate if job.start else own.base_rate, weight_decay=1e-4
        ),
        criterion=DiceCE(include_background=False, batch_dice=True),
        scheduler=OneCycle(warmup_fraction=0.1),
        evaluation=EvaluationSettings(window=own.window, batch_size=2),
    )


def alignment(job: Job) -> PmixAlignment:
    """``learned`` borrows the module's anchor; the others belong to the callback."""
    own = {"normal": NormalAnchor, "uniform": functools.partial(MixtureAnchor, "uniform")}
    made: Callable[[], Any] | None = own.get(job.anchor)
    distance = JointKL("matched") if job.distance == "joint" else job.distance
    return PmixAlignment(
        weight=job.weight, anchor=made() if made else None, distance=distance, levels=job.levels
    )


def distillation(job: Job, work: Path) -> Distillation:
    """Both terms of ``Distillation`` with their defaults, or one of them."""
    checkpoint = str(work / "checkpoints" / f"{job.teacher}.ckpt")
    terms = None if job.term is None else {"only": TERMS[job.term]()}
    return Distillation(checkpoint, weight=job.distillation, terms=terms)


def train_job(job: Job, work: Path, results: Path) -> dict[str, Any]:
    """Train, score, measure; the JSON of the results is written last, and says that all is done."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    seed_everything(job.seed, verbose=False)
    module, data = build_module(job), data_module(job, work)
    if job.start is not None:
        start = load(work / "checkpoints" / f"{job.start}.ckpt")
        module.backbone.load_state_dict(start.backbone.state_dict())
    terms: list[Callback] = []
    if job.weight:
        terms.append(alignment(job))
    if job.teacher is not None:
        terms.append(distillation(job, work))
    trainer = Trainer(
        default_root_dir=work,
        accelerator="cpu",
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        max_steps=job.steps,
        max_epochs=-1,
        logger=False,
        callbacks=terms,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    before = gap(module, data_module(replace(job, missing=UNIFORM), work), budget(job.cohort))
    started, cpu = time.monotonic(), time.process_time()
    trainer.fit(module, data)
    spent = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu}
    losses = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
    module.eval()
    if job.role != "student" and job.stage != "curve":
        path = work / "checkpoints" / f"{job.name}.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(path.with_suffix(".part"), weights_only=True)
        path.with_suffix(".part").replace(path)
    whole = data_module(replace(job, missing=UNIFORM), work)
    scores = score(module, whole, job.part)
    results.mkdir(parents=True, exist_ok=True)
    table = results / f"{job.name}.csv"
    scores.to_csv(table.with_suffix(".part"), index=False, float_format="%.4f")
    table.with_suffix(".part").replace(table)
    found: dict[str, Any] = {
        "job": asdict(job),
        "part": job.part,
        "dice": float(scores[list(BRATS.regions)].to_numpy().mean()),
        "train": losses,
        "gap_before": before,
        "gap_after": gap(module, whole, budget(job.cohort)),
        "anchor_weights": anchor_weights(module),
        **spent,
        "scoring_cpu_seconds": time.process_time() - cpu - spent["cpu_seconds"],
    }
    written = results / f"{job.name}.json"
    written.with_suffix(".json.part").write_text(json.dumps(found, indent=1) + "\n")
    written.with_suffix(".json.part").replace(written)
    return found


@torch.no_grad()
def score(module: SegmentationModule, data: BraTSDataModule, part: str) -> pd.DataFrame:
    """Dice per case and combination, a column per region; both empty counts 1, one empty 0.

    The phantom is prepared at its own voxel size, so the store's grid is the native one. Teachers
    are scored on everything acquired only: they are not meant for less.
    """
    data.setup("test" if part == "test" else "validate")
    loader = data.test_dataloader() if part == "test" else data.val_dataloader()
    everything = isinstance(module, TeacherModule)
    rows = []
    for item in loader:
        shown = [module.acquired_names(item)] if everything else module.test_combinations(item)
        for found in module.predict_item(item, shown):
            dice = region_dice(found.on_grid(), item["label"], module.task)
            row = {r: float(v) for r, v in dice.items()}
            name = format_combination(found.combination)
            rows.append({"case": item["case_id"], "combination": name, **row})
    return pd.DataFrame(rows)


@torch.no_grad()
def gap(
    module: SegmentationModule, data: BraTSDataModule, own: Budget
) -> dict[str, dict[str, float]]:
    """The gap at the aligned levels, on validation cases, to the uniform mixture in every arm.

    One anchor for all, so that arms with different anchors can be compared. Empty without
    validation cases.
    """
    if not own.val:
        return {}
    data.setup("validate")
    module.eval()
    anchor = MixtureAnchor("uniform")
    anchor.bind(module.backbone.slots, len(module.backbone.channels))
    parts: dict[int, list[Any]] = {}
    for number, item in enumerate(data.val_dataloader()):
        image = item["image"][None]
        shown = torch.ones(1, image.shape[1], dtype=torch.bool)
        latents = module.encode(image, shown)
        for level in list(range(len(latents.features)))[-2:]:
            features = latents.features[level]
            brain = (image != 0).any(1, keepdim=True).float()
            inside = adaptive_avg_pool3d(brain, features.shape[-3:])[:, 0] > 0.5
            target = anchor(features, shown, level)
            drawn = voxel_vectors(features, target, inside, points=GAP_POINTS, seed=number)
            parts.setdefault(level, []).append(drawn)
    measured = {}
    for level, drawn in parts.items():
        vectors, targets = (torch.cat(t) for t in zip(*drawn, strict=True))
        measured[f"level{level}"] = measure_gap(vectors, targets).to_dict()
    return measured


def anchor_weights(module: SegmentationModule) -> dict[str, list[float]]:
    """A teacher's learned mixture, per level, in the order of the modalities."""
    anchor = module.anchor
    if not isinstance(anchor, MixtureAnchor):
        return {}
    everything = torch.ones(1, len(module.backbone.slots), dtype=torch.bool)
    return {
        f"level{level}": anchor.weights(everything, level, detach=True)[0].tolist()
        for level in range(len(module.backbone.channels))
    }
