"""Predictions as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from pmixseg.data.outputs import write_labels
from pmixseg.evaluation.cases import CasePrediction


class PredictionWriter(BasePredictionWriter):
    """Write every predicted case as NIfTI in its source's grid, orientation and label codes.

    Args:
        folder: where to; by default ``predictions`` in the run folder.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """One file ``<case>_seg.nii.gz`` per case."""
        assert isinstance(prediction, CasePrediction)
        folder = Path(self.folder or Path(trainer.default_root_dir) / "predictions")
        stored = batch["stored"]
        write_labels(
            folder / f"{stored.case_id}_seg.nii.gz",
            prediction.labels(),
            stored.geometry.source_affine,
            stored.codes,
            prediction.task,
        )
