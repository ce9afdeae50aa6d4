"""Compare two methods over runs with the same seeds (docs/method/evidence.md).

The primary endpoint is fixed: per case the mean Dice over all combinations and regions; the test
is a paired t over the means of seed-matched runs. All else is exploratory and marked so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pmixseg.argument_checks import checked
from pmixseg.errors import InputError, count_of
from pmixseg.evaluation.comparison.comparison import Comparison
from pmixseg.evaluation.comparison.monotonicity import violations
from pmixseg.evaluation.comparison.paired_tests import PairedTest, holm, paired_t, two_way_bootstrap
from pmixseg.evaluation.records.measures import DICE, MEASURES, direction_of
from pmixseg.evaluation.records.records import KEY, Records
from pmixseg.evaluation.records.tables import refuse_other_truth, run_name

ENOUGH_PAIRS = 8
ENOUGH_CASES = 20


def paired_by_seed(a: Sequence[Records], b: Sequence[Records]) -> list[Records]:
    """Return the runs of B in the order of A's seeds; as given, unless both have the same ones."""
    of_a, of_b = ([tuple(sorted(_config("seed", one).items())) for one in side] for side in (a, b))
    paired = () not in of_a and len(set(of_a)) == len(a) == len(b) and set(of_a) == set(of_b)
    return [b[of_b.index(seeds)] for seeds in of_a] if paired else list(b)


def matching_notes(a: Sequence[Records], b: Sequence[Records]) -> list[str]:
    """Refuse one training counted twice; say where matched runs had other seeds or splits.

    The sentences are for :func:`compare`. Seeds, and the splits of the trainings, are compared as
    far as the sidecars of both runs know them.

    Raises:
        InputError: the same checkpoint twice on one side, or the same results on both.
    """
    _check_trainings("A", a)
    _check_trainings("B", b)
    for x, y in product(a, b):
        if x.table.drop(columns="run").equals(y.table.drop(columns="run")):
            raise InputError(
                f"run '{run_name(x)}' of A and run '{run_name(y)}' of B hold the same results; "
                "name two methods."
            )
    # What a reader must know: known test cases, cases without a score, and pairs of other seeds.
    notes = [
        f"{run_name(one)}: {len(one.sidecar.seen)} of its test cases were used to train or select "
        "the model, so its scores are too good."
        for one in (*a, *b)
        if one.sidecar.seen
    ]
    notes += [f"{run_name(one)}: {one.scored}." for one in (*a, *b) if one.scored]
    changed = [run_name(one) for one in (*a, *b) if one.altered]
    notes += [f"The table of {name} was changed after it was written." for name in changed]
    for what, advice in (
        ("seed", "Give both sides the same seeds, or the pairs share nothing."),
        ("split", "Train both on the same cases, or these may make the difference."),
    ):
        odd = [
            f"{_run_with(what, x)} with {_run_with(what, y)}"
            for x, y in zip(a, b, strict=False)
            if any(v != _config(what, y).get(k, v) for k, v in _config(what, x).items())
        ]
        if odd:
            notes.append(
                f"Runs of different {what}s are paired, as they are named: {'; '.join(odd)}. "
                f"{advice}"
            )
    return notes


def _check_trainings(side: str, runs: Sequence[Records]) -> None:
    """Refuse runs of one training, which would count twice."""
    names: dict[str, str] = {}
    for one in runs:
        digest = (one.sidecar.checkpoint or {}).get("sha256")
        if digest in names:
            raise InputError(
                f"runs '{names[digest]}' and '{run_name(one)}' of {side} were scored with the same "
                "checkpoint, which is one training and not two; give each training once."
            )
        if digest is not None:
            names[digest] = run_name(one)


