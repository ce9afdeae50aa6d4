"""What a test leaves behind: records with their sidecar, examples for pictures, a table."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console

from pmixseg.data.patches import CaseItem
from pmixseg.errors import InputError, writing
from pmixseg.evaluation.prediction.cases import CasePrediction
from pmixseg.evaluation.records.examples import Example, examples_of
from pmixseg.evaluation.records.grouped import result_table
from pmixseg.evaluation.records.records import Records, gather_rows
from pmixseg.evaluation.records.sidecar import Sidecar, checkpoint_identity
from pmixseg.task import Combination

if TYPE_CHECKING:
    from pmixseg.modules.network import SegmentationNetwork


def run_folder(module: SegmentationNetwork) -> Path:
    """Where the trainer writes."""
    return Path(module.trainer.default_root_dir)


@rank_zero_only
def check_place(module: SegmentationNetwork) -> None:
    """Find out before a long test, not after it, that its records could not be written.

    Raises:
        InputError: they could not.
    """
    path = run_folder(module) / module.evaluation.records
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


@rank_zero_only
def forget_examples(module: SegmentationNetwork) -> None:
    """Remove the pictures of an earlier test of this run."""
    for path in examples_of(run_folder(module)).values():
        path.unlink(missing_ok=True)


def keep_example(
    predictions: Iterable[CasePrediction], module: SegmentationNetwork, item: CaseItem
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
        module.task.modalities,
        item["image"].float().cpu().numpy(),
        None if label is None else label.cpu().numpy().astype(np.uint8),
        shown,
        stored.geometry.grid_spacing,
    )
    try:
        example.save(run_folder(module))
    except InputError as error:
        warnings.warn(f"{error} The report will show no picture of this case.", stacklevel=2)


def write_records(module: SegmentationNetwork, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Gather the rows of all ranks, write ``records.csv`` and its sidecar, print the table.

    Returns:
        ``test/dice`` and ``test/dice/<region>``, averaged over cases and combinations.

    Raises:
        InputError: no test case has a label.
    """
    every = gather_rows(rows)
    if not every:
        raise InputError("no test case has a label, so there is nothing to score; use predict.")
    folder = run_folder(module)
    data = getattr(module.trainer, "datamodule", None)
    source = module.trainer.ckpt_path or module.loaded_from
    sidecar = Sidecar(
        module.task,
        conventions=module.evaluation.conventions.to_dict(),
        postprocess=module.evaluation.postprocess,
        checkpoint=None if source is None else checkpoint_identity(Path(source)),
        split=None if data is None else data.split_name,
        part="test",
        phantom=all("PHANTOM" in row["case"] for row in every),
        config={
            "evaluation": module.evaluation.to_dict(),
            "spacing": module.preparation.spacing,
            "patch": module.preparation.patch,
            "seed": module.preparation.seed,
        },
    ).stamped()
    records = Records.from_rows(every, folder.resolve().name, sidecar)
    _publish(records, folder / module.evaluation.records)
    table = records.table
    means = table.groupby("region", sort=False)["dice"].mean()
    found = {f"test/dice/{region}": float(value) for region, value in means.items()}
    return {"test/dice": float(means.mean()), **found}


@rank_zero_only
def _publish(records: Records, path: Path) -> None:
    cases = records.table["case"].nunique()
    records.write(path)
    console = Console(highlight=False)
    console.print(result_table(records, width=console.width))
    console.print(f"{cases} cases; {path}, conventions in {path.with_suffix('.json').name}")


def warn_without_label(item: CaseItem) -> None:
    """Say that a case is not scored."""
    rank_zero_warn(f"case '{item['case_id']}' has no label and is not scored.")
