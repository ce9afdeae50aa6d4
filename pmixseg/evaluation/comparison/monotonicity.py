"""Find where a further modality lowers the score of a case.

A network that segments worse when it is shown more has not learnt to weigh its inputs; a clinic
would have to withhold a scan from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pmixseg.errors import InputError
from pmixseg.evaluation.comparison.paired_tests import LEVEL, holm, paired_t, two_way_bootstrap

COLUMNS = ["region", "combination", "added", "change", "low", "high", "cases", "hurt", "clear"]


def added_modalities(runs: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Measure what each added modality does to Dice, for one method.

    Returns:
        One row per region, combination and modality that it lacks, worst change first:
        ``region``, ``combination``, ``added``, ``change`` (mean Dice after minus before, over runs
        and the cases that have both), ``low`` and ``high`` (95 %, bootstrap over runs and cases),
        ``cases``, ``hurt`` (cases whose mean over runs fell), ``clear`` (it fell in these trained
        networks by a t-test over the cases' means, at 5 % after Holm's correction for all rows).
    """
    if not runs:
        raise InputError("no run to look at; name at least one with records.")
    # One spelling of each combination, whatever the order of its sequences.
    names: dict[frozenset[str], str] = {}
    for text in (str(t) for run in runs for t in run["combination"].unique()):
        names.setdefault(frozenset(text.split("+")), text)
    modalities = dict.fromkeys(m for text in names.values() for m in text.split("+"))
    regions = dict.fromkeys(str(r) for r in runs[0]["region"])
    dice = _dice_of_every_run([_by_case(run, names) for run in runs])
    steps = (
        ((region, before), added, (region, names.get(shown | {added})))
        for region in regions
        for shown, before in names.items()
        for added in modalities
        if added not in shown
    )
    rows = []
    for before, added, after in steps:
        if before not in dice or after not in dice:
            continue
        # Cases that lack the sequence in some run say nothing.
        changes = dice[after] - dice[before]
        changes = changes[:, np.isfinite(changes).all(0)]
        if not changes.size:
            continue
        low, high = two_way_bootstrap(changes, 1000)
        by_case = changes.mean(0)
        change, hurt = float(by_case.mean()), int((by_case < 0).sum())
        p = paired_t(by_case[:, None]).p
        rows.append((*before, added, change, low, high, len(by_case), hurt, p))
    table = pd.DataFrame(rows, columns=COLUMNS)
    significant = holm(table["clear"].to_numpy(dtype=np.float64)) < LEVEL
    table["clear"] = significant & (table["change"] < 0)
    return table.sort_values("change", kind="stable").reset_index(drop=True)


def _dice_of_every_run(tables: Sequence[pd.DataFrame]) -> dict[Any, npt.NDArray[np.float64]]:
    """Return Dice ``[runs, cases]`` of each (region, combination) that all runs have."""
    cases = tables[0].index
    return {
        key: np.stack([t[key].reindex(cases).to_numpy(dtype=np.float64) for t in tables])
        for key in tables[0].columns
        if all(key in t.columns for t in tables)
    }


def _by_case(run: pd.DataFrame, names: Mapping[frozenset[str], str]) -> pd.DataFrame:
    """Return Dice with cases as rows and (region, combination) as columns."""
    shown = run["combination"].map(lambda text: names[frozenset(str(text).split("+"))])
    table = run.assign(combination=shown)
    return table.pivot(index="case", columns=["region", "combination"], values="dice")


def violations(runs: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return rows of :func:`added_modalities` whose mean change is below 0."""
    changes = added_modalities(runs)
    return changes[changes["change"] < 0].reset_index(drop=True)
