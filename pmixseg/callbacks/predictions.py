"""Write what ``predict`` predicts as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from pmixseg.data.formats.outputs import volume_names, write_labels, write_volume
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import CasePrediction
from pmixseg.files import inside
from pmixseg.modules.recording import results_folder


class PredictionWriter(BasePredictionWriter):
    """Write every predicted case as NIfTI in its source's grid, orientation and label codes.

    Args:
        folder: where to; by default ``predictions`` in the run folder.
        probabilities: also ``<case>_probabilities.nii.gz``, ``[x, y, z, C]``, background first.
        entropy: also ``<case>_entropy.nii.gz``, the voxel-wise uncertainty in nats.
        plain: write ``<case>.nii.gz`` instead of ``<case>_seg.nii.gz``, as nnU-Net does.

    Raises:
        InputError: probabilities or entropy beside plain names, which nnU-Net's tools would take
            for label maps.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        probabilities: bool = False,
        entropy: bool = False,
        plain: bool = False,
    ) -> None:
        super().__init__(write_interval="batch")
        if plain and (probabilities or entropy):
            raise InputError(
                "PredictionWriter: nnU-Net takes every volume of a folder for a label map; leave "
                "out probabilities and entropy, or write them into another folder."
            )
        self.folder, self.plain = folder, plain
        self.probabilities, self.entropy = probabilities, entropy

    def path(self, trainer: Trainer) -> Path:
        """Return the folder that is written into."""
        return Path(self.folder or results_folder(trainer) / "predictions")

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
        """Write ``<case>_seg.nii.gz``, and what else was asked for."""
        if not isinstance(prediction, CasePrediction):
            raise InputError(
                f"PredictionWriter writes a CasePrediction, but predict_step of this "
                f"{type(pl_module).__name__} returned a {type(prediction).__name__}; let it return "
                "what super().predict_step does, or leave PredictionWriter out."
            )
        folder, stored = self.path(trainer), batch["stored"]
        inside(folder, stored.case_id, "case")
        names = volume_names(stored.case_id, self.plain)
        write_labels(
            folder / names["seg"],
            prediction.labels(),
            stored.geometry.source_affine,
            stored.codes,
            prediction.task,
            stored.geometry.unit,
        )
        affine, unit = stored.geometry.source_affine, stored.geometry.unit
        if self.probabilities:
            last = np.moveaxis(prediction.source_probabilities(), 0, -1)
            write_volume(folder / names["probabilities"], last, affine, unit)
        if self.entropy:
            write_volume(folder / names["entropy"], prediction.source_entropy(), affine, unit)
