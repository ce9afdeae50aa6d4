"""What a study leaves: one table of records, and one row per training and table that it is in.

====================  ===========================================================================
file                  content
====================  ===========================================================================
``records.parquet``   Dice of every run, in the columns of
                      :mod:`pmixseg.evaluation.records.records`; ``run`` tells trainings apart
``records.json``      the sidecar of those records
``trainings.csv``     ``run``, ``group`` (the table it belongs to), ``arm``, ``block`` (trainings
                      of one block are matched: same seed, or same case left out), ``against``
                      (arm that it is compared with in exploratory tables), ``seed``, ``part``,
                      ``steps``, seconds, last losses, and measures of the latents:
                      ``gap/level<l>/<measure>`` after and ``gap_before/level<l>/<measure>``
                      before the training
====================  ===========================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pmixseg.errors import InputError
from pmixseg.evaluation.records.records import FIRST_COLUMNS, Records
from pmixseg.evaluation.records.sidecar import Sidecar, read_sidecar

RECORDS, TRAININGS = "records.parquet", "trainings.csv"
TEXT = ("run", "group", "arm", "block", "against", "part")


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
        found = rows[rows["arm"] == arm]
        if found.empty:
            known = ", ".join(map(str, rows["arm"].unique()))
            raise InputError(f"group '{group}' has no arm '{arm}'; it has {known}.")
        return found

    def whole_blocks(self, group: str, arms: list[str] | None = None) -> list[str]:
        """Blocks in which every one of the arms has ended, in the order of their appearance.

        Args:
            group: name of the group.
            arms: default: all of the group.
        """
        rows = self.group(group)
        wanted = set(rows["arm"] if arms is None else arms)
        blocks = rows.groupby("block", sort=False)["arm"].agg(set)
        return [str(block) for block, ended in blocks.items() if wanted <= ended]

    def tables(self, group: str, arm: str, blocks: list[str]) -> list[pd.DataFrame]:
        """Records of an arm, a table per block, in the order of the blocks."""
        runs = self.arm(group, arm).set_index("block")["run"]
        return [self.run(str(runs[block])) for block in blocks]
