"""Find the data of a training: a prepared store, or a cohort to prepare first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from pmixseg.data.cohorts.layouts import LabelNames, find_cases, search
from pmixseg.data.cohorts.problems import listed
from pmixseg.data.scans.geometry import spacing_of
from pmixseg.data.store.store import Store, prepare
from pmixseg.errors import InputError, count_of
from pmixseg.task import Task


class CohortSource:
    """Open a prepared store, made from a cohort first where one is named.

    Arguments are those of :class:`~pmixseg.data.datamodule.BraTSDataModule`.
    """

    def __init__(
        self,
        store: str | Path | None,
        root: str | Path | None,
        task: Task,
        spacing: Sequence[float] | None = None,
        layout: str | Path | None = None,
        labels: LabelNames | None = None,
        workers: int = 0,
    ) -> None:
        if store is None and root is None:
            raise InputError("no data: name a prepared store (data.store) or a cohort (data.root).")
        self.root = None if root is None else Path(root)
        self.task, self.layout, self.labels, self.workers = task, layout, labels, workers
        self.spacing = None if spacing is None else spacing_of(spacing)
        self.path = _beside(Path(str(root)), self.spacing) if store is None else Path(store)

    @cached_property
    def store(self) -> Store:
        """The opened store."""
        store = Store.open(self.path)
        theirs, ours = store.task, self.task
        if (theirs.modalities, theirs.labels) != (ours.modalities, ours.labels):
            raise InputError(
                f"store {self.path} holds {list(theirs.modalities)} with the labels "
                f"{list(theirs.labels)}, but the task '{ours.name}' has {list(ours.modalities)} "
                f"with {list(ours.labels)}; prepare it for this task or set data.task."
            )
        if self.spacing is not None and store.spacing != self.spacing:
            raise InputError(
                f"store {self.path} was prepared at spacing {store.spacing} mm, not "
                f"{self.spacing}; prepare it again or correct data.spacing."
            )
        return store

    @cached_property
    def cases(self) -> tuple[str, ...]:
        """The cases of the store, of which a file lies under ``root``."""
        if self.root is None:
            if unlisted := self.store.unlisted:
                they = count_of(len(unlisted), "case of the store is", "cases of the store are")
                rank_zero_warn(
                    f"{they} damaged, incomplete or prepared with other parameters, and left out "
                    f"({listed(unlisted)}), so a split may be another one than before; run "
                    f"`pmixseg prepare ROOT {self.path}` again."
                )
            return self.store.cases
        cohort = find_cases(self.root, self.task, self.layout, self.labels)
        ids = {case.case_id for case in cohort}
        return tuple(name for name in self.store.cases if name in ids)

    def prepare(self) -> None:
        """Bring the store up to date with ``root``, where there is one."""
        if self.root is None:
            return
        cohort = search(self.root, self.task, self.layout, self.labels)
        report = prepare(
            cohort.cases, self.path, self.task, spacing=self.spacing, workers=self.workers
        )
        # What was opened before may have changed.
        self.__dict__.pop("store", None)
        self.__dict__.pop("cases", None)
        report.cohort = (*cohort.remarks, *report.cohort)
        rank_zero_info(report.summary())
        if left := (*report.gone, *report.elsewhere):
            others = count_of(len(left), "case of the store is", "cases of the store are")
            rank_zero_info(f"{others} not under {self.root}, and left out")
        if report.failed:
            raise InputError(
                f"{count_of(len(report.failed), 'case')} of {self.root} cannot be used: "
                f"{' '.join(report.failed.values())} To go on without them, name the store "
                f"{self.path} and no root."
            )


def _beside(root: Path, spacing: Sequence[float] | None) -> Path:
    """Return the store that belongs to a cohort where none is named."""
    grid = "" if spacing is None else "-" + "x".join(f"{s:g}" for s in spacing)
    return root.resolve().parent / f"{root.resolve().name}-store{grid}"
