"""The plain commands: each reads its flags, calls the package once and returns an exit code."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pmixseg.cli.arguments import parted
from pmixseg.data.cohorts.shares import Share
from pmixseg.errors import InputError, count_of, first_line
from pmixseg.files import not_among
from pmixseg.task import BRATS, Task
from pmixseg.workers import start_server

console = Console(highlight=False, markup=False, soft_wrap=True)
"""Names are printed as they are: no part of one is taken for a style, and none is cut in two."""

TRAINING = {
    "fit": "train a teacher or a student",
    "validate": "score a checkpoint on validation cases",
    "test": "score a checkpoint on every combination of sequences",
    "predict": "segment a cohort and write NIfTI",
}
"""What each of Lightning's commands does."""


def command(subparsers: Any, name: str, does: str) -> Any:
    """Add a command, described by one sentence in the list of commands and in its own help."""
    return subparsers.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")


def add_to(subparsers: Any) -> None:
    """Add every plain command."""
    for add in (_quickstart, _phantom, _inspect, _prepare, _report, _compare):
        add(subparsers)


def _quickstart(subparsers: Any) -> None:
    does = "go the whole way in minutes: synthetic cohort, training, test and report"
    parser = command(subparsers, "quickstart", does)
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder to work in")
    parser.add_argument("--data", type=Path, help="a cohort of your own instead of the phantom")
    parser.add_argument("--seed", type=int, default=0, help="seed of patients and weights")

    def run(args: argparse.Namespace) -> int:
        start_server(["pmixseg.quickstart"])  # which takes seconds to import, here and there
        from pmixseg.quickstart import quickstart

        quickstart(args.out, args.data, args.seed)
        return 0

    parser.set_defaults(run=run)


def _phantom(subparsers: Any) -> None:
    parser = command(subparsers, "phantom", "write a synthetic glioma cohort like BraTS 2018")
    parser.add_argument("out", type=Path, help="folder of the cohort")
    parser.add_argument("--cases", type=int, default=40, help="number of cases")
    parser.add_argument("--seed", type=int, default=0, help="seed of the patients")
    parser.add_argument("--spacing", type=float, default=3.0, help="voxel size in mm, 1 to 6")
    parser.add_argument("--private-signal", type=float, help="signal of one modality only, 0 to 1")
    parser.add_argument("--dependence", type=float, help="dependence between modalities, 0 to 1")
    parser.add_argument("--task", type=Path, help="YAML file of a task whose sequences are made")
    parser.add_argument(
        "--labels",
        nargs="+",
        default=[],
        metavar="LABEL=TISSUE",
        help="which tissue (NCR, ED or ET) is which label of the task; spaces or commas between",
    )
    parser.add_argument("--contrasts", type=Path, help="YAML file of contrasts for new sequences")
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument(
        "--dicom", type=Path, metavar="FOLDER", help="also write each case as a DICOM study there"
    )

    def run(args: argparse.Namespace) -> int:
        from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
        from pmixseg.data.phantom.contrast import Scanner
        from pmixseg.data.phantom.task import label_codes, read_contrasts, write_layout

        task = read_task(args.task)
        codes = label_codes(task, dict(text.partition("=")[::2] for text in parted(args.labels)))
        names = ("private_signal", "dependence")
        knobs = {k: v for k in names if (v := getattr(args, k)) is not None}
        settings = PhantomSettings(
            spacing=args.spacing,
            modalities=task.modalities,
            contrasts=read_contrasts(args.contrasts),
            scanner=Scanner(**knobs),
        )
        with bar("phantom cases") as report:
            made = write_cohort(
                args.out, args.cases, args.seed, settings, args.workers, progress=report
            )
        cases = count_of(len(made), "synthetic case")
        console.print(f"{cases} in {args.out}: no patient, research use only.")
        if args.dicom is not None:
            _write_studies(args.out, args.dicom, task)
        if args.task is not None:
            layout = write_layout(args.out, task, codes)
            console.print(f"prepare them with --task {args.task} --layout {layout}")
        return 0

    parser.set_defaults(run=run)


def _write_studies(root: Path, folder: Path, task: Task) -> None:
    from pmixseg.data.cohorts.layouts import find_cases
    from pmixseg.dicom.example import write_study

    cases = find_cases(root, task)
    for case in cases:
        write_study(folder / case.case_id, {m: Path(str(f)) for m, f in case.images.items()})
    console.print(f"{count_of(len(cases), 'DICOM study', 'DICOM studies')} in {folder}")


def _inspect(subparsers: Any) -> None:
    parser = command(subparsers, "inspect", "list a cohort's cases and problems; changes nothing")
    _cohort_flags(parser)

    def run(args: argparse.Namespace) -> int:
        from pmixseg.data.cohorts.inspection import inspect_cohort

        task = read_task(args.task)
        inspection = inspect_cohort(
            args.root,
            task,
            layout=args.layout,
            labels=label_names(args.labels),
            progress=console.is_terminal,
        )
        console.print(inspection)
        return 1 if inspection.problems else 0

    parser.set_defaults(run=run)


