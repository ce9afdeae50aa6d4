"""The results of a run: one row per case × combination × region, and a sidecar that explains them.

=================  ==================================================================
column             meaning
=================  ==================================================================
``run``            name of the run
``case``           case id, as text
``combination``    modalities shown, joined by ``+`` in task order
``n_present``      how many they are
``region``         name of a region of the task
``dice``           0 to 1, empty masks by the convention in the sidecar
``hd95``           mm, percentile and empty masks by the convention in the sidecar
``ece``            expected calibration error of the region's probability, 0 to 1, 15 bins
``brier``          mean squared error of that probability, 0 to 1
others             whatever :mod:`pmixseg.evaluation.scores.metrics` measured, by its names:
                   ``asd`` (mm), ``nsd``, ``sensitivity``, ``specificity``, ``precision``,
                   ``volume_ml``, ``truth_volume_ml``, ``volume_error_ml``, ``empty`` (``none``,
                   ``truth``, ``prediction``, ``both``), ``presence_fp``, ``presence_fn``,
                   and lesion-wise ``lesion_dice``, ``lesion_hd95``, ``lesion_tp``,
                   ``lesion_fp``, ``lesion_fn``
=================  ==================================================================

Only the first six columns are always there. ``ece`` and ``brier`` are taken over the voxels of the
prepared grid in which any sequence of the case has signal, after the temperatures of the sidecar's
``config``. A combination that was not acquired for a case has no row.

``records.csv`` (or ``.parquet``, see :class:`~pmixseg.evaluation.EvaluationSettings`) lies in the
run's folder, its sidecar beside it with the suffix ``.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch.distributed as dist
from pandas.api.types import is_numeric_dtype

from pmixseg.argument_checks import checked
from pmixseg.data.cohorts.problems import listed
from pmixseg.errors import InputError, count_of, explained
from pmixseg.evaluation.records.measures import MEASURES
from pmixseg.evaluation.records.sidecar import Sidecar, read_sidecar
from pmixseg.evaluation.records.spreadsheets import quote_formulas, unquote_formulas
from pmixseg.files import file_hash, lock_folder, whole, write_text
from pmixseg.task import BRATS, Task, format_combination, parse_combination

FIRST_COLUMNS = ("run", "case", "combination", "n_present", "region", "dice", "hd95")
KEY = ("case", "combination", "region")
TEXT_COLUMNS = ("run", "case", "combination", "region")

Row = dict[str, Any]


def mean_over_cases(table: pd.DataFrame, column: str = "dice") -> float:
    """Average a measure over cases, each case's combinations and regions first.

    The primary endpoint of every comparison, and the one mean of a run: a case that lacks a
    sequence has fewer combinations, and counts as much as a complete one. Rows with NaN in the
    column are left out.

    Example:
        >>> table = pd.DataFrame({"case": ["a", "a", "b"], "dice": [0.9, 0.7, 0.2]})
        >>> mean_over_cases(table)
        0.5
    """
    return float(table.groupby("case", sort=False, observed=True)[column].mean().mean())


@dataclass
class Records:
    """Hold the results of one run: a row per case, combination and region.

    Args:
        table: the rows, columns beginning with :data:`FIRST_COLUMNS`.
        sidecar: what they mean.
        altered: the file's content is not what was written with the sidecar.

    Example:
        >>> row = {"case": "a1", "combination": "t1", "region": "WT", "dice": 0.5, "hd95": 9.0}
        >>> Records.from_rows([row], "demo", Sidecar(BRATS)).table.to_dict("records")
        [{'run': 'demo', 'case': 'a1', 'combination': 't1', 'n_present': 1, 'region': 'WT', \
'dice': 0.5, 'hd95': 9.0}]
    """

    table: pd.DataFrame
    sidecar: Sidecar
    altered: bool = False

    @property
    def task(self) -> Task:
        """Task of the records."""
        return self.sidecar.task

    @property
    def scored(self) -> str:
        """Return a sentence if only some cases of the part were scored, and none otherwise."""
        count, size = self.table["case"].nunique(), self.sidecar.part_size or 0
        return f"{count} of {size} cases of the part were scored" if count < size else ""

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], run: str, sidecar: Sidecar) -> Records:
        """Make the records of a run from rows, in the task's order; the last row of a key counts.

        Args:
            rows: mappings with ``case``, ``combination``, ``region``, ``dice`` and any other
                metrics; ``n_present`` is counted here.
            run: name of the run.
            sidecar: what they mean; ``Sidecar(...).stamped()`` adds versions and time.

        Raises:
            InputError: a combination or region that the task does not have.
        """
        table = pd.DataFrame([{**row, "run": run} for row in rows])
        return cls(_tidy(table, sidecar.task, "rows"), sidecar)

    @classmethod
    @checked
    def read(cls, path: Path | str, task: Task | None = None) -> Records:
        """Read ``records.csv``, ``.parquet``, or the run folder that holds one.

        A table without a sidecar (format 0) is read too: its task is ``task``, or BraTS if its
        names fit, or made of the names it uses.

        Raises:
            InputError: missing, not a table of records, or of a newer format.
        """
        # The rows, of one run.
        path = find_records(Path(path))
        sidecar_path = path.with_suffix(".json")
        raw = read_sidecar(sidecar_path) if sidecar_path.is_file() else None
        table = _read_table(path)
        lacking = [c for c in (*KEY, "dice") if c not in table]
        if lacking or table.empty:
            raise InputError(
                f"{path}: {f'lacks the columns {lacking}' if lacking else 'holds no row'}; a table "
                f"of records begins with {', '.join(FIRST_COLUMNS)}."
            )
        if "run" in table and table["run"].nunique() > 1:
            runs = sorted(table["run"].unique())
            raise InputError(
                f"{path}: holds rows of {len(runs)} runs ({listed(runs)}); give each run a file of "
                "its own."
            )
        _check_values(table, str(path))
        # What they mean: the sidecar, or a guess where there is none.
        if raw is None:
            guess = task or _guess_task(table)
            raw = {"format": 0, "task": guess.to_dict()}
        sidecar = Sidecar.from_dict(raw, str(sidecar_path))
        if "run" not in table:
            table["run"] = path.parent.name or path.stem
        written = _table_of(raw).get("sha256")
        altered = written is not None and written != file_hash(path)
        return cls(_tidy(table, sidecar.task, str(path)), sidecar, altered)

    @checked
    def write(self, path: Path | str) -> Path:
        """Replace the table at ``path`` and its sidecar; a reader never sees half a file.

        Args:
            path: ends in ``.csv`` or ``.parquet``, or is a folder, which gets ``records.csv``.

        Returns:
            The table's path.
        """
        path = _target(Path(path))
        held = lock_folder(path.parent, wait=True)
        try:
            with whole(path) as part:
                if path.suffix == ".parquet":
                    _parquet(lambda: self.table.to_parquet(part, index=False))
                else:
                    quote_formulas(self.table).to_csv(part, index=False)
                digest = file_hash(part)
            table = {"file": path.name, "rows": len(self.table), "sha256": digest}
            text = json.dumps({**self.sidecar.to_dict(), "table": table}, indent=2)
            write_text(path.with_suffix(".json"), text + "\n")
        finally:
            if held is not None:
                os.close(held)
        return path


def gather_rows(rows: Sequence[Row]) -> list[Row]:
    """Gather the rows of all ranks on every rank, once per case × combination × region.

    A distributed sampler repeats cases to give every rank as many; the first rank's row stays.
    Without an initialised process group: the given rows, cleaned the same way.
    """
    parts: list[Any] = [list(rows)]
    if dist.is_available() and dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, list(rows))
    once: dict[tuple[Any, ...], Row] = {}
    for row in (row for part in parts for row in part):
        once.setdefault(tuple(row[k] for k in KEY), row)
    # Which rank holds a case depends on how many there are; the table must not.
    return sorted(once.values(), key=lambda row: str(row["case"]))


@checked
def read_comparable(paths: Iterable[Path | str]) -> list[Records]:
    """Read the records of several runs that were scored in the same way."""
    pairs = [(str(path), Records.read(path)) for path in paths]
    for path, one in pairs[1:]:
        differ = [d for d in one.sidecar.differences(pairs[0][1].sidecar) if d != "checkpoint"]
        if differ:
            raise InputError(
                f"{path} and {pairs[0][0]} were scored in different ways ({', '.join(differ)}), or "
                "one has no records.json that says so; test the runs again in the same way, or "
                "compare others."
            )
    return [one for _, one in pairs]


def _table_of(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a sidecar says about its table; nothing where it is damaged."""
    table = raw.get("table")
    return table if isinstance(table, Mapping) else {}


