"""The commands about models: ``models``, ``publish``, ``import``, ``export``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from pmixseg.cli.commands import command, console, read_task
from pmixseg.errors import count_of
from pmixseg.files import not_among

MODEL = "a .ckpt file, or a name or address that `pmixseg models` tells of"


def add_to(subparsers: Any) -> None:
    """Add the commands."""
    for add in (_models, _publish, _import, _export):
        add(subparsers)


def _models(subparsers: Any) -> None:
    parser = command(subparsers, "models", "list the models that have a name")

    def run(args: argparse.Namespace) -> int:
        from pmixseg.weights import CATALOGUE

        for name, entry in CATALOGUE.items():
            console.print(f"{name}: {entry.title}", markup=False, soft_wrap=True)
            place = f"fetched from {entry.address}" if entry.address else entry.reading
            facts = (f"page {entry.page}", f"licence {entry.licence}", place, entry.citation)
            for fact in facts:
                console.print(f"    {fact}", markup=False, soft_wrap=True)
        console.print(
            "Where a MODEL is asked for, give a checkpoint, a published folder, one of these "
            "names, hf://owner/repository[@revision], or an https address.",
            soft_wrap=True,
        )
        return 0

    parser.set_defaults(run=run)


def _publish(subparsers: Any) -> None:
    does = "write a model for others: safetensors, JSON and a model card"
    parser = command(subparsers, "publish", does)
    parser.add_argument("checkpoint", help=MODEL)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--records", type=Path, help="run folder of its test, for the card")
    parser.add_argument("--title", default="", help="title of the model, in a line")
    parser.add_argument("--licence", default="other", help="licence of the weights, e.g. CC-BY-4.0")
    parser.add_argument("--data", default="not stated", help="what it was trained on")
    parser.add_argument("--citation", help="what to cite; default: the method's paper")
    parser.add_argument("--limits", default="", help="what it must not be used for")

    def run(args: argparse.Namespace) -> int:
        from pmixseg.inference.publish import Facts, publish

        facts = Facts(args.title, args.licence, args.data, limits=args.limits)
        if args.citation:
            facts = replace(facts, citation=args.citation)
        folder = publish(args.checkpoint, args.out, facts, args.records)
        console.print(f"{', '.join(sorted(p.name for p in folder.iterdir()))} in {folder}")
        return 0

    parser.set_defaults(run=run)


def _import(subparsers: Any) -> None:
    parser = command(subparsers, "import", "make a checkpoint from one of published code")
    parser.add_argument(
        "kind",
        choices=("rfnet", "mmformer", "pmixseg"),
        help="which code wrote it; pmixseg: a folder of `pmixseg publish`, its name or address",
    )
    parser.add_argument("file", help="its .pth file, or the published folder")
    parser.add_argument("-o", "--out", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--task", type=Path, help="YAML file of a task; default BraTS")

    def run(args: argparse.Namespace) -> int:
        from pmixseg.inference.published_weights import DIFFERENCE, import_official

        if args.kind == "pmixseg":
            from pmixseg.inference.publish import as_checkpoint

            console.print(f"Written: {as_checkpoint(args.file, args.out)}")
            return 0
        file = Path(args.file)
        not_among(args.out, [file])
        imported = import_official(args.kind, file, read_task(args.task))
        path = imported.save(args.out)
        trained = (
            "" if imported.epoch is None else f", trained for {count_of(imported.epoch, 'epoch')}"
        )
        console.print(f"{imported.tensors} tensors of {args.kind}{trained}, now in {path}")
        if imported.dropped:
            console.print(
                f"{len(imported.dropped)} tensors left out, which the network never uses."
            )
        console.print(f"warning: {DIFFERENCE}")
        return 0

    parser.set_defaults(run=run)


def _export(subparsers: Any) -> None:
    parser = command(subparsers, "export", "write a model for other programs")
    parser.add_argument("checkpoint", help=MODEL)
    formats = ("torch", "onnx", "bundle")
    parser.add_argument("--format", choices=formats, default="torch", help="kind of file")
    parser.add_argument("--combination", help="such as flair+t1; without it all of the model's")
    parser.add_argument("-o", "--out", type=Path, required=True, help="file, or folder of a bundle")

    def run(args: argparse.Namespace) -> int:
        from pmixseg.inference.export import export
        from pmixseg.modules import load

        module = load(args.checkpoint, modules=args.modules)
        made = export(module, args.out, args.format, args.combination)
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
