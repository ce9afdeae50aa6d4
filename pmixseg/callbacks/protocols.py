"""Score a test under missingness protocols, in addition to the table of all combinations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from pmixseg.callbacks.term import own_module
from pmixseg.data.keys import make_key
from pmixseg.data.missing import MissingnessSampler
from pmixseg.describe import Described, build
from pmixseg.errors import InputError
from pmixseg.evaluation.records.records import Row, gather_rows
from pmixseg.evaluation.records.spreadsheets import quote_formulas
from pmixseg.files import whole
from pmixseg.modules.recording import results_folder
from pmixseg.modules.scoring import EQUAL
from pmixseg.task import Combination, format_combination, parse_combination, presence


class ProtocolScores(Callback, Described):
    r"""Estimate the Dice of a test if sequences went missing by a protocol.

    A protocol says how often each combination occurs, so its score is an average of what the test
    has measured: for every case and region :math:`\sum_c p(c \mid \text{acquired}) \,
    \mathrm{Dice}(c)`, then the mean over cases. Nothing is predicted again. Written to
    ``<run>/protocols.csv`` and logged as ``test/protocol/<name>`` (mean over regions).

    Args:
        protocols: name -> sampler, the same classes that training draws from.
        draws: how often a combination is drawn to find its probability.

    Raises:
        InputError: no protocol, or no draw.
    """

    def __init__(self, protocols: dict[str, MissingnessSampler], draws: int = 4096) -> None:
        if not protocols or draws < 1:
            raise InputError("ProtocolScores needs a protocol or more, and a draw or more.")
        self.protocols: dict[str, MissingnessSampler] = {
            name: build(sampler) for name, sampler in protocols.items()
        }
        self.draws = draws

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the rows of all processes."""
        module = own_module(self, pl_module)
        rows = gather_rows(module.records)
        if not rows:
            return  # the module says that no case has a label
        tables = [
            protocol_scores(rows, sampler, module.task.modalities, self.draws).assign(protocol=name)
            for name, sampler in self.protocols.items()
        ]
        for name, table in zip(self.protocols, tables, strict=True):
            pl_module.log(f"test/protocol/{name}", float(table["dice"].mean()), **EQUAL)
        _write(pd.concat(tables), results_folder(trainer) / "protocols.csv")


def protocol_scores(
    rows: Sequence[Row], sampler: MissingnessSampler, modalities: Sequence[str], draws: int
) -> pd.DataFrame:
    """Return the Dice of each region that is to be expected under a protocol, a mean over cases.

    For the draws see :class:`ProtocolScores`. Columns are ``region``, ``dice`` and ``cases``.
    """
    table = pd.DataFrame(rows)
    odds: dict[Combination, Mapping[str, float]] = {}
    parts = []
    for _, case in table.groupby("case", sort=False):
        named = {m for text in case["combination"].unique() for m in str(text).split("+")}
        acquired = parse_combination(named, modalities)
        if acquired not in odds:
            odds[acquired] = frequencies(sampler, acquired, modalities, draws)
        weights = case["combination"].map(odds[acquired]).fillna(0.0)
        parts.append(case.assign(dice=case["dice"] * weights))
    whole = pd.concat(parts)
    cases = whole.groupby(["case", "region"], sort=False)["dice"].sum().reset_index()
    means = cases.groupby("region", sort=False)["dice"].agg(["mean", "count"]).reset_index()
    return means.rename(columns={"mean": "dice", "count": "cases"})


def frequencies(
    sampler: MissingnessSampler, acquired: Combination, modalities: Sequence[str], draws: int
) -> dict[str, float]:
    """Count how often a protocol shows each combination of a case that has ``acquired``."""
    keys = torch.tensor([make_key(0, None, i) for i in range(draws)])
    flags = torch.tensor([presence(acquired, modalities)]).expand(draws, -1)
    drawn = sampler.draw(keys, flags, modalities).tolist()
    counted = Counter(
        format_combination(m for m, shown in zip(modalities, row, strict=True) if shown)
        for row in drawn
    )
    return {name: count / draws for name, count in counted.items()}


@rank_zero_only
def _write(table: pd.DataFrame, path: Path) -> None:
    columns: list[Any] = ["protocol", "region", "dice", "cases"]
    try:
        with whole(path) as part:
            quote_formulas(table[columns]).to_csv(part, index=False)
        rank_zero_info(f"Written: {path}")
    except InputError as error:  # the records, still unwritten, hold all of it
        rank_zero_warn(str(error))
