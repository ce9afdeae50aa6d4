"""Studies: ``run`` trains what a plan lacks, ``status`` counts, ``analyse`` prints the tables."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from experiments.study.analysis import analyse
from experiments.study.plan import Plan, read_plan
from experiments.study.results import TRAININGS, StudyResults
from experiments.study.runner import Runner
from experiments.study.training import COHORT, ENDED
from pmixseg.errors import InputError
from pmixseg.files import whole

HERE = Path(__file__).parent


def parser() -> argparse.ArgumentParser:
    """Commands and their options."""
    made = argparse.ArgumentParser(prog="python -m experiments.study", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "train what is missing; repeat the command after any stop"),
        ("status", "count what has ended, and what it took"),
        ("analyse", "print the tables"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("plan", type=Path, help="YAML file")
        command.add_argument("--results", type=Path, default=HERE / "results")
        command.add_argument(
            "--set", action="append", default=[], metavar="PLACE=VALUE", help="change the plan"
        )
        if name == "run":
            command.add_argument("--work", type=Path, default=Path("runs/study"))
            command.add_argument("--jobs", type=int, default=1, help="trainings at a time")
            command.add_argument("--threads", type=int, default=1, help="of each training")
            command.add_argument("--workers", type=int, default=0, help="that prepare the cohort")
            command.add_argument("--minutes", type=float, default=float("inf"))
            command.add_argument(
                "--fit",
                type=int,
                metavar="SEEDS",
                help="measure the speed, and lower the steps of all trainings alike until so many "
                "seeds end within --minutes",
            )
        if name == "analyse":
            command.add_argument(
                "--into",
                type=Path,
                metavar="PAGE",
                help="write them into a page, between <!-- NAME: begin --> and <!-- NAME: end -->",
            )
        else:
            command.add_argument("--groups", nargs="+", help="only these")
            command.add_argument("--seeds", nargs="+", type=int, help="only these")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command; 1 for an error, 3 where trainings are left."""
    args = parser().parse_args(arguments)
    try:
        plan = read_plan(args.plan, dict(_change(text) for text in args.set))
        if args.command == "analyse":
            results = StudyResults.read(args.results / plan.name)
            planned, page = {t.group for t in plan.trainings}, args.into is not None
            text = analyse(results, plan.tables, planned, fold=page)
            if not page:
                print(f"## {plan.title}\n\n{text}")
            else:
                insert(args.into, plan.name, text)
            return 0
        plan = plan.only(args.groups, args.seeds)
        return run(plan, args) if args.command == "run" else status(plan, args.results)
    except InputError as error:
        print(error, file=sys.stderr)
        return 1


def run(plan: Plan, args: argparse.Namespace) -> int:
    """Train what is missing, and write the study's tables of results."""
    began = time.monotonic()
    assert plan.cohort is not None
    work, folder = args.work / plan.name, args.results / plan.name
    plan.cohort.make(work / COHORT, args.workers)
    runner = Runner(
        plan.cohort, work, args.jobs, args.threads, began + 60 * args.minutes, tell=_say
    )
    try:
        if args.fit is not None:
            plan = fitted(plan, args.fit, runner, work / STEPS, folder)
        known = earlier(plan, folder, work)
        if known is not None:
            runner.durations = durations(plan, known)
        runner.keep = partial(keep, plan, folder, work)
        runner.run(plan.trainings, set() if known is None else set(known.trainings["run"]))
    except KeyboardInterrupt:
        _say("stopped; repeat the command to go on")
    finally:
        runner.stop()
    keep(plan, folder, work)
    return status(plan, args.results) or (1 if runner.failed else 0)


def keep(plan: Plan, folder: Path, work: Path) -> None:
    """Write what has ended into the study's results."""
    results = earlier(plan, folder, work)
    if results is not None:
        results.write(folder)


STEPS = "steps.json"
TRIAL_STEPS = 60
OVERHEAD = 15.0
"""Seconds of a training beside its steps: the gap measured twice, and the test."""
SHARE = 0.85
"""Of the time that is planned with: speed differs between arms and over time."""


