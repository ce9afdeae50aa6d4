"""Log and checkpoint a training in its run folder; a resumed training continues both."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal, TypeAlias
from weakref import proxy

import pandas as pd
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.nn import Module

from pmixseg.argument_checks import checked
from pmixseg.errors import InputError
from pmixseg.files import lock_folder, whole
from pmixseg.modules.checkpoint import write_checkpoint
from pmixseg.modules.training.optimization import validates

Kept: TypeAlias = Literal["none", "before", "all"]
"""Rows of an earlier file that stay: none, those before the first new step, or all."""

FLUSH_ROWS = 20
"""Rows that may be lost when the machine fails; Lightning also saves at the end of a training."""


class RunLogger(Logger):
    """Write the metrics of a training to the run's ``metrics.csv``, a row per logging step.

    Lightning's ``CSVLogger`` deletes an earlier file of the same folder, so a training that is
    resumed would lose its history. Here rows before the first new step are kept, rows from that
    step on are those of the training that is resumed from a checkpoint before them. A training
    that resumes nothing starts the file anew; validating or testing keeps all of it.
    """

    name = version = ""  # a checkpoint without a folder goes to <save_dir>/<name>/<version>

    def __init__(self, run: str | Path) -> None:
        super().__init__()
        self._run = Path(run)
        self._rows: list[dict[str, Any]] = []
        self._unsaved = 0
        self._history: pd.DataFrame | None = None
        self._kept: Kept = "before"

    @property
    def path(self) -> Path:
        """Return the path of ``metrics.csv``."""
        return self._run / "metrics.csv"

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._run)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """Do nothing: ``config.yaml`` in the same folder has the hyper-parameters."""

    @rank_zero_only
    def log_graph(self, model: Module, input_array: Tensor | None = None) -> None:
        """Choose which earlier rows stay; no graph. Lightning calls this before any metric."""
        if not isinstance(model, LightningModule):
            return
        trainer = model.trainer
        if trainer.state.fn != TrainerFn.FITTING:
            self._kept = "all"
            return
        resumes = trainer.ckpt_path is not None or trainer.global_step > 0
        self._kept = "before" if resumes else "none"
        # What this object has logged is in the file, and treated like the rest of it.
        if self._unsaved:
            self.save()
        self._rows, self._unsaved, self._history = [], 0, None

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
        """Return the rows that the file keeps: before ``step``, of a training that is resumed."""
        if self._kept == "none" or not self.path.is_file() or not self.path.stat().st_size:
            return None
        try:
            table = pd.read_csv(self.path)
            return table if self._kept == "all" else table[table["step"] < step]
        except (OSError, ValueError, KeyError, TypeError) as error:
            rank_zero_warn(f"{self.path} is no log ({error}), so it is written anew.")
            return None

    @rank_zero_only
    def save(self) -> None:
        """Write all rows, atomically."""
        if not self._rows:
            return
        frame = pd.DataFrame(self._rows)
        if self._history is not None:
            frame = pd.concat([self._history, frame])
        first = [c for c in ("epoch", "step") if c in frame]
        rest = sorted(str(c) for c in frame.columns if c not in first)
        frame = frame[[*first, *rest]]
        with whole(self.path) as part:
            frame.to_csv(part, index=False)
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
    """Say whether two sets of values belong to one row: of one step, and not of two epochs."""
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
        """Write a checkpoint whole, or leave the last good one."""
        write_checkpoint(checkpoint, path)


class RunCheckpoint(ModelCheckpoint):
    """Keep two checkpoints of a run: the best ``val/dice``, and the latest epoch.

    ``last`` is written after every training epoch, after its validation if it has one, and when
    ``max_steps`` ends a training within an epoch; Lightning's ``save_last`` writes it only where
    ``best`` improves, so what came later would be lost. A validation within an epoch
    (``val_check_interval``) can write ``best`` there. Without validation there is no best epoch,
    only the last.
    """

    @checked
    def __init__(self, run: str | Path) -> None:
        super().__init__(
            Path(run) / "checkpoints",
            filename="best",
            monitor="val/dice",
            mode="max",
            save_last=True,
            enable_version_counter=False,
        )
        self.run = Path(run)
        self._folder = self.run / "checkpoints"
        self._lock: int | None = None
        self._validated = False
        self._last_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the latest checkpoint alone where nothing is validated; write each one whole.

        Raises:
            InputError: another training writes into the run folder.
        """
        writes = stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]  # set in Trainer.__init__
        if writes and self._lock is None:
            # Not the run folder: a test of its best checkpoint may write records there meanwhile.
            self._lock = lock_folder(self._folder)
        if not validates(trainer):
            self.monitor, self.save_top_k = None, 0
        self._validated, self._last_step = False, -1
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # none of the user's own
            trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the run folder for other processes."""
        super().teardown(trainer, pl_module, stage)
        self._release()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Release the run folder for other processes."""
        super().on_exception(trainer, pl_module, exception)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with the best, or leave that to the end of the epoch if this is its end.

        A checkpoint from there is one of a whole epoch, which resuming does not validate again.

        Raises:
            InputError: the validation logged no ``val/dice``.
        """
        if not _saves(trainer):
            return
        if trainer.is_last_batch:
            self._validated = True
        else:
            self._write_best(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last, and the best if it is that; they are then one file with two names."""
        if not _saves(trainer):
            return
        # Both are the same to the byte, so the best has to know the other's path already.
        self.last_model_path = self._path_of_last()
        best = self._validated and self._write_best(trainer)
        self._validated = False
        if not (best and self._linked(trainer)):
            self._write_last(trainer)
        self._last_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last if steps followed the last end of an epoch."""
        if _saves(trainer) and self._last_step != trainer.global_step:
            self._write_last(trainer)

    def _write_best(self, trainer: Trainer) -> bool:
        """Write the best if this is it, and say whether it is."""
        if self.monitor is None:
            return False
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            raise InputError(
                f"the validation of this {type(trainer.lightning_module).__name__} logs no "
                f"{self.monitor}, by which the best epoch is known; log it, or leave "
                "RunCheckpoint out."
            )
        if not self.check_monitor_top_k(trainer, score):
            return False
        # A tensor of its own, for the metric goes on; any number is better than none.
        score = torch.where(score.isnan(), -torch.inf, score.detach())
        path = self.format_checkpoint_name({}, self.filename)
        self.best_model_path = self.kth_best_model_path = path
        self.best_model_score = self.kth_value = self.current_score = score
        self.best_k_models = {path: score}
        self._write(trainer, path)
        return True

    def _write_last(self, trainer: Trainer) -> None:
        # Its path is part of the state that is written.
        self.last_model_path = self._path_of_last()
        self._write(trainer, self.last_model_path)

    def _path_of_last(self) -> str:
        return self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)

    def _write(self, trainer: Trainer, path: str) -> None:
        trainer.save_checkpoint(path, weights_only=self.save_weights_only)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _linked(self, trainer: Trainer) -> bool:
        """Link the best, just written, to the name of the last too; all processes agree on it."""
        if not isinstance(trainer.strategy.checkpoint_io, WholeCheckpointIO):
            return False
        # Such a file is never written into, only replaced, so the other name keeps its content.
        names = Path(self.best_model_path), Path(self.last_model_path)
        return bool(trainer.strategy.broadcast(trainer.is_global_zero and _link(*names)))


def _saves(trainer: Trainer) -> bool:
    """Say whether what happens is a training whose state is kept."""
    fits = trainer.state.fn == TrainerFn.FITTING
    return fits and not trainer.sanity_checking and not getattr(trainer, "fast_dev_run", False)


def _link(source: Path, target: Path) -> bool:
    """Put a hard link in place; not every disk has them."""
    try:
        with whole(target) as part:
            part.unlink()
            part.hardlink_to(source)
    except InputError:
        return False
    return True
