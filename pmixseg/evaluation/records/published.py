"""Published Dice with their sources, as reference rows where task and data agree.

``published_dice.csv`` holds 1,488 values (table source, dataset, method, region, combination, Dice
in percent), read off the tables named in :data:`SOURCES`. A run is set beside them only where its
whole split is a published one and it was scored on exactly that split's test cases; never beside
phantom scores, and never in a ranking.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import pandas as pd

from pmixseg.data.parts import PUBLISHED, hash_cases
from pmixseg.evaluation.records.records import Records
from pmixseg.task import BRATS, Task, format_combination, parse_combination

NAMES = {"FLAIR": "flair", "T1c": "t1ce", "T1": "t1", "T2": "t2"}


@dataclass(frozen=True)
class Source:
    """Where rows come from and what they stand for.

    Args:
        where: the table.
        protocol: cases and rules behind the numbers.
        splits: names of published splits whose test cases are among them.
    """

    where: str
    protocol: str
    splits: tuple[str, ...] = ()


BRATS2018_SPLITS = tuple(name for name in PUBLISHED.values() if name.startswith("BraTS 2018"))

SOURCES = {
    ("DeMoSeg", "BraTS2018"): Source(
        "result table in the repository kk42yy/DeMoSeg (commit 73cd4bb)",
        "mean over splits 1 to 3, not this split alone; every method with its own recipe: DeMoSeg "
        "with nnU-Net's and the ET < 500 voxels rule, RFNet's row as RFNet published it",
        BRATS2018_SPLITS,
    ),
    ("DeMoSeg", "BraTS2020"): Source(
        "result table in the repository kk42yy/DeMoSeg (commit 73cd4bb)", "219/50/100 cases"
    ),
    ("DeMoSeg", "BraTS2015"): Source(
        "result table in the repository kk42yy/DeMoSeg (commit 73cd4bb)", "242/12/20 cases"
    ),
    ("SMU-Net", "BraTS2018"): Source(
        "result table in the repository rezazad68/smunet (commit 251f3ad)",
        "its own split, high-grade cases only, one model per combination",
    ),
    ("M3AE-supp", "BraTS2020"): Source(
        "table S3 of supplementary.pdf in the repository ccarliu/m3ae (commit fdb2800)",
        "219/50/100 cases",
    ),
    ("MST-KDNet", "BraTS2024"): Source(
        "result table in the repository Quanato607/MST-KDNet (commit 2c77373)", "its own split"
    ),
}
"""(table source, dataset) of every row in the file."""


@dataclass(frozen=True)
class Reference:
    """One method's published row in one region.

    Args:
        method: its name.
        region: WT, TC or ET.
        values: Dice in percent per combination, in the task's order.
        mean: mean of ``values``.
        stated: mean that the table itself prints; some differ from the mean of their own row.
        source: where it comes from.
    """

    method: str
    region: str
    values: tuple[float, ...]
    mean: float
    stated: float
    source: Source


@cache
def published_dice() -> pd.DataFrame:
    """Return the file as a table."""
    path = files("pmixseg.evaluation.records").joinpath("published_dice.csv")
    with path.open(encoding="utf-8") as stream:
        return pd.read_csv(stream)


def recognised_split(records: Records) -> str | None:
    """Name of the published split that the run trained and was scored on, if it is one."""
    named = records.sidecar.split
    scored = hash_cases(str(c) for c in records.table["case"].unique())
    tests = {name: hashes[2] for hashes, name in PUBLISHED.items()}
    return named if named is not None and tests.get(named) == scored else None


def references(records: Records) -> list[Reference]:
    """Return published rows that may stand beside the run: none, unless its split is recognised.

    Regions come in the task's order, methods in the file's.
    """
    split = recognised_split(records)
    if split is None or records.sidecar.phantom or records.task.to_dict() != BRATS.to_dict():
        return []
    table = published_dice()
    published = []
    for (name, dataset), source in SOURCES.items():
        if split not in source.splits:
            continue
        rows = table[(table["table_source"] == name) & (table["dataset"] == dataset)]
        for region in records.task.regions:
            part = rows[rows["region"] == region]
            for method in part["method"].unique():
                one = part[part["method"] == method].set_index("combination")["dice_percent"]
                published.append(_reference(str(method), region, one, source, records.task))
    return published


def _reference(
    method: str, region: str, row: pd.Series[float], source: Source, task: Task
) -> Reference:
    by_name = {
        format_combination(
            task.modalities
            if name == "all"
            else parse_combination([NAMES[n] for n in str(name).split("+")], task.modalities)
        ): float(value)
        for name, value in row.items()
        if name != "mean15_stated"
    }
    values = tuple(by_name[format_combination(c)] for c in task.combinations())
    mean = sum(values) / len(values)
    return Reference(method, region, values, mean, float(row["mean15_stated"]), source)
