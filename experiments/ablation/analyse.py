"""Tables of the ablation from ``results/``: written into README.md between its two markers.

python experiments/ablation/analyse.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from study import (
    ANCHORS,
    ARMS,
    CURVE_STEPS,
    HYPOTHESES,
    SEEDS,
    Job,
    confirm_jobs,
    curve_jobs,
    grid_jobs,
)

from pmixseg.evaluation.paired_tests import holm
from pmixseg.evaluation.statistics import Comparison, compare
from pmixseg.losses.gap import Gap
from pmixseg.task import BRATS

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
REGIONS = tuple(BRATS.regions)


class Results:
    """What the runner left, by job.

    Args:
        folder: ``results/``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, job: Job) -> bool:
        """Whether the training ended."""
        return (self.folder / f"{job.name}.json").is_file()

    def read(self, job: Job) -> dict[str, Any]:
        """Its figures."""
        found: dict[str, Any] = json.loads((self.folder / f"{job.name}.json").read_text())
        return found

    def records(self, job: Job) -> pd.DataFrame:
        """Its table in the long form that the statistics take."""
        wide = pd.read_csv(self.folder / f"{job.name}.csv")
        long = wide.melt(["case", "combination"], list(REGIONS), "region", "dice")
        long["n_present"] = long["combination"].str.count(r"\+") + 1
        return long.assign(run=job.name)

    def by_arm(self) -> dict[int, dict[str, Job]]:
        """Whole seeds of the confirmatory stage: seed -> arm or teacher -> job."""
        seeds: dict[int, dict[str, Job]] = {}
        for arm, job in confirm_jobs():
            seeds.setdefault(job.seed, {})[arm] = job
        return {s: jobs for s, jobs in seeds.items() if all(map(self.has, jobs.values()))}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def percent(value: float, signed: bool = False) -> str:
    """Dice in points."""
    return f"{100 * value:+.2f}" if signed else f"{100 * value:.1f}"


def curve(results: Results) -> str:
    """Student alone by number of steps."""
    jobs = [job for job in curve_jobs() if results.has(job)]
    rows = []
    for steps in CURVE_STEPS:
        found = [results.read(job)["dice"] for job in jobs if job.steps == steps]
        if found:
            rows.append([str(steps), percent(float(np.mean(found)))])
    return markdown(["steps from random weights", "mean Dice on validation cases, %"], rows)


def grid(results: Results) -> str:
    """Per arm and λ: the student's endpoint, the teacher's Dice on all four sequences."""
    jobs = [job for job in grid_jobs() if results.has(job)]
    teachers = {job.name: job for job in jobs if job.role == "teacher"}
    rows = []
    for job in jobs:
        if job.role == "teacher":
            continue
        if job.role == "base":
            continue
        arm, weight, full = "alone" if not job.weight else "aligned", job.weight, ""
        if job.teacher is not None:
            teacher = teachers[job.teacher]
            arm, weight = f"distilled-{teacher.anchor}", teacher.weight
            full = percent(full_dice(results, teacher))
        told = f"{job.distillation:g}" if job.teacher else ""
        dice = percent(results.read(job)["dice"])
        rows.append([arm, f"{weight:g}", told, str(job.seed), dice, full])
    header = ["arm", "λ of alignment", "λ of distillation", "seed", "student", "its teacher"]
    return markdown(header, rows)


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


def sections(results: Results) -> list[tuple[str, str]]:
    """Titles and tables of what there is so far."""
    found = []
    if any(map(results.has, curve_jobs())):
        found.append(("Where the curve is flat (student alone)", curve(results)))
    seeds = results.by_arm()
    if any(map(results.has, grid_jobs())):
        found.append(("Exploratory: every λ, validation cases, mean Dice in %", grid(results)))
    if len(seeds) < 2:
        return found
    named = ", ".join(map(str, seeds))
    tested = comparisons(results, seeds)
    few = f"Fewer than the {len(SEEDS)} seeds planned. " if len(seeds) < len(SEEDS) else ""
    told = (
        f"{few}Seeds {named}; {len(next(iter(tested.values())).cases)} test cases. Detectable: the "
        "difference that four in five such studies would find."
    )
    names = ("teacher-none", *(f"teacher-{a}" for a in ANCHORS))
    return [
        *found,
        (f"Arms: {len(seeds)} of {len(SEEDS)} planned seeds ended ({named})", arms(results, seeds)),
        ("Confirmatory tests of the primary endpoint", f"{primary(tested)}\n\n{told}"),
        ("Exploratory: where the differences lie", exploratory(tested)),
        ("Gap of the teachers", gaps(results, seeds, names)),
        ("Gap of the students", gaps(results, seeds, ("alone", *ARMS[1:]))),
        ("Teachers", teachers(results, seeds)),
        ("Learned mixture weights of the teachers", mixture(results, seeds)),
        ("Cost of the training", costs(results, seeds)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    args = parser.parse_args()
    parts = [f"### {title}\n\n{table}" for title, table in sections(Results(args.results))]
    text = args.readme.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{args.readme} lacks the lines {BEGIN} and {END}.")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    args.readme.write_text("\n\n".join([head + BEGIN, *parts, END + tail]))
    print(f"{args.readme}: {len(parts)} tables")


if __name__ == "__main__":
    sys.exit(main())
