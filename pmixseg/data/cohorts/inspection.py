"""Inspect a cohort before anything else is done with it: ``pmixseg inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import track
from rich.table import Table
from rich.text import Text

from pmixseg.argument_checks import checked
from pmixseg.data.cohorts.layouts import Case, LabelNames, Layout, search
from pmixseg.data.cohorts.problems import doubled_line, grouped, ignored_lines, listed
from pmixseg.data.formats.nifti import ScanReader
from pmixseg.data.scans.canonical import CaseFiles
from pmixseg.data.scans.plausibility import judge
from pmixseg.data.scans.volumes import LabelMap
from pmixseg.errors import InputError, count_of
from pmixseg.task import Task

_ENDLESS = 10_000
"""Columns of a terminal in which nothing is folded."""


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
        ignored: number in the label file that becomes background -> voxels of it.
        scans: SHA-256 of the files of its scans.
        problems: sentences; a case with one is not prepared.
        notes: sentences about a case that is prepared all the same.
    """

    case_id: str
    modalities: tuple[str, ...]
    labelled: bool
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    orientation: str = ""
    voxels: dict[str, int] | None = None
    ignored: dict[int, int] = field(default_factory=dict)
    scans: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """A cohort's table; rich prints it.

    Args:
        root: where it was looked.
        layout: name of the layout by which the cases were found.
        task: modalities and labels that were looked for.
        cases: one entry per case.
        cohort: sentences about the cohort as a whole.
    """

    root: Path
    layout: str
    task: Task
    cases: Sequence[CaseFacts]
    cohort: Sequence[str] = field(default=())

    @property
    def problems(self) -> list[str]:
        """All problems, one sentence each; missing modalities and labels are none."""
        return [problem for case in self.cases for problem in case.problems]

    def table(self) -> Table:
        """Return one row per case: lacking modalities, voxels per label, number of problems."""
        table = Table(
            title=f"{self.root} · layout {self.layout} · {count_of(len(self.cases), 'case')}; "
            "labels in voxels, !: problems",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column("case", no_wrap=True, overflow="ignore")
        table.add_column("lacks", overflow="fold")
        for name in ("shape", "mm", "axes"):
            table.add_column(name, no_wrap=True)
        for name in self.task.labels:
            table.add_column(Text(name), justify="right", no_wrap=True)
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
            table.add_row(*map(Text, row), style="red" if case.problems else None)
        return table

    def summary(self) -> str:
        """Say what the table says, and what it means for training, in sentences; problems last."""
        have = Counter(m for case in self.cases for m in case.modalities)
        counts = ", ".join(f"{self.task.show(m)} {have[m]}" for m in self.task.modalities)
        labelled = sum(case.labelled for case in self.cases)
        lines = [f"{count_of(len(self.cases), 'case')}: {counts}; with a label {labelled}."]
        shapes = {
            (c.shape, tuple(f"{s:.3g}" for s in c.spacing or ()), c.orientation)
            for c in self.cases
            if c.shape
        }
        if len(shapes) > 1:
            lines.append(f"{len(shapes)} different shapes, spacings or orientations.")
        lines += [f"{line}." for line in ignored_lines({c.case_id: c.ignored for c in self.cases})]
        if absent := self._absent():
            lines.append(
                f"no label map holds {', '.join(absent)}; see that the numbers in them are those "
                f"of layout '{self.layout}'."
            )
        lines += self._of_one_class()
        lines += doubled_line({c.case_id: c.scans for c in self.cases})
        lines += self.cohort
        lines += self._use()
        lines += grouped((c.case_id, note) for c in self.cases for note in c.notes)
        problems = count_of(len(self.problems), "problem") if self.problems else "No problems"
        lines.append(f"{problems}.")
        return "\n".join(
            [*lines, *grouped((c.case_id, text) for c in self.cases for text in c.problems)]
        )

    def _absent(self) -> list[str]:
        """Return the labels that no case has, if any has labels: maps may hold one class alone."""
        counts = Counter[str]()
        for case in self.cases:
            counts.update(case.voxels or {})
        return [name for name in self.task.labels if counts.total() and not counts[name]]

    def _of_one_class(self) -> Iterator[str]:
        """Name label maps of one label where most hold them all: as masks of the whole tumour."""
        labelled = [c for c in self.cases if c.voxels and any(c.voxels.values())]
        held = {c.case_id: [n for n, count in (c.voxels or {}).items() if count] for c in labelled}
        full = sum(len(names) == len(self.task.labels) for names in held.values())
        alone = {case: names[0] for case, names in held.items() if len(names) == 1}
        if alone and 2 * full >= len(held) and len(self.task.labels) > 1:
            names = listed([f"{case} {name}" for case, name in alone.items()])
            maps = count_of(len(alone), "label map holds one label", "label maps hold one label")
            yield f"{maps} alone ({names}), as a mask of the whole tumour does; look at it."

    def _use(self) -> Iterator[str]:
        """Say what becomes of the cases that are not as the others."""
        good = [c for c in self.cases if not c.problems]
        bad = [c.case_id for c in self.cases if c.problems]
        if bad:
            cases = count_of(len(bad), "case has", "cases have")
            yield f"{cases} problems (left out by prepare, never trained on): {listed(bad)}."
        without = [c.case_id for c in good if not c.labelled]
        if without:
            cases = count_of(len(without), "case has", "cases have")
            yield f"{cases} no label (for segment; not trained on or scored): {listed(without)}."
        lacking = [c.case_id for c in good if len(c.modalities) < self.task.num_modalities]
        if lacking:
            cases = count_of(len(lacking), "case lacks", "cases lack")
            yield f"{cases} sequences (used with those that there are): {listed(lacking)}."

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # As wide as it needs to be: a name that is cut or folded is no name.
        table = self.table()
        needed = Measurement.get(console, options.update(max_width=_ENDLESS), table).maximum
        yield from console.render(table, options.update(width=max(needed, 1)))
        yield Text(self.summary(), no_wrap=True, overflow="ignore")


@checked
def inspect_cohort(
    root: Path | str,
    task: Task,
    layout: str | Path | Layout | None = None,
    labels: LabelNames | None = None,
    *,
    progress: bool = False,
) -> Inspection:
    """Read every file of a cohort and list what is there and what is wrong; nothing is changed.

    Layout and labels are those of :func:`~pmixseg.data.cohorts.layouts.find_cases`.

    Raises:
        InputError: the folder is missing or unreadable, or no layout fits.
    """
    cohort = search(root, task, layout, labels)
    console = Console(stderr=True)
    cases = track(cohort.cases, "inspecting", console=console, disable=not progress)
    odd = odd_ones_out(cohort.cases)
    facts = [_facts(case, task, odd) for case in cases]
    names = dict.fromkeys(case.layout for case in cohort.cases if case.layout)
    layouts = " and ".join(names)
    return Inspection(Path(root), layouts, task, facts, cohort.remarks)


def _facts(case: Case, task: Task, odd: Collection[str]) -> CaseFacts:
    modalities = tuple(m for m in task.modalities if m in case.images)
    if case.problem is not None:
        return CaseFacts(case.case_id, modalities, case.label is not None, problems=(case.problem,))
    reader = ScanReader(f"case '{case.case_id}'")
    problems: list[str] = []
    noted = partial(_noted, problems)
    files = CaseFiles(task, reader, partial(case.coding, task), noted=noted)
    scans = [(m, case.images[m]) for m in modalities]
    for role, source in [*scans, *([("label", case.label)] if case.label else [])]:
        with noted():
            files.add(role, source)
    # Together, as `prepare` would make them: does the case look like a patient's?
    notes: list[str] = []
    reference, labels = files.reference, files.labels
    if files.signals and not problems:
        verdict = judge(files.together(), task, odd_one_out=case.case_id in odd)
        problems += [verdict.refusal(reader.where)] if verdict.findings else []
        notes += [] if verdict.findings else verdict.notes(reader.where)
    return CaseFacts(
        case_id=case.case_id,
        modalities=modalities,
        labelled=case.label is not None and not (labels and labels.partly),
        shape=reference.geometry.source_shape if reference else None,
        spacing=reference.geometry.source_zooms if reference else None,
        orientation="".join(nib.aff2axcodes(reference.geometry.affine)) if reference else "",
        voxels=None if labels is None else _voxels(labels, task),
        ignored={} if labels is None else dict(labels.ignored),
        scans=tuple(digest for role, digest in reader.digests.items() if role != "label"),
        problems=tuple(problems),
        notes=tuple(notes),
    )


@contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Note why the input of a block is at fault, and go on after it."""
    try:
        yield
    except InputError as error:
        problems.append(str(error))


def _voxels(labels: LabelMap, task: Task) -> dict[str, int]:
    counts = np.bincount(labels.classes.ravel(), minlength=task.num_classes)
    return {name: int(counts[i + 1]) for i, name in enumerate(task.labels)}


def odd_ones_out(cases: Iterable[Case]) -> frozenset[str]:
    """Name cases none of whose scans says how it lies, where other cases of the cohort do.

    Some converters set ``qform_code`` and ``sform_code`` to 0. A reader then guesses, and beside
    cases that need no guess such a case may be mirrored or turned. Headers alone are read.
    """
    oriented = {case.case_id: _is_oriented(case) for case in cases if case.problem is None}
    silent = frozenset(name for name, known in oriented.items() if known is False)
    return silent if True in oriented.values() else frozenset()


def _is_oriented(case: Case) -> bool | None:
    """Say whether a scan says how it lies; ``None`` where no header can be read."""
    reader = ScanReader(f"case '{case.case_id}'")
    known = [frame.oriented for s in case.images.values() if (frame := reader.frame(s))]
    return any(known) if known else None
