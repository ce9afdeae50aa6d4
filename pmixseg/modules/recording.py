"""Write the results of a test: records, sidecar, examples for pictures, a table."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from pmixseg.data.patches import CaseItem
from pmixseg.errors import InputError, count_of, writing
from pmixseg.evaluation.prediction.cases import CasePrediction, EvaluationSettings
from pmixseg.evaluation.records.examples import Example, examples_of
from pmixseg.evaluation.records.grouped import result_table
from pmixseg.evaluation.records.records import Records, mean_over_cases
from pmixseg.evaluation.records.sidecar import Sidecar
from pmixseg.modules.preparation import Preparation, are_synthetic
from pmixseg.task import Combination, Task


def results_folder(trainer: Trainer) -> Path:
    """Return the trainer's folder; that of a :class:`RunCheckpoint` where none was given."""
    given = Path(trainer.default_root_dir)
    runs = [Path(c.run) for c in trainer.checkpoint_callbacks if hasattr(c, "run")]
    return runs[0] if runs and given == Path.cwd() else given


@dataclass(frozen=True)
class Recording:
    """The files that a test leaves in a run folder."""

    folder: Path
    task: Task
    settings: EvaluationSettings

    @property
    def path(self) -> Path:
        """The table of records."""
        return self.folder / self.settings.records

    @rank_zero_only
    def check_place(self) -> None:
        """Refuse, before a long test and not after it, a folder that takes no records."""
        with writing(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass

    @rank_zero_only
    def forget_examples(self) -> None:
        """Remove the pictures of an earlier test of this run."""
        for path in examples_of(self.folder).values():
            path.unlink(missing_ok=True)

    def keep_example(
        self, predictions: Iterable[CasePrediction], item: CaseItem
    ) -> Iterator[CasePrediction]:
        """Pass predictions on, and write a small copy of the case when all have passed.

        Warns if it cannot be written: a picture is not worth the results of a long test.
        """
        shown: dict[Combination, np.ndarray] = {}
        for prediction in predictions:
            shown[prediction.combination] = prediction.on_grid().cpu().numpy().astype(np.uint8)
            yield prediction
        label = item.get("label")
        stored = item["stored"]
        example = Example.from_volumes(
            item["case_id"],
            self.task.modalities,
            item["image"].float().cpu().numpy(),
            None if label is None else label.cpu().numpy().astype(np.uint8),
            shown,
            stored.geometry.grid_spacing,
        )
        try:
            example.save(self.folder)
        except InputError as error:
            warnings.warn(f"{error} The report will show no picture of this case.", stacklevel=2)

    def write(
        self,
        rows: list[dict[str, Any]],
        checkpoint: Mapping[str, str] | None,
        data: Any,
        preparation: Preparation,
        seen: Sequence[str] = (),
    ) -> dict[str, float]:
        """Write the records and their sidecar, and print the table.

        Rows are those of all ranks, ``data`` the data module whose test cases were given, ``seen``
        the test cases that the model was trained or selected with.

        Returns:
            ``test/dice`` and ``test/dice/<region>``: see
            :func:`~pmixseg.evaluation.records.records.mean_over_cases`.

        Raises:
            InputError: no test case has a label.
        """
        if not rows:
            raise InputError("no test case has a label, so there is nothing to score; use predict.")
        # Everything that a reader must know before comparing the numbers.
        part = getattr(getattr(data, "parts", None), "test", None)
        sidecar = Sidecar(
            self.task,
            conventions=self.settings.conventions.to_dict(),
            postprocess=self.settings.postprocess,
            checkpoint=checkpoint,
            split=getattr(data, "split_name", None),
            part="test",
            part_size=None if part is None else len(set(part)),
            phantom=are_synthetic(data, "test"),
            seen=tuple(sorted(seen)),
            config={
                "evaluation": self.settings.to_dict(),
                "spacing": preparation.spacing,
                "patch": preparation.patch,
                "seed": preparation.seed,
                "split": preparation.split,
            },
        ).stamped()
        records = Records.from_rows(rows, self.folder.resolve().name, sidecar)
        self._publish(records)
        regions = records.table.groupby("region", sort=False)
        by_region = {f"test/dice/{region}": mean_over_cases(part) for region, part in regions}
        return {"test/dice": mean_over_cases(records.table), **by_region}

    @rank_zero_only
    def _publish(self, records: Records) -> None:
        cases = records.scored or count_of(records.table["case"].nunique(), "case")
        records.write(self.path)
        console = Console(highlight=False, markup=False, soft_wrap=True)
        console.print(result_table(records, width=console.width))
        sidecar = self.path.with_suffix(".json").name
        console.print(f"{cases}; {self.path}, conventions in {sidecar}")
