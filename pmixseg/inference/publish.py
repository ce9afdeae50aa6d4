"""Publish a checkpoint as safetensors, JSON and a model card; and read it back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from pmixseg.argument_checks import check_fields, checked
from pmixseg.errors import InputError
from pmixseg.evaluation.comparison.paired_tests import two_way_bootstrap
from pmixseg.evaluation.records.records import Records, find_records
from pmixseg.files import file_hash, not_among
from pmixseg.modules.checkpoint import read_checkpoint, write_checkpoint
from pmixseg.task import Task, format_combination
from pmixseg.version import __version__
from pmixseg.weights import local_copy, read_published, write_published


@dataclass(frozen=True)
class Facts:
    """What only the owner of a model knows; every field stands in its card.

    Args:
        title: of the model, in a line.
        licence: of the weights, as an SPDX identifier.
        data: what it was trained on, and under which terms.
        citation: what to cite.
        limits: what it must not be used for, beyond "research use only".
    """

    title: str = ""
    licence: str = "other"
    data: str = "not stated"
    citation: str = "Liu et al.: Mind the Gap. arXiv 2409.19366"
    limits: str = ""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Result:
    """Dice of one region and combination in the card, in percent.

    Args:
        combination: ``flair+t1ce``, or ``mean of all``.
        region: name of the region.
        mean: over cases.
        low: lower end of the 95 % interval over cases; ``None`` with one case.
        high: its upper end.
        cases: how many.
    """

    combination: str
    region: str
    mean: float
    low: float | None
    high: float | None
    cases: int


@checked
def publish(
    checkpoint: str | Path,
    out: str | Path,
    facts: Facts | None = None,
    records: str | Path | None = None,
) -> Path:
    """Write a model as three files that cannot run code, to be put on a server as they are.

    ``out`` is the folder of ``model.safetensors``, ``pmixseg.json`` and ``README.md``; the facts go
    into this card, as do results with intervals of tested records (a run's folder or table).

    Raises:
        InputError: not a checkpoint, records of another checkpoint, or ``out`` cannot be written.
    """
    source, facts = Path(checkpoint), facts or Facts()
    content = read_checkpoint(source)
    task = Task.from_dict(content["pmixseg"]["task"])
    tensors = {n: t for n, t in content["state_dict"].items() if not n.startswith("terms.")}
    table = None if records is None else _records_of(Path(records), source)
    results = [] if table is None else results_of(table, task)
    about: dict[str, Any] = {
        "title": facts.title
        or f"{content['pmixseg']['class_path'].rpartition('.')[2]} ({task.name})",
        "licence": facts.licence,
        "data": facts.data,
        "citation": facts.citation,
        "limits": facts.limits,
        "pmixseg": __version__,
        "results": [vars(result) for result in results],
    }
    # The terms of the training are left out, and what could name a patient or a folder: the lists
    # of cases and the place of the store.
    description = {**content["pmixseg"], "terms": [], "cases": None}
    card = _card(about, description, task, table)
    return write_published(Path(out), tensors, description, about, card)


@checked
def as_checkpoint(source: str | Path, out: str | Path) -> Path:
    """Turn a published model (folder, name, address) into a checkpoint for Lightning's commands."""
    folder = local_copy(source)
    if not folder.is_dir():
        raise InputError(f"{source} is no folder of a published model; see `pmixseg publish`.")
    not_among(Path(out), folder.iterdir())
    return write_checkpoint(read_published(folder), out)


def results_of(records: Records, task: Task) -> list[Result]:
    """Tabulate Dice per region: over all combinations, then for each of them."""
    table = records.table
    names = [format_combination(c) for c in task.combinations()]
    rows: list[Result] = []
    for name in ["mean of all", *(n for n in names if (table.combination == n).any())]:
        part = table if name == "mean of all" else table[table.combination == name]
        for region in task.regions:
            dice = part[part.region == region].groupby("case").dice.mean().to_numpy(np.float64)
            mean, low, high = (
                100 * v for v in (float(dice.mean()), *two_way_bootstrap(dice[None]))
            )
            ends = (None, None) if len(dice) < 2 else (round(low, 1), round(high, 1))
            rows.append(Result(name, region, round(mean, 1), ends[0], ends[1], len(dice)))
    return rows


def _records_of(place: Path, checkpoint: Path) -> Records:
    records = Records.read(find_records(place))
    tested = records.sidecar.checkpoint
    digest = tested.get("sha256") if tested else None
    if checkpoint.is_file() and digest not in (None, file_hash(checkpoint)):
        raise InputError(
            f"{place} holds results of another checkpoint than {checkpoint}; test this one first."
        )
    return records


def _card(
    about: Mapping[str, Any], description: Mapping[str, Any], task: Task, records: Records | None
) -> str:
    environment = Environment(
        loader=PackageLoader("pmixseg.inference"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, read as text
    )
    conventions = {} if records is None else dict(records.sidecar.conventions)
    return environment.get_template("card.md.j2").render(
        about=about,
        description=description,
        task=task,
        conventions=conventions,
        phantom=None if records is None else records.sidecar.phantom,
        seen=0 if records is None else len(records.sidecar.seen),
        scored=None if records is None else records.scored,
    )
