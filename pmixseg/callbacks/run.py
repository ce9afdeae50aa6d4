"""What a training leaves in its run folder: one log that a resumed one continues, checkpoints."""

from __future__ import annotations

from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from pmixseg.errors import InputError, writing
from pmixseg.modules.checkpoint import write_checkpoint

FLUSH_ROWS = 20
"""Rows that may be lost when the machine fails; Lightning also saves at the end of a training."""


class RunLogger(Logger):
    """Writes ``<run>/metrics.csv``, a row per logging step, and keeps what is there.

    Lightning's ``CSVLogger`` deletes an earlier file of the same folder, so a training that is
    resumed would lose its history. Here rows before the first new step are kept, rows from that
    step on are those of the training that is resumed from a checkpoint before them.

    Args:
        run: the run folder.
    """

    def __init__(self, run: str | Path) -> None:
        super().__init__()
        self._run = Path(run)
        self._rows: list[dict[str, Any]] = []
        self._unsaved = 0
        self._history: pd.DataFrame | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self._run / "metrics.csv"

    @property
    def name(self) -> str:
        """Name of the run."""
        return self._run.name

    @property
    def version(self) -> str:
        """A run has no versions."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._run)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """Nothing: ``config.yaml`` stands beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row, or to the row of the same step (validation and training of one epoch)."""
        if not self._rows:
            self._history = self._before(step or 0)
        if self._rows and _together(self._rows[-1], {**metrics, "step": step}):
            self._rows[-1].update(metrics)
        else:
            self._rows.append({**metrics, "step": step})
        self._unsaved += 1
        if self._unsaved >= FLUSH_ROWS:
            self.save()

    def _before(self, step: int) -> pd.DataFrame | None:
        """What an earlier training logged before ``step``."""
        if not self.path.is_file() or not self.path.stat().st_size:
            return None
        try:
            table = pd.read_csv(self.path)
            return table[table["step"] < step]
        except (OSError, ValueError, KeyError, TypeError) as error:
            rank_zero_warn(f"{self.path} is no log ({error}), so it is written anew.")
            return None

    @rank_zero_only
    def save(self) -> None:
        """Write all rows, atomically.

        Raises:
            InputError: the file cannot be written.
        """
        if not self._rows:
            return
        frame = pd.DataFrame(self._rows)
        if self._history is not None:
            frame = pd.concat([self._history, frame])
        first = [c for c in ("epoch", "step") if c in frame]
        rest = sorted(str(c) for c in frame.columns if c not in first)
        frame = frame[[*first, *rest]]
        part = self.path.with_suffix(".csv.part")
        try:
            with writing(self.path):
                self._run.mkdir(parents=True, exist_ok=True)
                frame.to_csv(part, index=False)
                part.replace(self.path)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        self._unsaved = 0

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Save what is left."""
        try:
            self.save()
        except InputError as error:
            if status == "success":
                raise
            rank_zero_warn(str(error))  # the training failed before this, and that is to be told


def _together(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two sets of values belong to one row: of one step, and not of two epochs."""
    epochs = {r["epoch"] for r in (row, other) if "epoch" in r}
    return row["step"] == other["step"] and len(epochs) < 2


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then puts it there, so that it is whole or the old one.

    Lightning writes into the system's temporary folder; where that is another disk it copies the
    file to its place, and a disk that fills up leaves half of it in place of the last good one.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """See :class:`TorchCheckpointIO`.

        Raises:
            InputError: the file cannot be written.
        """
        write_checkpoint(checkpoint, path)


class RunCheckpoint(ModelCheckpoint):
    """``<run>/checkpoints/{best,last}.ckpt``: the highest ``val/dice``, and the latest epoch.

    Without validation there is no best epoch, only the last.

    Args:
        run: the run folder.
    """

    def __init__(self, run: str | Path) -> None:
        super().__init__(
            Path(run) / "checkpoints",
            filename="best",
            monitor="val/dice",
            mode="max",
            save_last=True,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See :class:`ModelCheckpoint`."""
        data = getattr(trainer, "datamodule", None)
        validated = trainer.limit_val_batches and (data is None or data.parts.val)
        if not validated:
            self.monitor, self.save_top_k = None, 0
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # none of the user's own
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