def _prepare(subparsers: Any) -> None:
    parser = command(subparsers, "prepare", "write the store of a cohort for training; resumable")
    _cohort_flags(parser)
    parser.add_argument("store", type=Path, help="folder to write; the cohort stays as it is")
    voxels = "voxel size to resample to; without it each scan keeps its own"
    parser.add_argument("--spacing", type=float, nargs=3, metavar="MM", help=voxels)
    dtypes = ("float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, default="float16", help="number type to store")
    parser.add_argument(
        "--normalisation",
        default="zscore-own-mask",
        help="how intensities are scaled; zscore-joint-mask is for imported RFNet and mmFormer",
    )
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    part_flag(parser)
    parser.add_argument(
        "--prune",
        action="store_true",
        help="remove cases from the store that are not under ROOT and whose files are gone",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="keep cases that look implausible (inspect lists them) instead of leaving them out",
    )

    def run(args: argparse.Namespace) -> int:
        from pmixseg.data.cohorts.layouts import search
        from pmixseg.data.store.prepare import prepare

        task = read_task(args.task)
        cohort = search(args.root, task, args.layout, label_names(args.labels))
        spacing = None if args.spacing is None else tuple(args.spacing)
        report = prepare(
            cohort.cases,
            args.store,
            task,
            spacing=spacing,
            dtype=args.dtype,
            workers=args.workers,
            prune=args.prune,
            force=args.force,
            share=Share.parse(args.part),
            normalisation=args.normalisation,
        )
        report.cohort = (*cohort.remarks, *report.cohort)
        console.print(report.summary())
        return 1 if report.failed else 0

    parser.set_defaults(run=run)


def _report(subparsers: Any) -> None:
    parser = command(subparsers, "report", "write a page about tested runs: tables and figures")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs that were tested")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"), help="the page")
    parser.add_argument("--no-images", action="store_true", help="leave out pictures of scans")

    def run(args: argparse.Namespace) -> int:
        from pmixseg.evaluation.report.page import write_report

        console.print(f"Written: {write_report(args.runs, args.out, images=not args.no_images)}")
        return 0

    parser.set_defaults(run=run)


def _compare(subparsers: Any) -> None:
    parser = command(subparsers, "compare", "compare two methods over runs with the same seeds")
    for side, which in (("--a", "one"), ("--b", "the other")):
        about = f"run folders of {which} method, one per seed"
        parser.add_argument(side, type=Path, nargs="+", required=True, metavar="RUN", help=about)
    parser.add_argument(
        "--measure", default="dice", help="exploratory measure; the primary endpoint is Dice"
    )
    parser.add_argument("-o", "--out", type=Path, help="also write everything as JSON")

    def run(args: argparse.Namespace) -> int:
        from pmixseg.data.formats.outputs import write_json
        from pmixseg.evaluation.comparison.compare import compare, matching_notes, paired_by_seed
        from pmixseg.evaluation.records.records import find_records, read_comparable

        if args.out is not None:
            tables = [find_records(run) for run in (*args.a, *args.b)]
            not_among(args.out, [*tables, *(t.with_suffix(".json") for t in tables)])
        runs = read_comparable([*args.a, *args.b])
        a = runs[: len(args.a)]
        b = paired_by_seed(a, runs[len(args.a) :])
        notes = matching_notes(a, b)
        comparison = compare([r.table for r in a], [r.table for r in b], args.measure, notes)
        console.print(comparison.to_text(max(80, console.width)))
        if args.out is not None:
            write_json(args.out, comparison.to_dict())
            console.print(f"Written: {args.out}")
        return 0

    parser.set_defaults(run=run)


def _cohort_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", type=Path, help="folder of the cohort")
    parser.add_argument("--layout", help="name of a layout or YAML file with patterns")
    parser.add_argument("--task", type=Path, help="YAML file of a task; default BraTS")
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL=NAME",
        help="what a label is called in dataset.json, or its number: NCR=necrosis ED=2 ET=3,4; "
        "spaces or commas between them",
    )


def part_flag(parser: Any) -> None:
    """Add ``--part``, which :meth:`~pmixseg.data.cohorts.shares.Share.parse` reads."""
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="do only the I-th of N parts of the cohort; jobs for all parts may run at once",
    )


def label_names(pairs: list[str] | None) -> dict[str, str | int | list[str | int]] | None:
    """Read ``LABEL=NAME`` and ``LABEL=1,3``.

    Example:
        >>> label_names(["NCR=necrosis,ET=3,4"])
        {'NCR': ['necrosis'], 'ET': ['3', '4']}
    """
    if pairs is None:
        return None
    pairs = parted(pairs)
    odd = [text for text in pairs if not all(text.partition("=")[::2])]
    if odd:
        raise InputError(f"--labels {odd[0]} is not of the form LABEL=NAME or LABEL=NUMBER.")
    return {k: [*v.split(",")] for k, _, v in (text.partition("=") for text in pairs)}


def read_task(path: Path | None) -> Task:
    """Return a task from a YAML file; BraTS without one."""
    if path is None:
        return BRATS
    import yaml

    from pmixseg.cli.settings_files import check_settings

    try:
        text = path.read_text(encoding="utf-8")
        check_settings(text)
        raw = yaml.safe_load(text)
        return Task.from_dict(raw.get("task", raw))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (OSError, ValueError, yaml.YAMLError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a task ({error}); give name, modalities, labels and regions."
        ) from error


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Return a progress bar with time left; call it with (done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        shown = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(shown, completed=done, total=total)


def device_of(name: str) -> str:
    """Choose the device: ``auto`` is a CUDA device if there is one, else the CPU."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device {name}: not available here ({first_line(error)}); use cpu."
        ) from error
    return name
