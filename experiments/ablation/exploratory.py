"""Tables of the exploratory arms: means over two seeds, and each seed's difference."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from arms import Weights, explore_jobs
from results import REGIONS, Results, markdown, percent
from study import NO_CONTRAST, NOT_AT_RANDOM, PROTOCOLS, UNIFORM, Job

TITLES = {
    "modalities": "number of modalities",
    "dependence": "dependence between the modalities",
    "missingness": "missingness in training × at test",
    "levels": "aligned levels",
    "distances": "distances",
    "terms": "terms of the distillation",
    "scratch": "aligned and distilled from random weights on",
}
TEST_WEIGHTS = "test-weights-not-at-random.csv"
"""How often each test case is seen with each combination when FLAIR is missing not at random."""


def tables(results: Results, weights: Weights) -> list[tuple[str, str]]:
    """Titles and tables of the questions of which at least one seed ended."""
    found = []
    for question, pairs in explore_jobs(weights).items():
        seeds: dict[int, dict[str, Job]] = {}
        for row, job in pairs:
            seeds.setdefault(job.seed, {})[row] = job
        whole = {s: jobs for s, jobs in seeds.items() if all(map(results.has, jobs.values()))}
        if not whole:
            continue
        made = missingness if question == "missingness" else differences
        title = f"Exploratory: {TITLES[question]} ({len(whole)} of {len(seeds)} seeds)"
        found.append((title, made(results, whole)))
    return found


def differences(results: Results, seeds: Mapping[int, Mapping[str, Job]]) -> str:
    """Dice of every row; its difference to the student alone with the same beginning."""
    rows = []
    for name, example in next(iter(seeds.values())).items():
        if example.role == "teacher":
            continue
        tables = {s: results.records(jobs[name]) for s, jobs in seeds.items()}
        means = {s: float(t["dice"].mean()) for s, t in tables.items()}
        regions = pd.concat(tables.values()).groupby("region")["dice"].mean()
        against = [
            100 * (means[s] - float(results.records(alone(jobs, jobs[name]))["dice"].mean()))
            for s, jobs in seeds.items()
        ]
        gaps = [results.read(jobs[name])["gap_after"] for jobs in seeds.values()]
        last = max(gaps[0])
        rows.append(
            [
                name,
                percent(float(np.mean(list(means.values())))),
                *(percent(regions[r]) for r in REGIONS),
                f"{np.mean(against):+.2f}",
                " ".join(f"{value:+.2f}" for value in against),
                f"{np.mean([g[last]['ratio'] for g in gaps]):.3f}",
                f"{np.mean([g[last]['effective_rank'] for g in gaps]):.1f}",
            ]
        )
    header = ["trained", "mean Dice, %", *REGIONS, "against alone, points", "per seed"]
    return markdown([*header, "gap, coarsest level", "effective rank"], rows)


def alone(jobs: Mapping[str, Job], job: Job) -> Job:
    """The student alone that began as this job did, or that began with it.

    Among trainings that all began from random weights, the base.
    """
    start = job.name if job.role == "base" else job.start
    continuing = [
        other
        for other in jobs.values()
        if other.start == start and not other.weight and other.teacher is None
        if other.role == "student"
    ]
    bases = [other for other in jobs.values() if other.role == "base"]
    (found,) = continuing or bases
    return found


def missingness(results: Results, seeds: Mapping[int, Mapping[str, Job]]) -> str:
    """Protocol in training against protocol at test: alone, aligned, difference per seed."""
    chances = pd.read_csv(results.folder / TEST_WEIGHTS)
    rows = []
    for trained in PROTOCOLS:
        cells: list[str] = []
        for tested in PROTOCOLS:
            both = [
                [
                    under(results.records(jobs[f"{trained}, {arm}"]), tested, chances)
                    for jobs in seeds.values()
                ]
                for arm in ("alone", "aligned")
            ]
            shift = " ".join(f"{100 * (b - a):+.2f}" for a, b in zip(*both, strict=True))
            means = [percent(float(np.mean(values))) for values in both]
            cells.append(f"{means[0]} / {means[1]} ({shift})")
        rows.append([trained, *cells])
    return markdown(["trained with", *(f"tested: {name}" for name in PROTOCOLS)], rows)


def under(records: pd.DataFrame, tested: str, chances: pd.DataFrame) -> float:
    """Mean Dice when combinations appear as a protocol says.

    Args:
        records: Dice of every case, combination and region.
        tested: a protocol.
        chances: ``case``, ``combination`` and ``weight`` of the protocol not at random.
    """
    if tested == UNIFORM:
        return float(records["dice"].mean())
    if tested == NO_CONTRAST:
        without = ~records["combination"].str.contains("t1ce")
        return float(records.loc[without, "dice"].mean())
    if tested == NOT_AT_RANDOM:
        merged = records.merge(chances, on=["case", "combination"], validate="many_to_one")
        return float(np.average(merged["dice"], weights=merged["weight"]))
    raise ValueError(f"{tested} is no protocol of the study; use one of {', '.join(PROTOCOLS)}.")
