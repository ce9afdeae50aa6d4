"""Compare the gap before and after a training, from the ``metrics.csv`` of its run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pmixseg.evaluation.records.curves import GAP_DRAWN, read_log

_COLUMN = re.compile(r"gap/level(\d+)/(\w+)")


@dataclass(frozen=True)
class GapChange:
    """What training did to the latents of one level.

    Args:
        level: 0 is the finest.
        before: measure -> value before the first step.
        after: measure -> value of the weights that were kept; empty where only those of other
            epochs were measured.
        collapsed: the rank within a modality, or the decodability, fell too far below that of the
            reference; ``None`` where ``after`` is empty.
    """

    level: int
    before: dict[str, float]
    after: dict[str, float]
    collapsed: bool | None


def read_gap_changes(run: Path, best: bool = False) -> list[GapChange]:
    """Return what ``GapMonitor`` logged in a run, first and last, by level.

    With ``best``, after means the epoch with the highest ``val/dice`` (whose weights ``best.ckpt``
    holds), not the last.
    """
    table = read_log(run)
    names = [str(c) for c in table.columns]
    logged = {m.groups() for n in names if (m := _COLUMN.fullmatch(n))}
    changes = []
    # Per level its first measurement, and that of the weights which were kept.
    for level in sorted({int(level) for level, _ in logged}):
        here = {what: f"gap/level{level}/{what}" for number, what in logged if int(number) == level}
        rows = table.dropna(subset=list(here.values()), how="all")
        if rows.empty:
            continue
        shown = [m for m in GAP_DRAWN if m in here]
        kept = _of_best(table, rows) if best else rows.iloc[-1]
        changes.append(
            GapChange(
                level,
                {m: float(rows.iloc[0][here[m]]) for m in shown},
                {} if kept is None else {m: float(kept[here[m]]) for m in shown},
                None if kept is None else "collapsed" in here and bool(kept[here["collapsed"]] > 0),
            )
        )
    return changes


def _of_best(table: pd.DataFrame, rows: pd.DataFrame) -> pd.Series | None:
    """Return the measurement of the weights with the best ``val/dice``; without it, the last.

    ``rows`` are those of the log that hold a gap, which need not be those of every validation.
    """
    if "val/dice" not in table or not table["val/dice"].notna().any():
        return rows.iloc[-1]
    place = table["val/dice"].idxmax()
    if place in rows.index:
        return rows.loc[place]
    if not {"epoch", "step"} <= set(table):
        return None
    # What is measured at the end of training is a row of its own, one step on from the validation.
    row = table.loc[place]
    same = rows[(rows["epoch"] == row["epoch"]) & (rows["step"] == row["step"] + 1)]
    return same.iloc[-1] if len(same) else None
