"""A cohort of made-up results."""

import numpy as np

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
