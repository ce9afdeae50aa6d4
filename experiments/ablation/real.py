"""The six arms on real scans, case by case."""

from __future__ import annotations

import numpy as np
import pandas as pd
from arms import ARMS, real_jobs
from results import REGIONS, Results, markdown, percent
from study import Job


def whole_folds(results: Results) -> list[dict[str, Job]]:
    """Cases left out all of whose trainings ended: arm -> job."""
    folds: dict[str, dict[str, Job]] = {}
    for arm, job in real_jobs():
        folds.setdefault(job.cohort, {})[arm] = job
    return [jobs for jobs in folds.values() if all(map(results.has, jobs.values()))]


def cases(results: Results, folds: list[dict[str, Job]]) -> str:
    """Mean Dice over 15 combinations and three regions of every left-out case, and over cases."""
    rows = []
    for arm in ("base", *ARMS):
        tables = [results.records(jobs[arm]) for jobs in folds]
        means = [float(table["dice"].mean()) for table in tables]
        regions = pd.concat(tables).groupby("region")["dice"].mean()
        rows.append(
            [
                arm,
                *(percent(value) for value in means),
                percent(float(np.mean(means))),
                *(percent(regions[r]) for r in REGIONS),
            ]
        )
    names = [results.records(jobs["base"])["case"].iloc[0].split("_")[-1] for jobs in folds]
    return markdown(["arm", *names, "mean", *REGIONS], rows)
