"""What the runner left, and how it is written in tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from study import Job

from pmixseg.task import BRATS

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


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def percent(value: float, signed: bool = False) -> str:
    """Dice in points."""
    return f"{100 * value:+.2f}" if signed else f"{100 * value:.1f}"
