"""Write the results of one segmented case, and report on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmixseg.argument_checks import check_fields
from pmixseg.data.formats.nifti import Source
from pmixseg.data.formats.outputs import keep_foreign, volume_names
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.segmentation import Segmentation
from pmixseg.files import inside, not_among, not_beside, whole
from pmixseg.inference.overview import overview, scans_on_grid
from pmixseg.task import Task


@dataclass(frozen=True)
class Outputs:
    """Where results go, and which.

    Args:
        folder: made if it is not there.
        probabilities: also write class probabilities.
        entropy: also write the voxel-wise entropy.
        compress: ``.nii.gz``, or ``.nii``.
        png: also draw ``<name>_seg.png``, an overview.
        plain: name label maps ``<name>.nii.gz``, as nnU-Net does, whose tools take every such file
            of a folder for one.

    Raises:
        InputError: probabilities or entropy beside plain names, or a value of another kind.
    """

    folder: Path
    probabilities: bool = False
    entropy: bool = False
    compress: bool = True
    png: bool = False
    plain: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.plain and (self.probabilities or self.entropy):
            raise InputError(
                "nnU-Net takes every volume of a folder for a label map; leave out probabilities "
                "and entropy, or write them by another call into another folder."
            )

    def write(self, result: Segmentation, images: Mapping[str, Source]) -> dict[str, Path]:
        """Write one result; see :meth:`pmixseg.Segmentation.save`."""
        files = result.save(
            self.folder,
            probabilities=self.probabilities,
            entropy=self.entropy,
            compress=self.compress,
            plain=self.plain,
        )
        if self.png:
            facts = (result.name, result.task, result.volumes)
            files["png"] = self.draw(images, result.classes, result.affine, *facts)
        return files

    def draw(
        self,
        images: Mapping[str, Source],
        classes: NDArray[np.uint8],
        affine: NDArray[np.float64],
        name: str,
        task: Task,
        volumes: Mapping[str, float],
    ) -> Path:
        """Write ``<name>_seg.png``; see :func:`~pmixseg.inference.overview.overview`."""
        scans = scans_on_grid(images, classes.shape, affine, f"case '{name}'")
        figure = overview(scans, classes, affine, task, name=name, volumes=volumes)
        path = inside(self.folder, f"{name}_seg.png", "case")
        with whole(path) as part:
            figure.savefig(part, format="png", dpi=110, facecolor=figure.get_facecolor())
        return path

    def of_others(self, result: Segmentation) -> list[str]:
        """Return sentences on what a result, to be written, replaces of other scans or leaves."""
        name = result.name
        path = inside(self.folder, f"{name}_seg.json", "case")
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            before = {facts["sha256"]: str(facts["file"]) for facts in there["inputs"].values()}
            files = {Path(str(file)).name for file in there.get("files", {}).values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []  # no result, or none of this package
        names, drawn = volume_names(name, self.plain, self.compress), f"{name}_seg.png"
        written = {file for what, file in names.items() if what == "seg" or getattr(self, what)}
        written |= {drawn} if self.png else set()
        left = {f for f in files if f.endswith((".nii", ".nii.gz"))} | {drawn}
        left = {file for file in left - written if (self.folder / file).is_file()}
        phrases = []
        if left:
            phrases.append(
                f"case '{name}': {', '.join(sorted(left))} in {self.folder} stay there of the "
                "result that this one replaces, and do not belong to it; remove them."
            )
        if before and not before.keys() & {f.get("sha256") for f in result.inputs.values()}:
            phrases.append(
                f"case '{name}': this replaces the result of other scans "
                f"({', '.join(before.values())}) in {self.folder}; write each patient into a "
                "folder of its own, or name the scans and the case (--name)."
            )
        return phrases

    def check(self, name: str, files: Sequence[Path], *, of_cohort: bool = True) -> None:
        """Refuse results that would replace a scan or label map, or be taken for a case's label.

        A name that leads out of the folder is refused, too. ``of_cohort``: the scans lie as a
        layout has them, which may have a label beside them.
        """
        inside(self.folder, name, "case")
        if of_cohort:
            not_beside(self.folder, files)
        for what, file in volume_names(name, self.plain, self.compress).items():
            not_among(self.folder / file, files)
            if getattr(self, what, True):  # of the others, those that are asked for
                keep_foreign(self.folder / file)


@dataclass(frozen=True)
class CaseResult:
    """What became of one case of a cohort.

    Args:
        name: of the case.
        combination: the modalities that were used.
        volumes: region -> ml; empty where it failed.
        files: what was written.
        warnings: sentences.
        problem: the sentence that says why it failed.
        codes: label -> number in the file.
    """

    name: str
    combination: tuple[str, ...] = ()
    volumes: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    problem: str | None = None
    codes: Mapping[str, int] = field(default_factory=dict)