@checked
def compare(
    a: Sequence[pd.DataFrame],
    b: Sequence[pd.DataFrame],
    measure: str = "dice",
    notes: Sequence[str] = (),
) -> Comparison:
    """Compare two methods.

    Each run's table has ``run``, ``case``, ``combination``, ``n_present``, ``region``, ``dice`` and
    ``measure``; run i of B has the seed of run i of A. ``measure`` is the column of the exploratory
    table: the primary endpoint is Dice in any case. ``notes`` belong beside the numbers, see
    :func:`matching_notes`.

    Raises:
        InputError: no run, unequal numbers of runs, a column is missing or holds no numbers, rows
            occur twice, a case has two truths, or nothing is common to all runs.
    """
    _check(a, b, measure)
    refuse_other_truth([*a, *b])
    remarks = list(notes)
    # Primary endpoint: mean Dice per case, one difference per pair of runs.
    dice = _aligned([*a, *b], "dice", remarks)
    by_case = dice.groupby(level="case", sort=False).mean().to_numpy().T
    of_a, of_b = by_case[: len(a)], by_case[len(a) :]
    differences = of_a - of_b
    cases = tuple(dict.fromkeys(str(c) for c in dice.index.get_level_values("case")))
    primary = paired_t(differences)
    per_case = differences.mean(axis=0)
    # Exploratory: every region and combination, in the chosen measure.
    cells = dice if measure == "dice" else _aligned([*a, *b], measure, remarks)
    if measure not in MEASURES:
        remarks.append(f"'{measure}' is a column of your own: the higher number counts as a win.")
    if direction_of(measure) == "zero":
        cells = cells.abs()
        remarks.append(f"'{measure}' has a sign: its distance from 0 is compared.")
    exploratory = _exploratory(cells, len(a), measure)
    remarks += _limits(primary, len(cases))
    return Comparison(
        runs_a=tuple(_name(run, f"a{i}") for i, run in enumerate(a)),
        runs_b=tuple(_name(run, f"b{i}") for i, run in enumerate(b)),
        cases=cases,
        mean_a=float(of_a.mean()),
        mean_b=float(of_b.mean()),
        by_pair=tuple(float(d) for d in differences.mean(axis=1)),
        primary=primary,
        bootstrap=two_way_bootstrap(differences),
        wins=_wins(per_case),
        measure=measure,
        exploratory=exploratory,
        violations_a=violations(a),
        violations_b=violations(b),
        notes=tuple(remarks),
    )


def _check(a: Sequence[pd.DataFrame], b: Sequence[pd.DataFrame], measure: str) -> None:
    if not a or len(a) != len(b):
        raise InputError(
            f"A has {count_of(len(a), 'run')} and B {len(b)}; give at least one a side, as many on "
            "either, of the same seeds."
        )
    for side, runs in (("A", a), ("B", b)):
        for i, run in enumerate(runs):
            _check_run(run, measure, f"run {_name(run, str(i))} of {side}")


def _check_run(run: pd.DataFrame, measure: str, where: str) -> None:
    """Refuse a table without a measure of numbers that has a better side, and each row once."""
    lacking = [c for c in (*KEY, "n_present", "dice") if c not in run]
    if lacking:
        raise InputError(f"{where} lacks the columns {lacking}; test the run again.")
    known = _measures(run)
    for column in ("dice", measure):
        if column not in known and len(run):
            raise InputError(
                f"{where}: '{column}' is no column of numbers that methods can be compared by; "
                f"choose one of {', '.join(known)}, or test the run again."
            )
    if len(run) and direction_of(measure) is None:
        raise InputError(
            f"{where}: '{measure}' has no better direction, so nobody can win by it; choose one of "
            f"{', '.join(c for c in known if direction_of(c))}."
        )
    if run.duplicated(list(KEY)).any():
        twice = run.loc[run.duplicated(list(KEY)), KEY].iloc[0].tolist()
        raise InputError(f"{where} has {twice} twice; give every run a table of its own.")


def _measures(run: pd.DataFrame) -> list[str]:
    """Return the columns that hold a number, or yes or no, about the prediction of a row."""
    keys = ("run", *KEY, "n_present")
    return [c for c in run if c not in keys and pd.api.types.is_numeric_dtype(run[c].dtype)]


def _name(run: pd.DataFrame, otherwise: str) -> str:
    return str(run["run"].iloc[0]) if "run" in run and len(run) else otherwise


