"""A cohort of made-up results, and run folders that hold it."""

from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pmixseg.evaluation.prediction.windows import iterate_combinations
from pmixseg.evaluation.records.examples import Example
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.records.sidecar import Sidecar
from pmixseg.evaluation.report import page
from pmixseg.task import BRATS, format_combination


def made_up_rows(cases=8, seed=0, gain=0.0, task=BRATS):
    """Dice that grows with the number of modalities; one case lacks T1, one has no ET."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(cases):
        skill = rng.normal(0, 0.04)
        for combination in task.combinations():
            if i == 1 and "t1" in combination:
                continue
            for j, region in enumerate(task.regions):
                base = 0.88 - 0.1 * j + gain - 0.06 * (task.num_modalities - len(combination))
                if region == "ET" and "t1ce" not in combination:
                    base -= 0.3
                dice = float(np.clip(base + skill + rng.normal(0, 0.03), 0, 1))
                empty = region == "ET" and i == 2
                rows.append(
                    {
                        "case": f"case_{i:03d}",
                        "combination": format_combination(combination),
                        "region": region,
                        "dice": 0.0 if empty else dice,
                        "hd95": 373.13 if empty else float(3 + 30 * (1 - dice)),
                        "truth_ml": 0.0 if empty else 40.0,
                        "predicted_ml": 40.0 * dice,
                    }
                )
    return rows


ABOUT = Sidecar(
    BRATS, conventions={"percentile": "pooled", "hd95_one_empty_mm": 373.12866}, phantom=True
)


def make_run(root, name, rows, about=ABOUT, pictures=("case_000", "case_001"), course=True):
    run = root / name
    Records.from_rows(rows, name, about).write(run / "records.csv")
    if course:
        table = {"epoch": [0, 0, 1, 1], "step": [1, 1, 2, 2], "train/loss": [1, None, 0.5, None]}
        table |= {"val/dice": [None, 0.2, None, 0.4], "val/dice/WT": [None, 0.3, None, 0.5]}
        table |= {"anchor/level1/t1": [None, 0.25, None, 0.3], "lr-AdamW": [1e-3] * 4}
        pd.DataFrame(table).to_csv(run / "metrics.csv", index=False)
    rng = np.random.default_rng(0)
    for case in pictures:
        image = rng.normal(size=(4, 12, 10, 8)).astype(np.float32)
        label = example_label()
        predictions = {c: np.roll(label, 4 - len(c), 0) for c in BRATS.combinations()}
        small = Example.from_volumes(
            case, BRATS.modalities, image, label, predictions, (1.0, 1.0, 1.0)
        )
        small.save(run)
    return run


def example_label():
    label = np.zeros((12, 10, 8), np.uint8)
    label[3:8, 3:7, 2:5] = 2
    label[4:6, 4:6, 3] = 3
    return label


def figures_left_empty():
    """A patch: the figures of a report are blank, for drawing them takes most of its time."""
    blank = {name: Figure(figsize=(1, 1)) for name in ("heat_dice", "cases_dice")}
    return mock.patch.object(page, "_figures", lambda *read: blank)


def plain_report(runs, out, **options):
    """What a report says, without its figures."""
    with figures_left_empty():
        return page.write_report([Path(run) for run in runs], out, **options)


def predict_combinations(*args, **kwargs):
    """Probabilities of all combinations at once."""
    ((_, probabilities),) = iterate_combinations(*args, **kwargs)
    return probabilities
