"""Looking at a cohort before anything is done with it: `pmixseg inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from pmixseg.data.cohorts.layouts import Case, Layout, search
from pmixseg.data.scans.geometry import Geometry
from pmixseg.data.scans.nifti import Scan, ScanReader
from pmixseg.data.scans.volumes import (
    check_same_grid,
    class_table,
    classes_of,
    geometry_of,
    signal_of,
)
from pmixseg.errors import InputError
from pmixseg.task import Task


@dataclass(frozen=True)
class CaseFacts:
    """What one case's files hold.

    Args:
        case_id: name of the case.
        modalities: those that have a file, in task order.
        labelled: whether there is a label file.
        shape: voxels, in the file's axis order.
        spacing: mm, in the file's axis order.
        orientation: axis codes of the file, such as ``LPS``.
        voxels: label name -> voxels, where the label could be read.
        problems: sentences; a case with one cannot be prepared.
    """

    case_id: str
    modalities: tuple[str, ...]
    labelled: bool
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    orientation: str = ""
    voxels: dict[str, int] | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """A cohort's table; rich prints it.

    Args:
        root: where it was looked.
        layout: name of the layout by which the cases were found.
        task: modalities and labels that were looked for.
        cases: one entry per case.
        stray: NIfTI files that belong to no case.
    """

    root: Path
    layout: str
    task: Task
    cases: Sequence[CaseFacts]
    stray: Sequence[Path] = field(default=())

    @property
    def problems(self) -> list[str]:
        """All problems, one sentence each; missing modalities and labels are none."""
        return [problem for case in self.cases for problem in case.problems]

    def table(self) -> Table:
        """One row per case: lacking modalities, voxels per label, number of problems."""
        table = Table(
            title=f"{self.root} · layout {self.layout} · {len(self.cases)} cases",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column("case", overflow="fold")
        table.add_column("lacks", overflow="fold")
        for name in ("shape", "mm", "axes"):
            table.add_column(name, no_wrap=True)
        for name in self.task.labels:
            table.add_column(escape(name), justify="right", no_wrap=True)
        table.add_column("!", justify="right")
        for case in self.cases:
            lacking = [self.task.show(m) for m in self.task.modalities if m not in case.modalities]
            shape = "×".join(map(str, case.shape)) if case.shape else "?"
            spacing = "×".join(f"{s:.3g}" for s in case.spacing) if case.spacing else "?"
            unknown = "?" if case.labelled else "no label"
            row = [
                case.case_id,
                ", ".join(lacking),
                shape,
                spacing,
                case.orientation or "?",
                *(f"{case.voxels[n]:,}" if case.voxels else unknown for n in self.task.labels),
                str(len(case.problems) or ""),
            ]
            table.add_row(*map(escape, row), style="red" if case.problems else None)
        return table

    def summary(self) -> str:
        """What the table says, in sentences; the problems last."""
        have = Counter(m for case in self.cases for m in case.modalities)
        counts = ", ".join(f"{self.task.show(m)} {have[m]}" for m in self.task.modalities)
        labelled = sum(case.labelled for case in self.cases)
        lines = [f"{len(self.cases)} cases: {counts}; with a label {labelled}."]
        shapes = Counter((c.shape, c.spacing, c.orientation) for c in self.cases if c.shape)
        if len(shapes) > 1:
            lines.append(f"{len(shapes)} different shapes, spacings or orientations.")
        if self.stray:
            named = ", ".join(str(p.relative_to(self.root)) for p in self.stray[:3])
            more = ", ..." if len(self.stray) > 3 else ""
            lines.append(f"{len(self.stray)} NIfTI files belong to no case: {named}{more}.")
        lines.append(f"{len(self.problems)} problems." if self.problems else "No problems.")
        return "\n".join([*lines, *self.problems])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()
        yield escape(self.summary())


def inspect_cohort(
    root: Path | str,
    task: Task,
    layout: str | Path | Layout | None = None,
    *,
    progress: bool = False,
) -> Inspection:
    """Read every file of a cohort and list what is there and what is wrong; nothing is changed.

    Args:
        root: the cohort's folder.
        task: which modalities and labels are looked for.
        layout: see :func:`~pmixseg.data.cohorts.layouts.find_cases`.
        progress: show a progress bar with the time left.

    Raises:
        InputError: the folder is missing or unreadable, or no layout fits.
    """
    found = search(root, task, layout)
    console = Console(stderr=True)
    cases = track(found.cases, "inspecting", console=console, disable=not progress)
    facts = [_facts(case, task) for case in cases]
    names = [case.layout for case in found.cases if case.layout]
    return Inspection(Path(root), names[0], task, facts, found.stray)


def _facts(case: Case, task: Task) -> CaseFacts:
    where = f"case '{case.case_id}'"
    modalities = tuple(m for m in task.modalities if m in case.images)
    if case.problem is not None:
        return CaseFacts(case.case_id, modalities, case.label is not None, problems=(case.problem,))
    problems: list[str] = []
    geometry: Geometry | None = None
    reference = ""
    voxels: dict[str, int] | None = None
    for role, scan in _readable(case, task, where, problems):
        try:
            own = geometry_of(scan, None, where)
            if geometry is None:
                geometry, reference = own, scan.name
            if role == "label":
                voxels = _voxels(scan, own, task, case, where)
            else:
                signal_of(scan, own, where)
            check_same_grid(geometry, own, reference, scan.name, where)
        except InputError as error:
            problems.append(str(error))
    return CaseFacts(
        case_id=case.case_id,
        modalities=modalities,
        labelled=case.label is not None,
        shape=geometry.source_shape if geometry else None,
        spacing=geometry.source_zooms if geometry else None,
        orientation="".join(nib.aff2axcodes(geometry.affine)) if geometry else "",
        voxels=voxels,
        problems=tuple(problems),
    )


def _readable(
    case: Case, task: Task, where: str, problems: list[str]
) -> Iterator[tuple[str, Scan]]:
    """The case's files that can be decoded; the others become problems."""
    reader = ScanReader(where)
    sources = [(m, case.images[m]) for m in task.modalities if m in case.images]
    for role, source in [*sources, *([("label", case.label)] if case.label else [])]:
        try:
            scan = reader.read(source, role)
        except InputError as error:
            problems.append(str(error))
            continue
        yield role, scan


def _voxels(scan: Scan, geometry: Geometry, task: Task, case: Case, where: str) -> dict[str, int]:
    table = class_table(task, case.codes, case.ignored)
    classes: npt.NDArray[np.uint8] = classes_of(scan, geometry, table, where)[1]
    counts = np.bincount(classes.ravel(), minlength=task.num_classes)
    return {name: int(counts[i + 1]) for i, name in enumerate(task.labels)}
