"""The cases of a study: a phantom or a folder of scans, prepared once, split for each training."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.store.prepare import prepare
from pmixseg.errors import InputError
from pmixseg.files import whole
from pmixseg.task import BRATS, format_combination

STORE, SPLIT = "store", "split.json"


@dataclass(frozen=True)
class Cohort:
    """What a study is trained on.

    Args:
        train: cases to train on.
        val: cases on which the gap is measured; nothing is chosen by them.
        test: cases that are scored.
        seed: of the phantom.
        spacing: voxel size in mm; of scans, ``None`` keeps each case's own.
        shape: voxels of the phantom.
        root: folder of scans, instead of a phantom.
        split: JSON file with ``train``, ``val`` and ``test`` of the scans; the numbers above then
            say how many of each are used, in the file's order.
        anonymous: write ``case01`` and so on into the records instead of the cases' names.
    """

    train: int
    val: int
    test: int
    seed: int = 0
    spacing: float | None = None
    shape: tuple[int, int, int] | None = None
    root: str | None = None
    split: str | None = None
    anonymous: bool = False

    def make(self, folder: Path, workers: int = 0) -> None:
        """Prepare store and split; what is there is kept. The split is written last.

        Raises:
            InputError: a case cannot be prepared, or there are too few.
        """
        if (folder / SPLIT).is_file():
            return
        if self.root is None:
            # Needs maps that a machine which only trains may lack.
            from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort

            root = folder / "cohort"
            shape = None if self.shape is None else (self.shape[0], self.shape[1], self.shape[2])
            settings = PhantomSettings(spacing=self.spacing or 3.0, shape=shape)
            count = self.train + self.val + self.test
            names = write_cohort(root, count, self.seed, settings, workers=workers)
            cuts = np.cumsum([self.train, self.val])
            parts = [list(part) for part in np.split(np.array(names), cuts)]
        else:
            root = Path(self.root)
            split = json.loads(Path(self.split or root / SPLIT).read_text(encoding="utf-8"))
            counts = {"train": self.train, "val": self.val, "test": self.test}
            short = [p for p, n in counts.items() if len(split[p]) < n]
            if short:
                raise InputError(f"{root}: the split has too few cases in {short}; ask for fewer.")
            parts = [split[part][:count] for part, count in counts.items()]
        used = {str(name) for part in parts for name in part}
        grid = None if self.spacing is None else (self.spacing,) * 3
        cases = [case for case in find_cases(root, BRATS) if case.case_id in used]
        # Which cases there are is the plan's choice, and was made before: no judge takes one out.
        report = prepare(
            cases, folder / STORE, BRATS, spacing=grid, workers=workers, progress=False, force=True
        )
        if report.failed or len(cases) < len(used):
            raise InputError(f"{root}: {' '.join(report.failed.values()) or 'cases are missing.'}")
        names = dict(
            zip(("train", "val", "test"), ([str(n) for n in p] for p in parts), strict=True)
        )
        _write_json(folder / SPLIT, names)

    def parts(self, folder: Path) -> dict[str, list[str]]:
        """Names of the cases of each part."""
        parts: dict[str, list[str]] = json.loads((folder / SPLIT).read_text(encoding="utf-8"))
        return parts

    def shown_names(self, folder: Path) -> dict[str, str]:
        """Name of a case -> name in the records."""
        names = [name for part in self.parts(folder).values() for name in part]
        if not self.anonymous:
            return {name: name for name in names}
        return {name: f"case{number:02d}" for number, name in enumerate(sorted(names), 1)}


@dataclass(frozen=True)
class Cases:
    """Which of a cohort's training cases one training uses.

    Args:
        count: so many, drawn by the seed; ``None``: all.
        rare: a sequence that most training cases lack for good.
        having: how many training cases have it.
        balanced: draw the cases that have it as often as all others together.
    """

    count: int | None = None
    rare: str | None = None
    having: int = 0
    balanced: bool = False

    def draw(self, names: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
        """The cases of a training, and those of them that have the rare sequence.

        Args:
            names: training cases of the cohort.
            seed: of the training.

        Raises:
            InputError: the cohort is too small.
        """
        count = len(names) if self.count is None else self.count
        if not 0 < count <= len(names) or (self.rare and not 0 < self.having <= count):
            raise InputError(
                f"{count} cases, {self.having} of them with {self.rare}, cannot be drawn from "
                f"{len(names)}; ask for fewer."
            )
        order = np.random.default_rng([seed, 0x57DD]).permutation(len(names))[:count]
        chosen = [names[i] for i in order]
        return sorted(chosen), sorted(chosen[: self.having] if self.rare else chosen)


class StudyData(BraTSDataModule):
    """Training cases drawn by the seed, a rare sequence, and the control that balances it.

    Args:
        folder: of the cohort, see :meth:`Cohort.make`.
        own: folder of the split and mask file of this training.
        cases: which cases.
        seed: of cases, patches, augmentation and missingness.
        kwargs: see :class:`~pmixseg.data.datamodule.BraTSDataModule`.
    """

    def __init__(self, folder: Path, own: Path, cases: Cases, seed: int, **kwargs: Any) -> None:
        parts = json.loads((folder / SPLIT).read_text(encoding="utf-8"))
        drawn, having = cases.draw(parts["train"], seed)
        _write_json(own / SPLIT, {**parts, "train": drawn})
        masks = own / "masks.csv" if cases.rare else None
        if masks:
            rest = format_combination([m for m in BRATS.modalities if m != cases.rare])
            with whole(masks) as part, part.open("w", newline="") as stream:
                writer = csv.writer(stream)
                writer.writerow(["case", "combination"])
                writer.writerows([name, rest] for name in drawn if name not in having)
        split = {
            "class_path": "pmixseg.data.splits.SplitJson",
            "init_args": {"path": str(own / SPLIT)},
        }
        super().__init__(folder / STORE, split=split, mask_file=masks, seed=seed, **kwargs)  # type: ignore[arg-type]  # a description builds itself
        others = len(drawn) - len(having)
        self.repeats = dict.fromkeys(having, max(round(others / len(having)), 1))
        self.balanced = cases.balanced

    @property
    def training_cases(self) -> tuple[str, ...]:
        """Cases in the order in which an epoch counts them; a balanced one repeats the rare."""
        if not self.balanced:
            return super().training_cases
        return tuple(n for n in self.parts.train for _ in range(self.repeats.get(n, 1)))


def _write_json(path: Path, content: Any) -> None:
    with whole(path) as part:
        part.write_text(json.dumps(content), encoding="utf-8")
