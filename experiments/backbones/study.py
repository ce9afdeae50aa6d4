"""Every backbone with and without Pmix alignment, on the phantom, under one recipe.

    python experiments/backbones/study.py --work runs/backbones            # the study, unattended
    python experiments/backbones/study.py --work runs/backbones --pilot    # the learning rates
    python experiments/backbones/study.py --table                          # prints what there is

Makes a cohort of synthetic cases once, then trains one student per (seed, backbone, arm) and scores
it on every combination of every test case. A run whose JSON exists in the results' folder is not
repeated, so the script can be stopped and started again. The plan, and what came out: README.md.
"""

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from scipy import stats

from pmixseg.backbones import (
    UHVED,
    Backbone,
    EarlyFusion,
    MMFormer,
    MultiEncoderUNet,
    RFNet,
    ShaSpec,
)
from pmixseg.callbacks import PmixAlignment
from pmixseg.data.augment import Augmentation
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
from pmixseg.data.splits import SplitJson
from pmixseg.data.store.prepare import prepare
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.evaluation.scores.metrics import region_dice
from pmixseg.losses import DiceCE, MixtureAnchor
from pmixseg.modules import OneCycle, StudentModule
from pmixseg.task import BRATS, format_combination

SPACING, SHAPE = 6.0, (24, 32, 24)
TRAIN, VAL, TEST, COHORT_SEED = 64, 12, 24, 61
STEPS, BATCH, CLIP = 300, 4, 1.0
WEIGHT = 0.1
SEEDS = (0, 1, 2)
PILOT_SEED = 900
DYNUNET = {
    "class_path": "monai.networks.nets.DynUNet",
    "init_args": {
        "kernel_size": [3, 3, 3, 3],
        "strides": [1, 2, 2, 2],
        "upsample_kernel_size": [2, 2, 2],
        "filters": [16, 32, 64, 128],
        "norm_name": ["INSTANCE", {"affine": True}],
    },
}


@dataclass(frozen=True)
class Entry:
    """A backbone of the study.

    Args:
        make: builds it, in a small version.
        rates: peak learning rates that the pilot tried, in this order; the study uses the last.
        patch: training patch and test window; the whole brain, or more where the network asks it.
        aligned: whether it has latents per sequence.
    """

    make: Callable[[], Backbone]
    rates: tuple[float, ...]
    patch: tuple[int, int, int] = SHAPE
    aligned: bool = True


BACKBONES = {
    "unet": Entry(partial(MultiEncoderUNet, width=16, levels=3, stem=2), (4e-3, 1.2e-2)),
    "rfnet": Entry(partial(RFNet, width=8, separate="none"), (4e-3,)),
    "uhved": Entry(partial(UHVED, width=8, reconstruct=False), (4e-3,)),
    "shaspec": Entry(partial(ShaSpec, width=8, levels=4), (4e-3,)),
    "dynunet": Entry(partial(EarlyFusion, DYNUNET), (4e-3,), aligned=False),
    "mmformer": Entry(
        partial(MMFormer, width=4, patch_size=32, embedding=64, hidden=128, separate="none"),
        (4e-3,),
        (32, 32, 32),
    ),
}


@dataclass(frozen=True)
class Run:
    """One training and its test."""

    backbone: str
    aligned: bool
    seed: int
    rate: float
    part: Literal["val", "test"]
    steps: int

    @property
    def name(self) -> str:
        """Unique, and the name of its files."""
        arm = "aligned" if self.aligned else "plain"
        pilot = f"-{self.rate:g}" if self.part == "val" else ""
        return f"{self.backbone}-{arm}{pilot}-s{self.seed}"


def study_runs(steps: int) -> list[Run]:
    """Seed by seed with all arms of a seed together, so that a stop leaves whole seeds."""
    return [
        Run(name, aligned, seed, entry.rates[-1], "test", steps)
        for seed in SEEDS
        for name, entry in BACKBONES.items()
        for aligned in (False, True)[: 1 + entry.aligned]
    ]