def _aligned(runs: Sequence[pd.DataFrame], column: str, notes: list[str]) -> pd.DataFrame:
    """Return values ``[rows, runs]`` of the rows that all runs have; the others are noted."""
    columns = [run.set_index(list(KEY))[column].rename(i) for i, run in enumerate(runs)]
    everything = pd.concat(columns, axis=1)
    common = everything.dropna()
    if common.empty:
        raise InputError(
            f"no case, combination and region has '{column}' in every run; compare runs that were "
            "tested on the same cases, and of cross-validations join the folds of each seed first."
        )
    left = len(everything) - len(common)
    if left:
        gone = {
            level: set(everything.index.unique(level)) - set(common.index.unique(level))
            for level in KEY
        }
        lost = [count_of(len(names), f"whole {level}") for level, names in gone.items() if names]
        notes.append(
            f"{left} of {len(everything)} rows lack '{column}' in some run and were left out"
            + (f", with them {', '.join(lost)}." if lost else ".")
        )
    return common


def _exploratory(cells: pd.DataFrame, pairs: int, measure: str) -> pd.DataFrame:
    """Compare every cell of the table; p-values are corrected for the number of cells."""
    rows: list[dict[str, Any]] = []
    for (region, combination), part in cells.groupby(level=["region", "combination"], sort=False):
        values = part.to_numpy(dtype=np.float64).T
        differences = values[:pairs] - values[pairs:]
        # Without a second pair of runs nothing is tested: its interval is over cases.
        test = paired_t(differences)
        tested = not np.isnan(test.p)
        low, high = test.interval if tested else two_way_bootstrap(differences, 2000)
        per_case = differences.mean(axis=0)
        better, worse, _ = _wins(per_case if direction_of(measure) == "higher" else -per_case)
        rows.append(
            {
                "region": region,
                "combination": combination,
                "n_present": len(str(combination).split("+")),
                "difference": float(differences.mean()),
                "low": low,
                "high": high,
                "cases": differences.shape[1],
                "wins": better,
                "losses": worse,
                "p": test.p,
            }
        )
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"].to_numpy(dtype=np.float64))
    # Region by region, small combinations first, as the tables of papers.
    order = {region: i for i, region in enumerate(dict.fromkeys(table["region"]))}
    place = table["region"].map(order)
    return table.iloc[np.lexsort((np.arange(len(table)), table["n_present"], place))].reset_index(
        drop=True
    )


def _wins(per_case: NDArray[np.float64]) -> tuple[int, int, int]:
    equal = np.abs(per_case) < 1e-12
    better, worse = (per_case > 0) & ~equal, (per_case < 0) & ~equal
    return int(better.sum()), int(worse.sum()), int(equal.sum())


def _limits(primary: PairedTest, cases: int) -> list[str]:
    """Say what these numbers cannot tell."""
    notes = []
    if primary.pairs == 1:
        notes.append(
            "One run a side: this compares two checkpoints, not two methods. Another training of "
            f"either may turn the result; give {ENOUGH_PAIRS} or more seed-matched runs a side."
        )
    elif np.isnan(primary.p):
        notes.append(
            "All pairs of runs differ by exactly the same amount, so they are not independent "
            "trainings (the same run given twice?); there is no test."
        )
    elif primary.pairs < ENOUGH_PAIRS:
        notes.append(
            f"{primary.pairs} pairs of runs are few ({ENOUGH_PAIRS} are asked for): a true "
            f"difference below {DICE.scale * primary.detectable:.2f} points of Dice would be "
            "missed more than once in five, and bootstrap intervals are too narrow."
        )
    if cases < ENOUGH_CASES:
        notes.append(
            f"{cases} case{'s are' if cases > 1 else ' is'} too few to conclude anything about "
            "patients: the intervals hold for cases like these at best."
        )
    return notes


def _run_with(what: str, one: Records) -> str:
    values = ", ".join(f"{name} {value}" for name, value in sorted(_config(what, one).items()))
    return f"{run_name(one)} ({values})"


def _config(what: str, one: Records) -> dict[str, Any]:
    """Return the seeds by name, or the split, that a run was trained with, as far as known."""
    value = one.sidecar.config.get(what)  # a configuration of other code may hold anything
    if what == "split":
        return {what: value} if isinstance(value, str) else {}
    return dict(value) if isinstance(value, Mapping) else {}
