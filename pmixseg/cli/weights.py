"""``pmixseg import`` and ``pmixseg export``: weights of published code in, models out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pmixseg.cli.commands import console, read_task
from pmixseg.files import not_among


def add_to(subparsers: Any) -> None:
    """Add both commands."""
    _import(subparsers)
    _export(subparsers)


def _import(subparsers: Any) -> None:
    parser = subparsers.add_parser("import", help="read a checkpoint of published code")
    parser.add_argument("kind", choices=("rfnet", "mmformer"), help="which code wrote it")
    parser.add_argument("file", type=Path, help="its .pth file")
    parser.add_argument("-o", "--out", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--task", type=Path, help="YAML file of a task; default BraTS")

    def run(args: argparse.Namespace) -> int:
        from pmixseg.inference.published_weights import DIFFERENCE, import_official

        not_among(args.out, [args.file])
        found = import_official(args.kind, args.file, read_task(args.task))
        path = found.save(args.out)
        trained = "" if found.epoch is None else f", trained for {found.epoch} epochs"
        console.print(f"{found.tensors} tensors of {args.kind}{trained}, now in {path}")
        if found.dropped:
            console.print(f"{len(found.dropped)} tensors left out, which the network never uses.")
        console.print(f"warning: {DIFFERENCE}", markup=False)
        return 0

    parser.set_defaults(run=run)


def _export(subparsers: Any) -> None:
    parser = subparsers.add_parser("export", help="write a model for other programs")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--format", choices=("torch", "onnx", "bundle"), default="torch")
    parser.add_argument("--combination", help="scans it will be given; default all of the model's")
    parser.add_argument("-o", "--out", type=Path, required=True, help="file, or folder of a bundle")

    def run(args: argparse.Namespace) -> int:
        from pmixseg.inference.export import export
        from pmixseg.modules import load

        made = export(load(args.checkpoint), args.out, args.format, args.combination)
        facts = made.facts
        console.print(
            f"{made.path}: {facts['combination']}, window {facts['window']}, research use only; "
            f"probabilities differ from the model's by at most {made.difference:.1g}"
        )
        if facts["temperature"] != 1:
            console.print(
                f"They are at temperature 1; the fitted one, {facts['temperature']:g}, belongs "
                "after the averaging of windows: softmax(log p / T)."
            )
        return 0

    parser.set_defaults(run=run)
