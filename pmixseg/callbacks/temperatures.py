"""Fit temperatures of probabilities on validation cases, and write them into a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table

from pmixseg.callbacks.term import own_module
from pmixseg.data.patches import CaseItem
from pmixseg.errors import InputError
from pmixseg.evaluation.scores.calibration import TEMPERATURE_RANGE, TemperatureFit, Temperatures
from pmixseg.files import not_among
from pmixseg.modules.checkpoint import write_temperatures
from pmixseg.task import Task


class TemperatureFitting(Callback):
    """Fit one temperature per number of shown sequences while a model is validated.

    Every validation case is predicted from every combination that it has, and
    ``softmax(log p / T)`` is fitted by cross-entropy over the voxels in which any of its sequences
    has signal (Guo et al. 2017, arXiv 1706.04599, one T per number of sequences). The fitted
    checkpoint equals the validated one but for ``evaluation.temperatures``, which test, predict and
    segment apply; no label changes.

    Example: ``pmixseg validate --ckpt_path best.ckpt --data.store store --calibrate fitted.ckpt``.

    Args:
        out: checkpoint to write.
        voxels_per_case: voxels of one prediction that enter the fit.
    """

    def __init__(self, out: str | Path, voxels_per_case: int = 20_000) -> None:
        self.out = Path(out)
        self.voxels_per_case = voxels_per_case
        self.fit = TemperatureFit(voxels_per_case)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew, without cases of an earlier validation; refuse what cannot be fitted.

        Raises:
            InputError: several processes, a model that no checkpoint holds, or its own file as
                the output.
        """
        if trainer.world_size > 1:
            raise InputError(
                f"temperatures are fitted in one process, not in {trainer.world_size}; give "
                "devices 1 (--trainer.devices)."
            )
        not_among(self.out, [Path(self._source(trainer, pl_module))])
        self.fit = TemperatureFit(self.voxels_per_case)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add one case, seen through each of its combinations."""
        module, item = own_module(self, pl_module), cast(CaseItem, batch)
        brain = (item["image"] != 0).any(0)
        whole = item["stored"].geometry.box()
        for prediction in module.predict_item(item, module.test_combinations(item)):
            cut = prediction.box.relative_to(whole).slices
            p = prediction.probabilities
            logits = p.clamp_min(torch.finfo(p.dtype).tiny).log()
            label, where = item["label"][cut], brain[cut]
            self.fit.add(logits, label, len(prediction.combination), where)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint and say what was found.

        Raises:
            InputError: no validation case, or the file cannot be written.
        """
        temperatures = self.fit.temperatures()
        write_temperatures(self._source(trainer, pl_module), temperatures, self.out)
        task = own_module(self, pl_module).task
        console = Console(highlight=False, markup=False, soft_wrap=True)
        console.print(self._table(temperatures, task))
        for warning in self.cautions(temperatures, task):
            console.print(f"warning: {warning}")
        console.print(f"Written: {self.out}")

    def _source(self, trainer: Trainer, pl_module: LightningModule) -> str | Path:
        source = trainer.ckpt_path or own_module(self, pl_module).loaded_from
        if source is None:
            raise InputError("temperatures belong to a checkpoint; name it with --ckpt_path.")
        return source

    def cautions(self, temperatures: Temperatures, task: Task) -> Iterator[str]:
        """Say where a temperature is no optimum, or spoils the calibration error."""
        least, most = TEMPERATURE_RANGE
        ends = [
            str(n)
            for n, t in temperatures.by_size.items()
            if math.isclose(t, least, rel_tol=1e-3) or math.isclose(t, most, rel_tol=1e-3)
        ]
        if ends:
            yield (
                f"with {', '.join(ends)} shown the temperature is at an end of its range "
                f"({least:g} to {most:g}), so it is no optimum: the model is not trained, or the "
                "validation cases are too few."
            )
        worse = [
            str(n)
            for n, t in temperatures.by_size.items()
            if self.fit.ece(n, t, task) > self.fit.ece(n, 1.0, task)
        ]
        if worse:
            yield (
                f"with {', '.join(worse)} shown the calibration error (ECE) rises although "
                "cross-entropy falls: one temperature for all voxels softens sure background too. "
                "Compare the records of both checkpoints before using this one."
            )

    def _table(self, temperatures: Temperatures, task: Task) -> Table:
        table = Table(
            title="temperatures, fitted on validation cases", title_justify="left", box=HORIZONTALS
        )
        names = ("shown", "temperature", "cross-entropy before", "after", "ECE % before", "after")
        for name in names:
            table.add_column(name, justify="right")
        for size, temperature in temperatures.by_size.items():
            both = (1.0, temperature)
            losses = (f"{self.fit.cross_entropy(size, t):.4f}" for t in both)
            errors = (f"{100 * self.fit.ece(size, t, task):.2f}" for t in both)
            table.add_row(str(size), f"{temperature:.3f}", *losses, *errors)
        return table
