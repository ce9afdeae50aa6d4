"""The parts of a report around its tables: key numbers, worst cases, remarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pmixseg.errors import count_of
from pmixseg.evaluation.comparison.monotonicity import added_modalities
from pmixseg.evaluation.records.grouped import group_by_size
from pmixseg.evaluation.records.measures import BRIER, DICE, ECE, HD95
from pmixseg.evaluation.records.records import Records, mean_over_cases
from pmixseg.evaluation.records.tables import run_name, tabulate
from pmixseg.task import format_combination

FEW_CASES = 10
"""Below this a report says that nothing can be concluded about patients."""

MOST_SHOWN = 6
"""Most modalities that are named as hurting when they are added."""


@dataclass(frozen=True)
class RegionSummary:
    """Key numbers of one run in one region; Dice in percent, HD95 in mm.

    Args:
        run: name of the run.
        region: name of the region.
        cases: number of cases.
        dice: mean over cases of the case's mean over combinations.
        spread: standard deviation over cases of the case's mean over combinations; NaN for one.
        full: mean Dice with every modality; NaN if no case has all.
        lowest: lowest mean Dice of a combination.
        lowest_at: that combination.
        hd95: mean over the cases that have one, of the case's mean over combinations.
        hd95_cases: how many these are.
        hd95_median: median over all rows that have one.
        penalised: rows in which exactly one mask is empty, so that HD95 is a convention;
            ``None`` if the records do not say.
        invented: rows with a prediction where the truth is empty; ``None`` as above.
        missed: rows without a prediction where the truth is not empty; ``None`` as above.
        absent: cases whose truth is empty; ``None`` as above.
        rows: number of records.
    """

    run: str
    region: str
    cases: int
    dice: float
    spread: float
    full: float
    lowest: float
    lowest_at: str
    hd95: float
    hd95_cases: int
    hd95_median: float
    penalised: int | None
    invented: int | None
    missed: int | None
    absent: int | None
    rows: int


def region_summaries(runs: Sequence[Records]) -> list[RegionSummary]:
    """Return key numbers, regions in task order and runs in the given one."""
    task = runs[0].task
    return [
        _summary(one, region)
        for region in task.regions
        for one in runs
        if (one.table["region"] == region).any()
    ]


def _summary(records: Records, region: str) -> RegionSummary:
    part = records.table[records.table["region"] == region]
    means = part.groupby("combination")["dice"].mean() * 100
    by_case = part.groupby("case")["dice"].mean() * 100
    everything = format_combination(records.task.modalities)
    # Older records do not say whether a mask was empty.
    has_empty = "empty" in part
    empty = part["empty"].astype(str) if has_empty else pd.Series("none", index=part.index)
    truth_empty, prediction_empty = (
        empty.isin([which, "both"]) for which in ("truth", "prediction")
    )
    hd95 = part["hd95"].astype(float)
    return RegionSummary(
        run=run_name(records),
        region=region,
        cases=part["case"].nunique(),
        dice=100 * mean_over_cases(part),
        spread=float(by_case.std()) if len(by_case) > 1 else float("nan"),
        full=float(means.get(everything, np.nan)),
        lowest=float(means.min()),
        lowest_at=str(means.idxmin()) if means.notna().any() else "",
        hd95=mean_over_cases(part, "hd95"),
        hd95_cases=part[hd95.notna()]["case"].nunique(),
        hd95_median=float(hd95.median()),
        penalised=int((truth_empty ^ prediction_empty).sum()) if has_empty else None,
        invented=int((truth_empty & ~prediction_empty).sum()) if has_empty else None,
        missed=int((prediction_empty & ~truth_empty).sum()) if has_empty else None,
        absent=part[truth_empty]["case"].nunique() if has_empty else None,
        rows=len(part),
    )


@dataclass(frozen=True)
class WorstCase:
    """A case on which a run does badly; Dice in percent.

    Args:
        run: name of the run.
        case: case id.
        dice: mean over regions and combinations.
        region: region of its lowest mean over combinations.
        region_dice: that mean.
        combination: combination of the lowest Dice in that region.
        combination_dice: that Dice.
    """

    run: str
    case: str
    dice: float
    region: str
    region_dice: float
    combination: str
    combination_dice: float


def worst_cases(records: Records, count: int = 5) -> list[WorstCase]:
    """Return cases with the lowest mean Dice, the worst first; without those that have none."""
    table = records.table.dropna(subset="dice")
    worst = []
    for case, mean in table.groupby("case")["dice"].mean().nsmallest(count).items():
        rows = table[table["case"] == case]
        regions = rows.groupby("region")["dice"].mean()
        region = str(regions.idxmin())
        low = rows[rows["region"] == region].set_index("combination")["dice"]
        worst.append(
            WorstCase(
                run_name(records),
                str(case),
                100 * float(mean),
                region,
                100 * float(regions.min()),
                str(low.idxmin()),
                100 * float(low.min()),
            )
        )
    return worst


@dataclass(frozen=True)
class CalibrationSummary:
    """Calibration of one run in one region, times 100.

    Args:
        run: name of the run.
        region: name of the region.
        ece: mean expected calibration error over cases and the combinations of each size, sizes
            ascending; last the mean over all combinations.
        brier: Brier score, likewise.
    """

    run: str
    region: str
    ece: tuple[float, ...]
    brier: tuple[float, ...]


def calibration_summaries(runs: Sequence[Records]) -> list[CalibrationSummary]:
    """Return the calibration by region and run; empty unless all runs measured it."""
    if not all({"ece", "brier"} <= set(one.table) for one in runs):
        return []
    ece, brier = (group_by_size(tabulate(runs, measure)).lines for measure in (ECE, BRIER))
    return [
        CalibrationSummary(a.run, a.region, (*a.values, a.mean), (*b.values, b.mean))
        for a, b in zip(ece, brier, strict=True)
    ]


@dataclass(frozen=True)
class Additions:
    """What adding one more modality does to the mean Dice of one run.

    Args:
        run: name of the run.
        pairs: (region, combination, added modality) that were looked at.
        hurt: how many of them lowered the mean.
        clear: how many of those by a test, see there.
        worst: rows of :func:`~pmixseg.evaluation.comparison.monotonicity.added_modalities` that
            lowered it, the worst first.
    """

    run: str
    pairs: int
    hurt: int
    clear: int
    worst: list[dict[str, Any]]


def additions(records: Records) -> Additions:
    """Say where a run segments worse when it is shown more."""
    table = added_modalities([records.table])
    hurt = table[table["change"] < 0]
    worst = hurt.head(MOST_SHOWN).to_dict("records")
    clear = int(hurt["clear"].sum())
    return Additions(
        run_name(records),
        len(table),
        len(hurt),
        clear,
        [{str(k): v for k, v in row.items()} for row in worst],
    )


def remarks(runs: Sequence[Records]) -> list[str]:
    """Say what a reader must know before comparing anything on the page, one sentence each."""
    regions = [text for name in runs[0].task.regions for text in _about_region(runs[0], name)]
    cases = [*_about_cases(runs), *_about_values(runs)]
    return [*cases, *_about_settings(runs), *regions, *_about_origin(runs)]


def _about_cases(runs: Sequence[Records]) -> list[str]:
    """Say how many cases there are, and whether all runs have them and all sequences of them."""
    cautions = [f"{run_name(one)}: {one.scored}." for one in runs if one.scored]
    sets = [frozenset(one.table["case"]) for one in runs]
    count = min(len(s) for s in sets)
    if count < FEW_CASES:
        cautions.append(f"{count_of(count, 'case')}: too few to conclude anything about patients.")
    if len(set(sets)) > 1:
        cautions.append(
            "The runs were scored on different cases. Best values are marked, and ranks given, "
            "only for combinations in which all runs share the same cases."
        )
    lacking = [run_name(one) for one in runs if _has_gaps(one)]
    if lacking:
        cautions.append(
            f"Not every case has every sequence ({', '.join(lacking)}): combinations with a "
            "missing sequence are averaged over fewer cases."
        )
    return cautions


def measured(runs: Sequence[Records], column: str) -> bool:
    """Say whether every run has values of a measure."""
    return all(column in one.table and one.table[column].notna().any() for one in runs)


def _about_values(runs: Sequence[Records]) -> list[str]:
    """Name the rows in which a measure of the page has no value, for no mean shows them."""
    cautions: list[str] = []
    for measure in (DICE, HD95, ECE, BRIER):
        without = [run_name(one) for one in runs if not measured([one], measure.name)]
        if 0 < len(without) < len(runs):
            cautions.append(
                f"{measure.title} has no value in {', '.join(without)}, so it is not shown here."
            )
        if without:
            continue
        for table in (one.table for one in runs):
            lacking = table[table[measure.name].isna()]
            of = count_of(table["case"].nunique(), "case")
            if len(lacking):
                cautions.append(
                    f"{measure.title} is missing from {len(lacking)} of {len(table)} rows of "
                    f"{table['run'].iloc[0]} ({lacking['case'].nunique()} of {of} lack it), which "
                    "its means leave out, however bad the prediction. Runs are ranked by it, and "
                    "the best marked, only where all have values of the same cases."
                )
    return cautions


def _about_settings(runs: Sequence[Records]) -> list[str]:
    """Say in what the runs differ besides their method."""
    cautions: list[str] = []
    if len(runs) > 1:
        cautions.append(
            "Differences between single trainings mix the method with the luck of its seed: for a "
            "statement about methods use several seeds per method and `pmixseg compare`."
        )
    for name in ("conventions", "postprocess"):
        values = [one.sidecar.to_dict()[name] for one in runs]
        if any(value != values[0] for value in values):
            cautions.append(
                f"The runs differ in their {_spell(name, values)}: do not compare them."
            )
    heated = [temperatures(one) for one in runs]
    if any(t != heated[0] for t in heated):
        cautions.append(
            "The runs differ in the temperatures of their probabilities, which ECE and Brier score "
            "depend on and nothing else does."
        )
    return cautions


def _about_origin(runs: Sequence[Records]) -> list[str]:
    """Say whether the tables are as they were written, and by which code."""
    cautions: list[str] = []
    for one in runs:
        if one.altered:
            cautions.append(f"The table of {run_name(one)} was changed after it was written.")
        if "source" in one.sidecar.conventions:
            cautions.append(f"{run_name(one)} does not state its conventions.")
    dirty = [run_name(r) for r in runs if r.sidecar.git and r.sidecar.git.get("dirty")]
    if dirty:
        cautions.append(f"Made from a checkout with uncommitted changes: {', '.join(dirty)}.")
    return cautions


def temperatures(records: Records) -> object:
    """Return the temperatures that a run's probabilities were scored at; ``None``: all 1."""
    return (records.sidecar.config.get("evaluation") or {}).get("temperatures")


def _spell(name: str, values: Sequence[object]) -> str:
    if name == "postprocess":
        return "post-processing"
    tables = [dict(v) for v in values if isinstance(v, dict)]
    keys = sorted({k for t in tables for k in t if any(o.get(k) != t[k] for o in tables)})
    return f"conventions ({', '.join(keys)})"


def _about_region(records: Records, region: str) -> list[str]:
    summary = _summary(records, region)
    if not summary.absent:
        return []
    shown = records.task.show(region)
    return [
        f"{shown} is absent from the truth of {summary.absent} of "
        f"{count_of(summary.cases, 'case')}: there its "
        "Dice is 1 if nothing is predicted and 0 otherwise, and its HD95 a convention."
    ]


def _has_gaps(records: Records) -> bool:
    per_case = records.table.groupby("case")["combination"].nunique()
    return bool(per_case.min() < len(records.task.combinations()))
