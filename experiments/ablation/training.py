"""One job of the ablation: train a module, score it, measure its gap. Public classes only."""

from __future__ import annotations

import functools
import json
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from study import (
    BUDGET,
    COHORT_SEED,
    COHORTS,
    DEFAULT,
    NO_CONTRAST,
    NOT_AT_RANDOM,
    UNIFORM,
    Job,
)
from torch.nn.functional import adaptive_avg_pool3d

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.callbacks import Distillation, PmixAlignment
from pmixseg.data.augment import Augmentation
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.layouts import find_cases, load_layout
from pmixseg.data.masks import CaseMasks, CovariateMasks, Flags, MaskableCase
from pmixseg.data.phantom import PhantomSettings, write_cohort
from pmixseg.data.phantom_contrast import Scanner
from pmixseg.data.phantom_task import label_codes, write_layout
from pmixseg.data.prepare import prepare
from pmixseg.data.splits import SplitJson
from pmixseg.data.store import Store
from pmixseg.evaluation.cases import EvaluationSettings
from pmixseg.evaluation.metrics import region_dice
from pmixseg.losses import DiceCE
from pmixseg.losses.anchors import MixtureAnchor, NormalAnchor
from pmixseg.losses.distillation import DistillationTerm, LatentMatch, LogitKL
from pmixseg.losses.gap import measure_gap, voxel_vectors
from pmixseg.losses.joint import JointKL
from pmixseg.modules import OneCycle, SegmentationModule, StudentModule, TeacherModule, load
from pmixseg.task import BRATS, format_combination

TERMS: dict[str, Callable[[], DistillationTerm]] = {
    "LogitKL": LogitKL,
    "LatentMatch": LatentMatch,
}
GAP_POINTS = 256
"""Brain voxels per validation case and level that the gap is measured on."""


def make_cohort(work: Path, name: str) -> None:
    """Phantom, store and split of one of the cohorts in ``work / name``; what is there is kept."""
    folder, cohort = work / name, COHORTS[name]
    if (folder / "split.json").is_file():
        return
    cases = BUDGET.train + BUDGET.val + BUDGET.test
    settings = PhantomSettings(
        spacing=BUDGET.spacing,
        shape=BUDGET.shape,
        modalities=cohort.modalities,
        scanner=Scanner(dependence=cohort.dependence),
    )
    names = write_cohort(folder / "cohort", cases, COHORT_SEED, settings)
    grid, task = (BUDGET.spacing,) * 3, cohort.task
    layout = load_layout(write_layout(folder / "cohort", task, label_codes(task, {})))
    found = find_cases(folder / "cohort", task, layout)
    report = prepare(found, folder / "store", task, spacing=grid, progress=False)
    if report.failed:
        raise SystemExit(" ".join(report.failed.values()))
    first, last = BUDGET.train, BUDGET.train + BUDGET.val
    split = {"train": names[:first], "val": names[first:last], "test": names[last:]}
    part = folder / "split.json.part"
    part.write_text(json.dumps(split))
    part.replace(folder / "split.json")


def data_module(job: Job, work: Path) -> BraTSDataModule:
    """Whole brains, augmented; what the job's protocol takes from a case for good is not there."""
    folder = work / job.cohort
    return BraTSDataModule(
        store=folder / "store",
        split=SplitJson(folder / "split.json"),
        task=COHORTS[job.cohort].task,
        patch_size=BUDGET.shape,
        foreground=0.0,
        batch_size=BUDGET.batch_size,
        augmentation=Augmentation(flip=(0.5, 0.0, 0.0), resample=0.2),
        masks=protocol(job.missing),
        seed=job.seed,
    )


def protocol(name: str, seed: int = 0) -> CaseMasks | None:
    """What a protocol takes from each case for good; nothing for ``uniform``.

    Not at random: half of the cases lack FLAIR, the more so the smaller the tumour, and a third
    each of the others.
    """
    if name == NOT_AT_RANDOM:
        rates = dict.fromkeys(BRATS.modalities, 1 / 3) | {"flair": 0.5}
        return CovariateMasks(rates, {"flair": -2.0}, seed=seed)
    return Without("t1ce") if name == NO_CONTRAST else None


def protocol_weights(work: Path, draws: int = 500) -> pd.DataFrame:
    """How often each test case is seen with each combination when it is missing not at random.

    Args:
        work: folder of the default cohort.
        draws: of the rule, seeds 1 to this: 0 was drawn for training.
    """
    data = data_module(Job("explore", "student", 0, 0), work)
    data.setup("test")
    store = Store.open(work / DEFAULT / "store")
    cases = [store.read(name) for name in store.cases]
    tested = {str(item["case_id"]) for item in data.test_dataloader()}
    counts: Counter[tuple[str, str]] = Counter()
    for seed in range(1, draws + 1):
        rule = protocol(NOT_AT_RANDOM, seed)
        assert rule is not None
        for case, flags in rule.allowed(cases, BRATS.modalities).items():
            if case in tested:
                shown = [m for m, kept in zip(BRATS.modalities, flags, strict=True) if kept]
                counts[case, format_combination(shown)] += 1
    rows = [(case, shown, n / draws) for (case, shown), n in sorted(counts.items())]
    return pd.DataFrame(rows, columns=["case", "combination", "weight"])


class Without(CaseMasks):
    """No case has this modality.

    Args:
        modality: its name.
    """

    def __init__(self, modality: str) -> None:
        self.modality = modality

    def allowed(self, cases: Sequence[MaskableCase], modalities: Sequence[str]) -> dict[str, Flags]:
        """See :class:`CaseMasks`."""
        kept = [m != self.modality for m in modalities]
        return {
            c.case_id: tuple(a and k for a, k in zip(c.acquired, kept, strict=True)) for c in cases
        }


def build_module(job: Job) -> SegmentationModule:
    """Teacher or student; every teacher with the learned mixture, every student with zeros as fill.

    The recipe of ``pmixseg quickstart``, which was found on another phantom cohort.
    """
    kind = TeacherModule if job.role == "teacher" else StudentModule
    task = COHORTS[job.cohort].task
    return kind(
        backbone=MultiEncoderUNet(
            modalities=task.modalities,
            num_classes=task.num_classes,
            width=BUDGET.width,
            levels=BUDGET.levels,
            stem=BUDGET.stem,
        ),
        task=task,
        fill="anchor" if job.role == "teacher" else "zero",
        optimizer=functools.partial(
            torch.optim.AdamW, lr=BUDGET.rate if job.start else BUDGET.base_rate, weight_decay=1e-4
        ),
        criterion=DiceCE(include_background=False, batch_dice=True),
        scheduler=OneCycle(warmup_fraction=0.1),
        evaluation=EvaluationSettings(window=BUDGET.shape, batch_size=2),
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
    before = gap(module, data_module(replace(job, missing=UNIFORM), work))
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
        "gap_after": gap(module, whole),
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
def gap(module: SegmentationModule, data: BraTSDataModule) -> dict[str, dict[str, float]]:
    """The gap at the aligned levels, on validation cases, to the uniform mixture in every arm.

    One anchor for all, so that arms with different anchors can be compared.
    """
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
