"""Tables of the confirmatory arms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from arms import ANCHORS, ARMS, HYPOTHESES, Weights, confirm_jobs
from results import REGIONS, Results, markdown, percent
from study import Job

from pmixseg.evaluation.comparison.comparison import Comparison, compare
from pmixseg.evaluation.comparison.paired_tests import holm
from pmixseg.evaluation.gap.measure import Gap
from pmixseg.task import BRATS


def whole_seeds(results: Results, weights: Weights) -> dict[int, dict[str, Job]]:
    """Seeds all of whose trainings ended: seed -> arm or teacher -> job."""
    seeds: dict[int, dict[str, Job]] = {}
    for arm, job in confirm_jobs(weights):
        seeds.setdefault(job.seed, {})[arm] = job
    return {s: jobs for s, jobs in seeds.items() if all(map(results.has, jobs.values()))}


def full_dice(results: Results, job: Job) -> float:
    """Mean Dice with every sequence shown."""
    table = results.records(job)
    return float(table.loc[table["n_present"] == len(BRATS.modalities), "dice"].mean())


def arms(results: Results, seeds: dict[int, dict[str, Job]]) -> str:
    """Every arm's means over seeds: endpoint with its spread, regions, number of sequences."""
    rows = []
    for arm in ("base", *ARMS):
        tables = [results.records(jobs[arm]) for jobs in seeds.values()]
        means = [t["dice"].mean() for t in tables]
        everything = pd.concat(tables)
        regions = everything.groupby("region")["dice"].mean()
        sizes = everything.groupby("n_present")["dice"].mean()
        spread = percent(float(np.std(means, ddof=1))) if len(means) > 1 else "–"
        cells = [percent(regions[r]) for r in REGIONS]
        cells += [percent(sizes[n]) for n in range(1, len(BRATS.modalities) + 1)]
        rows.append([arm, percent(float(np.mean(means))), spread, *cells])
    header = ["arm", "mean Dice, %", "SD over seeds", *REGIONS, "1 shown", "2", "3", "4"]
    return markdown(header, rows)


def comparisons(
    results: Results, seeds: dict[int, dict[str, Job]]
) -> dict[tuple[str, str], Comparison]:
    """Every hypothesis over the seeds that ended."""
    return {
        (a, b): compare(
            [results.records(jobs[a]) for jobs in seeds.values()],
            [results.records(jobs[b]) for jobs in seeds.values()],
        )
        for a, b in HYPOTHESES
    }


def primary(found: dict[tuple[str, str], Comparison]) -> str:
    """The confirmatory tests."""
    corrected = holm(np.array([c.primary.p for c in found.values()]))
    rows = []
    for ((a, b), c), p_holm in zip(found.items(), corrected, strict=True):
        test = c.primary
        rows.append(
            [
                f"{a} − {b}",
                percent(test.difference, signed=True),
                f"{percent(test.interval[0], True)} to {percent(test.interval[1], True)}",
                f"{percent(c.bootstrap[0], True)} to {percent(c.bootstrap[1], True)}",
                f"{test.p:.3g}",
                f"{p_holm:.3g}",
                f"{100 * test.detectable:.2f}",
                " ".join(f"{100 * d:+.1f}" for d in c.by_pair),
            ]
        )
    header = [
        "A − B",
        "difference, points",
        "95 % (paired t)",
        "95 % (bootstrap, seeds × cases)",
        "p",
        "p, Holm",
        "detectable, points",
        "per seed",
    ]
    return markdown(header, rows)


def exploratory(found: dict[tuple[str, str], Comparison]) -> str:
    """Differences by region and by number of sequences shown; how many of 45 cells pass Holm."""
    rows = []
    for (a, b), c in found.items():
        cells = c.exploratory
        regions = cells.groupby("region")["difference"].mean()
        sizes = cells.groupby("n_present")["difference"].mean()
        passed = cells[cells["p_holm"] < 0.05]
        better = int((passed["difference"] > 0).sum())
        rows.append(
            [
                f"{a} − {b}",
                *(percent(regions[r], True) for r in REGIONS),
                *(percent(sizes[n], True) for n in range(1, len(BRATS.modalities) + 1)),
                f"{better} better, {len(passed) - better} worse",
            ]
        )
    header = ["A − B", *REGIONS, "1 shown", "2", "3", "4", "of 45 cells with p (Holm) < 0.05"]
    return markdown(header, rows)


