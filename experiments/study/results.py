"""What a study leaves: one table of records, and one row per training and table that it is in.

====================  ===========================================================================
file                  content
====================  ===========================================================================
``records.parquet``   Dice of every run, in the columns of
                      :mod:`pmixseg.evaluation.records.records`; ``run`` tells trainings apart
``records.json``      the sidecar of those records
``trainings.csv``     ``run``, ``group`` (the table it belongs to), ``arm``, ``block`` (trainings
                      of one block are matched: same seed, or same case left out), ``against``
                      (arm that it is compared with in exploratory tables), ``seed``, ``part``
                      that was scored, ``parts`` (trainings that make up the arm), ``steps``,
                      seconds, last losses, and measures of the latents:
                      ``gap/level<l>/<measure>`` after and ``gap_before/level<l>/<measure>``
                      before the training
====================  ===========================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pmixseg.errors import InputError
from pmixseg.evaluation.records.records import FIRST_COLUMNS, Records
from pmixseg.evaluation.records.sidecar import Sidecar, read_sidecar
from pmixseg.task import BRATS

RECORDS, TRAININGS = "records.parquet", "trainings.csv"
CONVENTIONS = {
    "dice": "both masks empty 1, one empty 0",
    "grid": "the prepared one",
    "et_threshold": "not used",
}
TEXT = ("run", "group", "arm", "block", "against", "part", "settings")


@dataclass
class StudyResults:
    """Records and figures of every training of a study.

    Args:
        records: rows of all runs.
        trainings: a row per training and group.
        sidecar: what the records mean.
    """

    records: pd.DataFrame
    trainings: pd.DataFrame
    sidecar: Sidecar

    def __post_init__(self) -> None:
        self._runs = {str(run): part for run, part in self.records.groupby("run", sort=False)}

    @classmethod
    def read(cls, folder: Path) -> StudyResults:
        """Read the three files of a study.

        Raises:
            InputError: one is missing or damaged.
        """
        try:
            records = pd.read_parquet(folder / RECORDS)
            trainings = pd.read_csv(folder / TRAININGS, dtype=dict.fromkeys(TEXT, str))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{folder}: holds no whole study ({error}); run `python -m experiments.study run` "
                "for its plan first."
            ) from error
        sidecar = Sidecar.from_dict(read_sidecar((folder / RECORDS).with_suffix(".json")))
        return cls(records, trainings, sidecar)

    def write(self, folder: Path) -> None:
        """Replace the three files; Dice with four decimals, figures with five digits."""
        folder.mkdir(parents=True, exist_ok=True)
        others = [c for c in self.records if c not in FIRST_COLUMNS]
        table = self.records.assign(dice=self.records["dice"].round(4))
        Records(table[[*FIRST_COLUMNS, *others]], self.sidecar).write(folder / RECORDS)
        path = folder / TRAININGS
        self.trainings.to_csv(path.with_suffix(".part"), index=False, float_format="%.5g")
        path.with_suffix(".part").replace(path)

    @classmethod
    def gather(cls, name: str, ended: Path, order: Iterable[str]) -> StudyResults | None:
        """What trainings left in a folder of work, in the order of the plan.

        Args:
            name: of the study.
            ended: folder with a table and a JSON per training.
            order: names of trainings; others that lie there are left out.

        Returns:
            Nothing where none has ended.
        """
        names = [name for name in order if (ended / f"{name}.json").is_file()]
        if not names:
            return None
        rows = [json.loads((ended / f"{name}.json").read_text(encoding="utf-8")) for name in names]
        text = dict.fromkeys(("run", "case", "combination", "region"), str)
        tables = [pd.read_csv(ended / f"{name}.csv", dtype=text) for name in names]
        sidecar = Sidecar(BRATS, CONVENTIONS, part="test", config={"study": name}).stamped()
        trainings = pd.DataFrame(rows).astype({"block": str})
        return cls(pd.concat(tables, ignore_index=True), trainings, sidecar)

    def joined(self, other: StudyResults, order: Sequence[str]) -> StudyResults:
        """With the trainings of another that this one lacks.

        Args:
            other: of the same study.
            order: names of trainings, as the plan has them; others stay in front.
        """
        new = ~other.trainings["run"].isin(self.trainings["run"])
        runs = set(other.trainings.loc[new, "run"])
        records = other.records[other.records["run"].isin(runs)]
        place = {name: number for number, name in enumerate(order)}

        def sort(one: pd.DataFrame, two: pd.DataFrame) -> pd.DataFrame:
            both = pd.concat([one, two], ignore_index=True)
            ranks = both["run"].map(place).fillna(-1)
            return both.loc[ranks.sort_values(kind="stable").index].reset_index(drop=True)

        return StudyResults(
            sort(self.records, records),
            sort(self.trainings, other.trainings[new]),
            self.sidecar,
        )

    def run(self, name: str) -> pd.DataFrame:
        """Records of one training."""
        return self._runs[name]

    def group(self, name: str) -> pd.DataFrame:
        """Rows of the trainings of one group.

        Raises:
            InputError: there is no such group.
        """
        rows = self.trainings[self.trainings["group"] == name]
        if rows.empty:
            known = ", ".join(map(str, self.trainings["group"].unique()))
            raise InputError(f"the study has no group '{name}'; it has {known}.")
        return rows

    def arm(self, group: str, arm: str) -> pd.DataFrame:
        """Rows of one arm, a row per block.

        Raises:
            InputError: there is no such group or arm.
        """
        rows = self.group(group)
        of_arm = rows[rows["arm"] == arm]
        if of_arm.empty:
            known = ", ".join(map(str, rows["arm"].unique()))
            raise InputError(f"group '{group}' has no arm '{arm}'; it has {known}.")
        return of_arm

    def whole_blocks(self, group: str, arms: list[str] | None = None) -> list[str]:
        """Blocks in which every one of the arms has ended, in the order of their appearance.

        Args:
            group: name of the group.
            arms: default: all of the group.
        """
        rows = self.group(group)
        names = set(rows["arm"] if arms is None else arms)
        # An arm of several trainings, such as a student for each sequence, counts when all ended.
        parts = rows["parts"].fillna(1) if "parts" in rows else pd.Series(1, rows.index)
        counts = rows.assign(parts=parts).groupby(["block", "arm"], sort=False)["parts"]
        ended = counts.agg(lambda of: len(of) >= of.iloc[0])
        there: dict[str, set[str]] = {}
        for block, arm in ended[ended].index:
            there.setdefault(str(block), set()).add(arm)
        return [block for block in dict.fromkeys(rows["block"]) if names <= there.get(block, set())]

    def tables(self, group: str, arm: str, blocks: list[str]) -> list[pd.DataFrame]:
        """Records of an arm, a table per block, in the order of the blocks."""
        rows = self.arm(group, arm)
        runs = [rows.loc[rows["block"] == block, "run"] for block in blocks]
        return [pd.concat([self.run(str(name)) for name in names]) for names in runs]
