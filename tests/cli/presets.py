"""Composing experiment files with flags that make them tiny."""

from pathlib import Path

import pandas as pd

from pmixseg.cli import main

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]
TINY_UNET = [
    *("--model.backbone=MultiEncoderUNet", "--model.backbone.width=2", "--model.backbone.levels=2"),
]
TINY = [
    *QUIET,
    "--model.evaluation.window=[32,40,32]",
    "--data.patch_size=16",
    "--data.num_workers=0",
    "--data.split=pmixseg.data.splits.Fractions",
    "--trainer.precision=32",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=0",
]
SMALL_UNET = ["--model.backbone.width=4", "--model.backbone.levels=3"]


def last_of_each(flags):
    """Of flags with one name the last, since a training refuses a flag that comes twice."""
    return list({f if "+=" in f else f.partition("=")[0]: f for f in flags}.values())


def fit(store, run, *files_and_flags):
    """``pmixseg fit`` with experiment files (paths without ``--``), then flags; the exit code."""
    files = ["brats2018/data.yaml", *(f for f in files_and_flags if not f.startswith("--"))]
    flags = [f for f in files_and_flags if f.startswith("--")]
    configs = [f"--config={EXPERIMENTS / name}" for name in files]
    return main(
        ["fit", *configs, f"--run={run}", f"--data.store={store}", *last_of_each([*TINY, *flags])]
    )


def score(store, run, *flags):
    """``pmixseg test`` of a run on the whole cohort of a store, seen or not; the exit code."""
    checkpoint = f"--ckpt_path={run}/checkpoints/last.ckpt"
    whole = ["--data.split=pmixseg.data.splits.WholeCohort", "--force"]
    quiet = "--trainer.enable_progress_bar=false"
    return main(["test", checkpoint, f"--data.store={store}", *whole, quiet, *flags])


def metrics(run):
    """Last value of every column of ``metrics.csv``."""
    table = pd.read_csv(Path(run) / "metrics.csv")
    return table.ffill().iloc[-1]
