"""Read the learning curves of a training from the ``metrics.csv`` of its run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pandas.api.types import is_numeric_dtype

from pmixseg.errors import InputError, explained

DRAWN = ("train", "val", "gap", "align", "anchor")
"""First parts of names that are drawn, in this order; others are not part of the course."""

UNIFORM = 1e-3
"""Weights of an anchor that differ from 1/M by less have not left uniform."""

GAP_DRAWN = ("ratio", "whitened", "rank_within", "decodability")
"""Measures of the gap that a report shows, in this order; each has a chart, a curve per level."""


@dataclass(frozen=True)
class Chart:
    """Curves that share a plot.

    Args:
        title: what they have in common, e.g. ``val/dice`` or ``anchor/level3``.
        curves: name -> values by epoch (or step, where the file has no epoch).
    """

    title: str
    curves: dict[str, pd.Series[float]]


def read_log(run: Path) -> pd.DataFrame:
    """Read ``metrics.csv`` of a run; a table without columns where nothing was logged."""
    path = run / "metrics.csv"
    if not path.is_file() or not path.stat().st_size:
        return pd.DataFrame()
    with explained(f"{path}: cannot be read as a table", "remove it"):
        table = pd.read_csv(path)
    drawn = ("epoch", "step", *(f"{name}/" for name in DRAWN))
    words = [c for c in table if str(c).startswith(drawn) and not is_numeric_dtype(table[c])]
    if words:
        raise InputError(f"{path}: {words} hold other things than numbers; remove the file.")
    return table


def read_curves(run: Path) -> list[Chart]:
    """Read curves of ``metrics.csv`` (Lightning's CSVLogger or this package's), grouped by name.

    ``train/loss`` and other training losses share a chart, ``val/dice`` and its regions another, as
    do names of three parts with the first two in common (``anchor/level3/t1``), and levels of one
    measure of the gap (``gap/level3/ratio``). A run without such a file has none.
    """
    table = read_log(run)
    axis = next((name for name in ("epoch", "step") if name in table), None)
    if axis is None:
        return []
    by_title: dict[str, dict[str, pd.Series[float]]] = {}
    for name in table.columns:
        parts = str(name).split("/")
        if parts[0] not in DRAWN or len(parts) < 2 or name.endswith("_step"):
            continue
        curve = table[[axis, name]].dropna()
        if curve.empty:
            continue
        # One point an epoch: of values logged within it, the mean.
        series = curve.groupby(axis)[name].mean()
        if parts[0] == "gap" and (len(parts) > 3 or parts[-1] not in GAP_DRAWN):
            continue
        title, label = _place(parts)
        by_title.setdefault(title, {})[label.removesuffix("_epoch")] = series
    order = sorted(by_title, key=lambda title: (DRAWN.index(title.split("/")[0]), title))
    return [Chart(title, by_title[title]) for title in order]


def _place(parts: list[str]) -> tuple[str, str]:
    """Return the title of the chart and the name of the curve."""
    if parts[:2] == ["val", "dice"]:
        return "val/dice", "/".join(parts[2:]) or "mean"
    if parts[0] == "gap" and len(parts) == 3:
        return f"gap/{parts[2]}", parts[1]
    if len(parts) >= 3:
        return "/".join(parts[:2]), "/".join(parts[2:])
    return parts[0], parts[1]
