"""The result of segmenting a patient's own scans: label map, volumes, files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from pmixseg.argument_checks import checked
from pmixseg.data.formats.colours import write_tables
from pmixseg.data.formats.outputs import (
    code_table,
    nifti_image,
    volume_names,
    write_json,
    write_labels,
    write_volume,
)
from pmixseg.data.scans.plausibility import LARGEST_SHARE
from pmixseg.evaluation.prediction.cases import CasePrediction, entropy_of
from pmixseg.files import inside
from pmixseg.task import Combination, Task, format_combination
from pmixseg.version import __version__

NOTICE = "Research use only: not a medical device, not for diagnosis or treatment."
"""Said by every output."""

LARGEST_OUTSIDE = 0.25
"""Share of a segmentation outside the brain that is warned of: a border is never exact."""


@dataclass(frozen=True)
class Segmentation:
    """Hold what a model made of one set of scans, in the grid of its reference scan.

    Args:
        name: of the case.
        prediction: class probabilities and the way back to the reference's grid.
        codes: label name -> number in :attr:`labels`.
        inputs: modality -> ``{"file": name, "sha256": hash}``, as far as known.
        settings: everything the result depends on besides weights and scans; primitives.
        checkpoint: ``{"file": name, "sha256": hash}`` of the weights, if they came from a file.
        warnings: sentences about what was resampled or went on in spite of doubts.
    """

    name: str
    prediction: CasePrediction
    codes: Mapping[str, int]
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Mapping[str, str] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def task(self) -> Task:
        """Meaning of the classes."""
        return self.prediction.task

    @property
    def combination(self) -> Combination:
        """The modalities that were given."""
        return self.prediction.combination

    @property
    def affine(self) -> NDArray[np.float64]:
        """4 x 4, voxel index of the reference scan -> mm."""
        return self.prediction.geometry.affine

    @cached_property
    def classes(self) -> UInt8[np.ndarray, "x y z"]:
        """Class indices, 0 background, in the reference's axes; post-processed."""
        return self.prediction.labels()

    @property
    def labels(self) -> NDArray[np.integer[Any]]:
        """:attr:`classes` as label codes."""
        table = code_table(self.codes, self.task, f"case '{self.name}'")
        coded: NDArray[np.integer[Any]] = table[self.classes]
        return coded

    @cached_property
    def probabilities(self) -> Float[np.ndarray, "c x y z"]:
        """Calibrated softmax probabilities, background first, before post-processing."""
        return self.prediction.source_probabilities()

    @property
    def entropy(self) -> Float[np.ndarray, "x y z"]:
        r"""Voxel-wise uncertainty :math:`-\sum_c p_c \ln p_c` in nats, 0 to ln C."""
        return entropy_of(self.probabilities)

    @cached_property
    def volumes(self) -> dict[str, float]:
        """Region -> volume in ml."""
        voxel = abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000
        counts = np.bincount(self.classes.ravel(), minlength=self.task.num_classes)
        return {
            region: float(counts[list(self.task.region_classes(region))].sum()) * voxel
            for region in self.task.regions
        }

    def to_nifti(self) -> Any:
        """Return :attr:`labels` as a ``nibabel.Nifti1Image``, with the header of the files."""
        return nifti_image(self.labels, self.affine, self.prediction.geometry.unit)

    @checked
    def save(
        self,
        folder: str | Path,
        name: str | None = None,
        *,
        probabilities: bool = False,
        entropy: bool = False,
        compress: bool = True,
        plain: bool = False,
    ) -> dict[str, Path]:
        """Write ``<name>_seg.nii.gz``, what else is asked for, and ``<name>_seg.json``.

        The labels' names and colours lie beside them: ``<name>_seg.ctbl`` for 3D Slicer, and
        ``<name>_seg_itksnap.txt`` for ITK-SNAP.

        Args:
            folder: where to; made if it is not there.
            name: by default that of the case.
            probabilities: also ``<name>_probabilities.nii.gz``, ``[x, y, z, C]`` float32.
            entropy: also ``<name>_entropy.nii.gz``, float32, in nats.
            compress: ``.nii.gz``, or ``.nii``.
            plain: name the label map ``<name>.nii.gz``, as nnU-Net does.

        Returns:
            What it is -> where it is.

        Raises:
            InputError: a file cannot be written.
        """
        folder, name = Path(folder), name or self.name
        inside(folder, name, "case")
        path = {what: folder / n for what, n in volume_names(name, plain, compress).items()}
        affine, unit = self.prediction.geometry.source_affine, self.prediction.geometry.unit
        made = {"seg": write_labels(path["seg"], self.classes, affine, self.codes, self.task, unit)}
        made |= write_tables(folder / f"{name}_seg", self.codes, self.task)
        if probabilities:
            last = np.moveaxis(self.probabilities, 0, -1)
            made["probabilities"] = write_volume(path["probabilities"], last, affine, unit)
        if entropy:
            made["entropy"] = write_volume(path["entropy"], self.entropy, affine, unit)
        facts = {**self.to_dict(), "files": {k: p.name for k, p in made.items()}}
        made["json"] = write_json(folder / f"{name}_seg.json", facts)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return what the JSON file holds; primitives only."""
        return {
            "notice": NOTICE,
            "case": self.name,
            "task": self.task.to_dict(),
            "combination": format_combination(self.combination),
            "volumes_ml": {region: round(ml, 4) for region, ml in self.volumes.items()},
            "codes": dict(self.codes),
            "inputs": {m: dict(facts) for m, facts in self.inputs.items()},
            "checkpoint": None if self.checkpoint is None else dict(self.checkpoint),
            "settings": dict(self.settings),
            "warnings": list(self.warnings),
            "versions": {"pmixseg": __version__, "torch": version("torch")},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def doubts(
    made: Segmentation, inside: NDArray[np.bool_], voxel: float, where: str
) -> tuple[str, ...]:
    """Return a sentence about a segmentation that is empty, too large, or beside the brain.

    ``inside`` says which voxels of the prepared case, of ``voxel`` ml each, are brain.
    """
    brain, largest = float(inside.sum()) * voxel, max(made.volumes.values(), default=0.0)
    if largest == 0:
        shown = format_combination(made.combination)
        return (
            f"{where}: nothing was segmented from {shown}; if there is a tumour, look at the scans "
            "and their names, or give more of them.",
        )
    if largest > LARGEST_SHARE * brain:
        return (
            f"{where}: {largest:.0f} ml are segmented in a brain of {brain:.0f} ml, more than a "
            "tumour takes; look at the result, and at the scans: skull-stripped, and rightly "
            "named.",
        )
    segmented = made.prediction.on_grid().cpu().numpy() > 0
    # A published network has a crop of its own; resampling alone may leave single voxels.
    if segmented.shape != inside.shape or not segmented.any():
        return ()
    share = float((segmented & ~inside).sum() / segmented.sum())
    if share <= LARGEST_OUTSIDE:
        return ()
    return (
        f"{where}: {share:.0%} of what is segmented lies outside the brain, where no tumour is; "
        "look at the result, and at the scans: of the kind that the model was trained on.",
    )
