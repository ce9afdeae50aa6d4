"""``pmixseg preprocess``: register raw scans and remove the skull, for a whole cohort."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pmixseg.cli.commands import bar, command, console, part_flag, read_task
from pmixseg.data.cohorts.shares import Share
from pmixseg.errors import count_of
from pmixseg.files import not_within


def add_to(subparsers: Any) -> None:
    """Add the command."""
    does = "register raw scans, bring them to atlas space and remove the skull"
    parser = command(subparsers, "preprocess", does)
    parser.add_argument("root", type=Path, help="cohort or case folder of raw scans")
    parser.add_argument("out", type=Path, help="folder of the result; prepare it next")
    parser.add_argument("--layout", help="name of a layout or YAML file with patterns")
    parser.add_argument("--task", type=Path, help="YAML file of a task; default BraTS")
    add_flags(parser)
    parser.add_argument("--workers", type=int, default=1, help="worker processes")
    part_flag(parser)

    def run(args: argparse.Namespace) -> int:
        from pmixseg.data.cohorts.layouts import find_cases
        from pmixseg.preprocess.cohort import preprocess_cohort

        not_within(args.out, args.root)
        share = Share.parse(args.part)
        task = read_task(args.task)
        cases = find_cases(args.root, task, layout=args.layout)
        if share is not None:
            cases = share.of(cases, lambda case: case.case_id)
        options = {"brain": args.brain, "atlas": args.atlas, "workers": args.workers}
        with bar("cases") as progress:
            done = list(preprocess_cohort(cases, args.out, **options, task=task, progress=progress))
        for case in sorted(done, key=lambda c: c.name):
            for note in case.notes:
                console.print(f"warning: case '{case.name}': {note}")
            if case.problem:
                console.print(f"problem: {case.problem}")
        failed = sum(case.problem is not None for case in done)
        console.print(f"{count_of(len(done) - failed, 'case')} in {args.out}, {failed} left out")
        return 1 if failed else 0

    parser.set_defaults(run=run)


def add_flags(parser: Any) -> None:
    """Add what ``preprocess`` and ``segment --raw`` share."""
    parser.add_argument(
        "--brain",
        default="atlas",
        metavar="HOW",
        help="brain mask: a NIfTI file on the grid of T1ce (else T1, T2 or FLAIR), 'atlas' (by "
        "registration; rough), or 'hd-bet' or 'synthstrip' where their command is installed",
    )
    parser.add_argument("--atlas", type=Path, help="a template without skull; default MNI152")