def find_records(path: Path) -> Path:
    """Return the table that ``path`` names: itself, or the one in that run folder.

    A folder may hold a table of either kind; the sidecar names the one that was written last.
    """
    if path.is_file():
        return path
    if (path / "records.json").is_file():
        named = _table_of(read_sidecar(path / "records.json"))
        if "file" in named and (path / Path(str(named["file"])).name).is_file():
            return path / Path(str(named["file"])).name
    for name in ("records.csv", "records.parquet"):
        if (path / name).is_file():
            return path / name
    raise InputError(
        f"{path}: holds no records.csv; run `pmixseg test` for this run first, or name its folder."
    )


def _target(path: Path) -> Path:
    path = path / "records.csv" if path.is_dir() or not path.suffix else path
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"{path}: records are written as .csv or .parquet; change the name.")
    return path


def _read_table(path: Path) -> pd.DataFrame:
    with explained(f"{path}: cannot be read as a table", "test again"):
        if path.suffix == ".parquet":
            parquet: pd.DataFrame = _parquet(lambda: pd.read_parquet(path))
            return parquet
        # Case ids such as 00014 or NA stay the text they are.
        columns = pd.read_csv(path, nrows=0).columns
        table = pd.read_csv(
            path,
            dtype=dict.fromkeys(TEXT_COLUMNS, str),
            keep_default_na=False,
            na_values={c: ["", "nan", "NaN"] for c in columns if c not in TEXT_COLUMNS},
            float_precision="round_trip",
        )
        return unquote_formulas(table)