def fitted(plan: Plan, seeds: int, runner: Runner, kept: Path, folder: Path) -> Plan:
    """The same plan with as many steps as the time allows, equal in all trainings.

    The choice rests on speed alone. It is made once, so that a study that goes on later keeps it.

    Args:
        plan: its steps are the most that are taken.
        seeds: so many shall end.
        runner: its processes train for a moment, all at once, and then go on with the study.
        kept: file of the choice.
        folder: of the study's results; what has ended there made the choice already.

    Raises:
        InputError: the plan has trainings of different lengths, or there is no time at all.
    """
    lengths = {t.settings["steps"] for t in plan.trainings}
    if len(lengths) != 1:
        raise InputError(
            f"{plan.name}: --fit needs one length, and the plan has {sorted(lengths)}."
        )
    most = int(lengths.pop())
    if (folder / TRAININGS).is_file():
        steps = int(StudyResults.read(folder).trainings["steps"].iloc[0])
    elif kept.is_file():
        steps = int(json.loads(kept.read_text(encoding="utf-8"))["steps"])
    else:
        trials = [
            replace(t, trial=True, settings={**t.settings, "steps": TRIAL_STEPS, "gap": None})
            for t in plan.trainings[: runner.jobs]
        ]
        speed = runner.speed(trials)
        first = list(dict.fromkeys(t.seed for t in plan.trainings))[:seeds]
        waves = -(-sum(t.seed in first for t in plan.trainings) // runner.jobs)
        left = (runner.until - time.monotonic()) * SHARE / waves - OVERHEAD
        steps = most if left == float("inf") else min(most, int(speed * left) // 20 * 20)
        _say(f"{speed:.2f} steps/s in each of {len(trials)} at once: {steps} steps of {most}")
        if steps < min(most, 20):
            raise InputError(f"{plan.name}: {left:.0f} s are too few for a training; give more.")
        with whole(kept) as part:
            part.write_text(json.dumps({"steps": steps, "speed": speed}), encoding="utf-8")
    chosen = [replace(t, settings={**t.settings, "steps": steps}) for t in plan.trainings]
    return replace(plan, trainings=tuple(chosen))


def earlier(plan: Plan, folder: Path, work: Path) -> StudyResults | None:
    """What ended in this folder of work and in the study's results.

    Raises:
        InputError: a training there had other settings.
    """
    names = [training.name for training in plan.trainings]
    here = StudyResults.gather(plan.name, work / ENDED, names)
    there = StudyResults.read(folder) if (folder / TRAININGS).is_file() else None
    both = there.joined(here, names) if here and there else here or there
    if both is not None:
        made = dict(zip(both.trainings["run"], both.trainings["settings"], strict=True))
        other = [t.name for t in plan.trainings if made.get(t.name, t.fingerprint) != t.fingerprint]
        if other:
            raise InputError(
                f"{other[0]} and {len(other) - 1} others ended with other settings than the plan "
                f"has now; use another --work and --results, or undo the change."
            )
    return both


def durations(plan: Plan, known: StudyResults) -> dict[tuple[str, str, str], float]:
    """Longest seconds of every kind of training that ended in this place."""
    rows = known.trainings.set_index("run")
    longest: dict[tuple[str, str, str], float] = {}
    for training in plan.trainings:
        if training.name in rows.index:
            row = rows.loc[training.name]
            key = (training.group, training.arm, training.part)
            taken = float(row["seconds"] + row["scoring_seconds"])
            longest[key] = max(taken, longest.get(key, 0.0))
    return longest


def insert(page: Path, name: str, text: str) -> None:
    """Replace what stands between a study's two marks on a page.

    Raises:
        InputError: the page lacks them.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = page.read_text(encoding="utf-8")
    if begin not in old or end not in old:
        raise InputError(f"{page} lacks the lines {begin} and {end}; add them.")
    head, tail = old.split(begin)[0], old.split(end)[1]
    with whole(page) as part:
        part.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}", encoding="utf-8")


def status(plan: Plan, results: Path) -> int:
    """Say per group and arm what has ended; 3 where something is left."""
    folder = results / plan.name
    rows: Mapping[str, Any] = {}
    if (folder / TRAININGS).is_file():
        rows = StudyResults.read(folder).trainings.set_index("run").to_dict("index")
    counts: dict[tuple[str, str], list[int]] = {}
    seconds = 0.0
    for training in plan.trainings:
        count = counts.setdefault((training.group, training.arm), [0, 0])
        count[1] += 1
        if training.name in rows:
            count[0] += 1
            row = rows[training.name]
            seconds += row["cpu_seconds"] + row["scoring_cpu_seconds"]
    for (group, arm), (ended, planned) in counts.items():
        _say(f"{group:<12} {arm:<28} {ended} of {planned} trainings ended")
    ended, planned = (sum(c[i] for c in counts.values()) for i in (0, 1))
    _say(f"{plan.name}: {ended} of {planned} ended, {seconds / 3600:.2f} CPU hours")
    return 0 if ended == planned else 3


def _change(text: str) -> tuple[str, Any]:
    place, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set {text}: write PLACE=VALUE, such as training.steps=10.")
    return place, yaml.safe_load(value)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