def gaps(results: Results, seeds: dict[int, dict[str, Job]], names: Sequence[str]) -> str:
    """Gap before and after training, mean over seeds, and whether anything collapsed."""
    rows = []
    reference = names[0]
    for name in names:
        found = [results.read(jobs[name]) for jobs in seeds.values()]
        others = [results.read(jobs[reference]) for jobs in seeds.values()]
        for level in found[0]["gap_after"]:
            after = pd.DataFrame([f["gap_after"][level] for f in found])
            before = pd.DataFrame([f["gap_before"][level] for f in found])
            collapsed = sum(
                Gap(**f["gap_after"][level]).collapsed(Gap(**o["gap_after"][level]))
                for f, o in zip(found, others, strict=True)
            )
            mean, was = after.mean(), before.mean()
            rows.append(
                [
                    name,
                    level.removeprefix("level"),
                    f"{was['ratio']:.2f} → {mean['ratio']:.3f}",
                    f"{mean['numerator']:.3f}",
                    f"{mean['variance']:.3f}",
                    f"{mean['effective_rank']:.1f}",
                    f"{mean['centroid_distance']:.2f}",
                    f"{mean['cka']:.2f}",
                    f"{mean['jensen_shannon']:.2f}",
                    f"{mean['total_correlation']:.2f}",
                    f"{collapsed} of {len(found)}",
                ]
            )
    header = [
        "trained",
        "level",
        "gap before → after",
        "numerator",
        "variance",
        "effective rank",
        "centroids apart",
        "CKA",
        "JSD, nats",
        "total correlation",
        "collapsed",
    ]
    return markdown(header, rows)


def mixture(results: Results, seeds: dict[int, dict[str, Job]]) -> str:
    """Learned weights of the teachers' mixture, mean over seeds."""
    rows = []
    for name in ("teacher-none", *(f"teacher-{a}" for a in ANCHORS)):
        found = [results.read(jobs[name])["anchor_weights"] for jobs in seeds.values()]
        for level in found[0]:
            mean = np.mean([f[level] for f in found], axis=0)
            rows.append([name, level.removeprefix("level"), *(f"{w:.3f}" for w in mean)])
    return markdown(["trained", "level", *BRATS.modalities], rows)


def costs(results: Results, seeds: dict[int, dict[str, Job]]) -> str:
    """CPU time of the training, and as a ratio to the one without the term, same seed."""
    pairs = {name: "alone" for name in ARMS if name != "alone"}
    pairs |= {f"teacher-{anchor}": "teacher-none" for anchor in ANCHORS}
    rows = []
    for name, base in pairs.items():
        own = [results.read(jobs[name])["cpu_seconds"] for jobs in seeds.values()]
        without = [results.read(jobs[base])["cpu_seconds"] for jobs in seeds.values()]
        ratio = np.median(np.array(own) / np.array(without))
        rows.append([name, f"{np.median(own):.0f}", base, f"{ratio:.2f}"])
    return markdown(["trained", "CPU seconds, median", "against", "ratio, median"], rows)


def teachers(results: Results, seeds: dict[int, dict[str, Job]]) -> str:
    """Teachers of the confirmatory stage on the test cases, all four sequences shown."""
    rows = []
    for anchor in ("none", *ANCHORS):
        name = f"teacher-{anchor}"
        full = [full_dice(results, jobs[name]) for jobs in seeds.values()]
        rows.append([name, percent(float(np.mean(full)))])
    return markdown(["trained", "mean Dice, all four shown, %"], rows)