def _check_values(table: pd.DataFrame, where: str) -> None:
    """Refuse what no test writes: words for numbers, impossible numbers, a row twice."""
    # Numbers, within what each measure can be.
    measured = [m for m in MEASURES.values() if m.numeric and m.name in table]
    words = [m.name for m in measured if not is_numeric_dtype(table[m.name])]
    if words:
        raise InputError(f"{where}: {words} hold other things than numbers; test again.")
    for measure in measured:
        lowest, highest = measure.bounds
        values = table[measure.name]
        odd = table[(values < lowest) | (values > highest)]
        if len(odd):
            row = odd.iloc[0]
            raise InputError(
                f"{where}: {measure.name} of {_row_name(row)} is {row[measure.name]:g}, which no "
                f"{measure.title} can be; test again."
            )
    # Each case, combination and region once.
    twice = table[table.duplicated(list(KEY))]
    if len(twice):
        raise InputError(
            f"{where}: holds {_row_name(twice.iloc[0])} more than once, "
            f"{count_of(len(twice), 'row')} too many; remove them, or test again."
        )


def _row_name(row: pd.Series) -> str:
    return f"case '{row['case']}', {row['combination']}, {row['region']}"


def _tidy(table: pd.DataFrame, task: Task, where: str) -> pd.DataFrame:
    """Check names, complete and order columns and rows, keep the last row of each key."""
    if table.empty:
        return pd.DataFrame(columns=list(FIRST_COLUMNS))
    table = table.copy()
    table["case"] = table["case"].astype(str)
    names = {}
    for text in table["combination"].unique():
        try:
            names[text] = parse_combination(str(text), task.modalities)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    strange = sorted(set(table["region"]) - set(task.regions))
    if strange:
        raise InputError(
            f"{where}: regions {listed(strange)} are not among {list(task.regions)} of task "
            f"'{task.name}'; read it with its own task."
        )
    # One spelling of each combination.
    table["n_present"] = table["combination"].map({t: len(c) for t, c in names.items()})
    table["combination"] = table["combination"].map(
        {t: format_combination(c) for t, c in names.items()}
    )
    if "hd95" not in table:
        table["hd95"] = float("nan")
    table = table.drop_duplicates(list(KEY), keep="last")
    # Rows by case, then combinations and regions in the order of the task.
    combinations = [format_combination(c) for c in task.combinations()]
    place = {"case": str, "combination": combinations.index, "region": list(task.regions).index}
    table = table.sort_values(list(KEY), key=lambda c: c.map(place[c.name]), ignore_index=True)
    return table[[*FIRST_COLUMNS, *(c for c in table if c not in FIRST_COLUMNS)]]


def _guess_task(table: pd.DataFrame) -> Task:
    used = {n.strip(): None for text in table["combination"] for n in str(text).split("+")}
    regions = {str(r): (str(r),) for r in table["region"].unique()}
    if set(used) <= set(BRATS.modalities) and set(regions) <= set(BRATS.regions):
        return BRATS
    return Task("unnamed", tuple(used), tuple(regions), regions)


def _parquet(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except ImportError as error:
        raise InputError(
            "Parquet needs the package pyarrow; `pip install pmixseg[parquet]` or use a name that "
            "ends in .csv."
        ) from error
