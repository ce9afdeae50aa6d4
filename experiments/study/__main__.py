"""``python -m experiments.study``: analyse a study by its plan."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from experiments.study.analysis import analyse
from experiments.study.results import StudyResults
from pmixseg.errors import InputError

HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    tables = commands.add_parser("analyse", help="print the tables of a study")
    tables.add_argument("plan", type=Path)
    tables.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args(arguments)
    try:
        plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
        text = analyse(StudyResults.read(args.results / plan["name"]), plan["tables"])
        print(f"## {plan['title']}\n\n{text}")
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