def pilot_runs(steps: int) -> list[Run]:
    """Every learning rate without alignment, scored on validation cases."""
    return [
        Run(name, False, PILOT_SEED, rate, "val", steps)
        for name, entry in BACKBONES.items()
        for rate in entry.rates
    ]


def make_cohort(work: Path) -> None:
    """Phantom, store and split, once."""
    if (work / "split.json").is_file():
        return
    settings = PhantomSettings(spacing=SPACING, shape=SHAPE)
    names = write_cohort(work / "cohort", TRAIN + VAL + TEST, COHORT_SEED, settings)
    cases = find_cases(work / "cohort", BRATS)
    report = prepare(cases, work / "store", BRATS, spacing=(SPACING,) * 3)
    if report.failed:
        raise SystemExit(" ".join(report.failed.values()))
    last = TRAIN + VAL
    split = {"train": names[:TRAIN], "val": names[TRAIN:last], "test": names[last:]}
    (work / "split.json").write_text(json.dumps(split))


def train(run: Run, work: Path) -> tuple[StudentModule, BraTSDataModule, dict[str, float]]:
    """Train one student; the last training losses beside it."""
    seed_everything(run.seed, verbose=False)
    entry = BACKBONES[run.backbone]
    module = StudentModule(
        backbone=entry.make(),
        fill="zero",
        criterion=DiceCE(include_background=False, batch_dice=True),
        optimizer=partial(torch.optim.AdamW, lr=run.rate, weight_decay=1e-4),
        scheduler=OneCycle(warmup_fraction=0.1),
        evaluation=EvaluationSettings(window=entry.patch, batch_size=2),
    )
    data = BraTSDataModule(
        store=work / "store",
        split=SplitJson(work / "split.json"),
        patch_size=entry.patch,
        foreground=0.0,
        batch_size=BATCH,
        augmentation=Augmentation(flip=(0.5, 0.0, 0.0), resample=0.2),
        seed=run.seed,
    )
    terms: list[Callback] = []
    if run.aligned:
        terms.append(PmixAlignment(weight=WEIGHT, anchor=MixtureAnchor("uniform")))
    trainer = Trainer(
        default_root_dir=work,
        accelerator="cpu",
        precision="bf16-mixed",
        gradient_clip_val=CLIP,
        max_steps=run.steps,
        max_epochs=-1,
        callbacks=terms,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    losses = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
    return module, data, losses


@torch.no_grad()
def score(module: StudentModule, data: BraTSDataModule, part: str) -> pd.DataFrame:
    """Dice per case and combination, a column per region; both empty counts 1.

    The phantom is prepared at its own voxel size, so the store's grid is the native one.
    """
    module.eval()
    data.setup("test" if part == "test" else "validate")
    rows = []
    for item in data.test_dataloader() if part == "test" else data.val_dataloader():
        for found in module.predict_item(item, module.test_combinations(item)):
            dice = region_dice(found.on_grid(), item["label"], module.task)
            combination = format_combination(found.combination)
            regions = {region: float(value) for region, value in dice.items()}
            rows.append({"case": item["case_id"], "combination": combination, **regions})
    return pd.DataFrame(rows)


def perform(run: Run, work: Path, results: Path) -> None:
    """Train and score; the JSON is written last, and says that all is done."""
    start = time.process_time()
    module, data, losses = train(run, work)
    trained = time.process_time()
    rows = score(module, data, run.part)
    dice = 100 * rows[list(BRATS.regions)].mean()
    found = {
        "run": vars(run),
        "dice": {region: round(float(value), 2) for region, value in dice.items()},
        "train": losses,
        "parameters": sum(p.numel() for p in module.backbone.parameters()),
        "training_cpu_seconds": round(trained - start, 1),
        "scoring_cpu_seconds": round(time.process_time() - trained, 1),
    }
    if run.part == "test":
        table = results / f"{run.name}.csv"
        rows.to_csv(table.with_suffix(".part"), index=False, float_format="%.4f")
        table.with_suffix(".part").replace(table)
    written = results / f"{run.name}.json"
    written.with_suffix(".part").write_text(json.dumps(found, indent=1) + "\n")
    written.with_suffix(".part").replace(written)
    seconds = time.process_time() - start
    said = f"Dice {dice.mean():.1f} ({slashed(dice)}), {seconds:.0f} CPU s"
    print(f"{time.strftime('%H:%M:%S')} {run.name}: {said}", flush=True)


def slashed(regions: "pd.Series[float]") -> str:
    """Percentages, as in ``70.1 / 52.3 / 40.9``."""
    return " / ".join(f"{value:.1f}" for value in regions)


def pilot_table(results: Path) -> str:
    """Dice on validation cases per backbone and learning rate."""
    lines = ["| backbone | peak rate: mean (WT / TC / ET) |", "|---|---|"]
    for run in pilot_runs(STEPS):
        path = results / f"{run.name}.json"
        if path.is_file():
            dice = pd.Series(json.loads(path.read_text())["dice"])
            lines.append(f"| {run.backbone} | {run.rate:g}: {dice.mean():.1f} ({slashed(dice)}) |")
    return "\n".join(lines)


def read_scores(results: Path, name: str, arm: str) -> pd.DataFrame:
    """Mean Dice in percent, a row per seed and a column per region, of the seeds that ended."""
    rows = {}
    for seed in SEEDS:
        path = results / f"{name}-{arm}-s{seed}.csv"
        if path.is_file() and path.with_suffix(".json").is_file():
            rows[seed] = 100 * pd.read_csv(path)[list(BRATS.regions)].mean()
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(BRATS.regions))


