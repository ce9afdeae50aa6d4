"""Every backbone with and without Pmix alignment, on the phantom, under one recipe.

    python experiments/backbones/study.py --work runs/backbones [--seeds 0 1 2] [--steps 240]

Makes a cohort of synthetic cases once, then trains one student per (backbone, alignment, seed) and
scores it on every combination of every test case. A run whose CSV exists in the results' folder is
not repeated, so the script can be stopped and started again; ``--table`` only prints what is there.
"""

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from lightning.pytorch import Trainer, seed_everything

from pmixseg.backbones import UHVED, Backbone, EarlyFusion, MMFormer, MultiEncoderUNet, RFNet
from pmixseg.callbacks import PmixAlignment
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.layouts import find_cases
from pmixseg.data.phantom import PhantomSettings, write_cohort
from pmixseg.data.prepare import prepare
from pmixseg.data.splits import SplitJson
from pmixseg.evaluation.cases import EvaluationSettings
from pmixseg.evaluation.metrics import region_dice
from pmixseg.losses import DiceCE, MixtureAnchor
from pmixseg.modules import OneCycle, StudentModule
from pmixseg.task import BRATS, format_combination

SPACING, SHAPE = 6.0, (32, 32, 24)
PATCH = (32, 32, 32)
"""mmFormer needs 32; the volume is padded to it."""
TRAIN, TEST, COHORT_SEED = 32, 12, 61
WEIGHT = 0.1
DYNUNET = {
    "class_path": "monai.networks.nets.DynUNet",
    "init_args": {
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [16, 32, 64],
    },
}
BACKBONES: dict[str, Callable[[], Backbone]] = {
    "unet": partial(MultiEncoderUNet, width=16, levels=3, stem=2),
    "rfnet": partial(RFNet, width=8, separate="none"),
    "mmformer": partial(
        MMFormer, width=8, patch_size=32, embedding=64, hidden=128, separate="none"
    ),
    "uhved": partial(UHVED, width=8, reconstruct=False),
    "dynunet": partial(EarlyFusion, DYNUNET),
}
"""Small versions: widths are chosen so that a run takes minutes on one core."""


def make_cohort(work: Path) -> None:
    """Phantom, store and split, once."""
    if (work / "split.json").is_file():
        return
    settings = PhantomSettings(spacing=SPACING, shape=SHAPE)
    names = write_cohort(work / "cohort", TRAIN + TEST, COHORT_SEED, settings)
    report = prepare(
        find_cases(work / "cohort", BRATS), work / "store", BRATS, spacing=(SPACING,) * 3
    )
    if report.failed:
        raise SystemExit(" ".join(report.failed.values()))
    split = {"train": names[:TRAIN], "val": [], "test": names[TRAIN:]}
    (work / "split.json").write_text(json.dumps(split))


def train(name: str, aligned: bool, seed: int, steps: int, work: Path) -> pd.DataFrame:
    """One run: Dice per test case and combination, a column per region."""
    seed_everything(seed, verbose=False)
    module = StudentModule(
        backbone=BACKBONES[name](),
        fill="zero",
        criterion=DiceCE(include_background=False, batch_dice=True),
        optimizer=partial(torch.optim.AdamW, lr=6e-3, weight_decay=1e-4),
        scheduler=OneCycle(warmup_fraction=0.1),
        evaluation=EvaluationSettings(window=PATCH, batch_size=2),
    )
    data = BraTSDataModule(
        store=work / "store",
        split=SplitJson(work / "split.json"),
        patch_size=PATCH,
        foreground=0.0,
        batch_size=2,
        seed=seed,
    )
    anchor = MixtureAnchor(weights="uniform")
    terms = [PmixAlignment(weight=WEIGHT, anchor=anchor)] if aligned else []
    trainer = Trainer(
        default_root_dir=work,
        accelerator="cpu",
        precision="bf16-mixed",
        gradient_clip_val=12.0,
        max_steps=steps,
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
    return score(module.eval(), data)


@torch.no_grad()
def score(module: StudentModule, data: BraTSDataModule) -> pd.DataFrame:
    """Dice on the store's grid, which is the phantom's own; both empty counts 1."""
    data.setup("test")
    rows = []
    for item in data.test_dataloader():
        for found in module.predict_item(item, module.test_combinations(item)):
            dice = region_dice(found.on_grid(), item["label"], module.task)
            combination = format_combination(found.combination)
            regions = {region: float(value) for region, value in dice.items()}
            rows.append({"case": item["case_id"], "combination": combination, **regions})
    return pd.DataFrame(rows)


def table(results: Path) -> str:
    """Mean Dice of the 15 combinations per backbone, with the paired difference of alignment."""
    found = []
    for path in sorted(results.glob("*.csv")):
        name, arm, seed = path.stem.rsplit("-", 2)
        regions = pd.read_csv(path)[list(BRATS.regions)].mean() * 100
        found.append({"backbone": name, "arm": arm, "seed": seed, **regions})
    frame = pd.DataFrame(found)
    lines = [
        "| backbone | seeds | plain WT / TC / ET | aligned WT / TC / ET | difference of the mean, "
        "per seed |",
        "|---|---|---|---|---|",
    ]
    for name, rows in frame.groupby("backbone"):
        arms = {
            arm: part.set_index("seed")[list(BRATS.regions)] for arm, part in rows.groupby("arm")
        }
        said = {arm: " / ".join(f"{v:.1f}" for v in part.mean()) for arm, part in arms.items()}
        difference = "–"
        if {"plain", "aligned"} <= arms.keys():
            both = arms["aligned"].mean(axis=1) - arms["plain"].mean(axis=1)
            difference = ", ".join(f"{v:+.1f}" for v in both.dropna())
        seeds = rows["seed"].nunique()
        lines.append(
            f"| {name} | {seeds} | {said.get('plain', '–')} | {said.get('aligned', '–')} | "
            f"{difference} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="cohort and store")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--table", action="store_true", help="train nothing")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    given.results.mkdir(parents=True, exist_ok=True)
    if not given.table:
        make_cohort(given.work)
        for seed in given.seeds:
            for name in given.backbones:
                # Early fusion mixes sequences at the input: there is nothing to align.
                for aligned in (False,) if name == "dynunet" else (False, True):
                    arm = "aligned" if aligned else "plain"
                    path = given.results / f"{name}-{arm}-{seed}.csv"
                    if path.is_file():
                        continue
                    start = time.process_time()
                    rows = train(name, aligned, seed, given.steps, given.work)
                    part = path.with_suffix(".part")
                    rows.to_csv(part, index=False, float_format="%.4f")
                    part.replace(path)
                    spent = time.process_time() - start
                    mean = 100 * rows[list(BRATS.regions)].to_numpy().mean()
                    print(f"{path.stem}: Dice {mean:.1f}, {spent:.0f} CPU s", flush=True)
    print(table(given.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