def study_table(results: Path) -> str:
    """Per backbone: regions of both arms, and the paired difference of the mean with its interval.

    Every case has every combination and region, so the mean of all rows is the mean over cases.
    """
    lines = [
        "| backbone | parameters, M | seeds | plain WT / TC / ET | mean, per seed | aligned WT / "
        "TC / ET | aligned − plain, points, per seed | mean difference, 95 % | width |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in BACKBONES:
        plain, aligned = (read_scores(results, name, arm) for arm in ("plain", "aligned"))
        if plain.empty:
            continue
        size = sum(p.numel() for p in BACKBONES[name].make().parameters()) / 1e6
        each = ", ".join(f"{value:.1f}" for value in plain.mean(axis=1))
        cells = [
            name,
            f"{size:.2f}",
            str(len(plain)),
            slashed(plain.mean()),
            each,
            "–",
            "–",
            "–",
            "–",
        ]
        if len(aligned):
            difference = (aligned.mean(axis=1) - plain.mean(axis=1)).dropna()
            cells[5:7] = slashed(aligned.mean()), ", ".join(f"{d:+.1f}" for d in difference)
            if len(difference) > 1:
                half = stats.t.ppf(0.975, len(difference) - 1) * difference.sem()
                low, high = difference.mean() - half, difference.mean() + half
                cells[7:] = (
                    f"{difference.mean():+.1f} ({low:+.1f} to {high:+.1f})",
                    f"{2 * half:.1f}",
                )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="cohort and store")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after these")
    parser.add_argument("--pilot", action="store_true", help="learning rates on validation cases")
    parser.add_argument("--table", action="store_true", help="train nothing")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results = given.results / "pilot" if given.pilot else given.results
    results.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * given.minutes
    if not given.table:
        if given.work is None:
            parser.error("--work is needed to train")
        make_cohort(given.work)
        for run in (pilot_runs if given.pilot else study_runs)(given.steps):
            done = (results / f"{run.name}.json").is_file()
            if run.backbone in given.backbones and not done and time.monotonic() < until:
                perform(run, given.work, results)
    print((pilot_table if given.pilot else study_table)(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
