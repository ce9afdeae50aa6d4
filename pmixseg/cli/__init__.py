"""The command line: Lightning's ``fit`` to ``predict``, and the plain commands beside them."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pmixseg.cli import commands, preprocess, segment, weights
from pmixseg.cli.arguments import take_out
from pmixseg.cli.commands import TRAINING
from pmixseg.cli.mistakes import Parser, UsageError, complaint
from pmixseg.errors import InputError, disk_error, explained, memory_error, restoring_error
from pmixseg.interrupt import causes_of, raise_on_interrupt, report_stop, stopping_code
from pmixseg.version import __version__

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Environment variables that tell a process its place among several."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: what follows ``pmixseg`` on the command line; by default the process's own.

    Returns:
        0 if all went well, 1 if the input, a path or the disk is at fault (one sentence on
        stderr), 130 after Ctrl-C, 143 after SIGTERM.
        2 if a flag is wrong.
    """
    words = list(sys.argv[1:] if args is None else args)
    print_anything()
    try:
        check_ranks(os.environ)
        check_folder()
        check_words(words)
        words, modules = import_modules(words)
        if words and words[0] in TRAINING:
            from pmixseg.cli.training import TrainingCLI  # Lightning takes seconds to import

            TrainingCLI(words, modules)
            return 0
        if words and words[0] == segment.NAME:  # its flags depend on the checkpoint
            return segment.run(words[1:], modules)
        return run_plain(words, modules)
    except BaseException as error:
        if code := stopping_code(error):
            return report_stop(code)
        cause = cause_of(error, words)
        if cause is None:
            raise
        line = re.sub(r"\s*\n\s*", " ", str(cause))  # libraries break theirs
        print(f"pmixseg: {line}", file=sys.stderr)  # noqa: T201  # the command line's own output
        return 2 if isinstance(cause, UsageError) else 1


def cause_of(error: BaseException, words: Sequence[str]) -> InputError | None:
    """Say in a sentence why a command failed; ``None`` where the program is at fault."""
    if isinstance(error, SystemExit):
        return None
    cause = input_error(error) or memory_error(error) or disk_error(error)
    if cause is None and isinstance(error, UnicodeDecodeError):
        cause = no_text(words)
    if cause is None and isinstance(error, Exception):
        cause = complaint(error) or restoring_error(error)
    return cause


def check_ranks(environment: Mapping[str, str]) -> None:
    """Refuse a number of a process that is none; Lightning and torch fail on it as they import.

    Example:
        >>> check_ranks({"RANK": "0", "HOME": "/"})
        >>> check_ranks({"RANK": "first"})
        Traceback (most recent call last):
        ...
        pmixseg.errors.InputError: the environment variable RANK is 'first', but must be 0 or more; correct or unset it.
    """  # noqa: E501  # the sentence is what is shown
    for name in RANKS:
        value = environment.get(name)
        if value is not None and not value.strip().isdecimal():
            raise InputError(
                f"the environment variable {name} is '{value}', but must be 0 or more; correct or "
                "unset it."
            )


def check_words(words: Sequence[str]) -> None:
    """Refuse an empty word: as a path it would be the working folder, which nobody has named.

    Example:
        >>> check_words(["phantom", "."])
        >>> check_words(["fit", "--data.store="])
        Traceback (most recent call last):
        ...
        pmixseg.cli.mistakes.UsageError: --data.store is empty, as of a shell variable that is not set; give it a value.
    """  # noqa: E501  # the sentence is what is shown
    for place, word in enumerate(words):
        if not word:
            before = words[place - 1] if place else ""
            name = before if before.startswith("-") else f"argument {place + 1}"
        elif word.startswith("--") and word.endswith("=") and word.count("=") == 1:
            name = word[:-1]
        else:
            continue
        raise UsageError(
            f"{name} is empty, as of a shell variable that is not set; give it a value."
        )


def check_folder() -> None:
    """Refuse a working folder that somebody removed; torch ends the process as it is imported."""
    with explained("the working folder is gone", "change to another one", OSError):
        Path.cwd()


def print_anything() -> None:
    """Let output that is not UTF-8 (a pipe of Windows, ``LC_ALL=C``) show ``?`` where it must."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        ascii_only = stream.errors == "surrogateescape" and stream.encoding.lower() != "utf-8"
        if stream.errors == "strict" or ascii_only:  # the second is Python's choice in the C locale
            stream.reconfigure(errors="replace")


def input_error(error: BaseException | None) -> InputError | None:
    """Return the :class:`InputError` that an error is, or was raised from.

    jsonargparse wraps what a constructor says in the types that it tried.
    """
    return next((cause for cause in causes_of(error) if isinstance(cause, InputError)), None)


def no_text(args: Sequence[str]) -> InputError | None:
    """Find a YAML file among the arguments that is no UTF-8, which jsonargparse does not say."""
    for arg in args:
        path = Path(arg.partition("=")[2] or arg)
        if path.suffix in (".yaml", ".yml", ".json") and path.is_file():
            try:
                path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                return InputError(f"{path} is no text in UTF-8 ({error}); save it as such.")
    return None


def import_modules(args: list[str]) -> tuple[list[str], list[str]]:
    """Take ``--import MODULE`` out of the arguments, and import the modules.

    The other arguments are returned with the modules' names: a checkpoint may use their classes.
    """
    names, left = take_out(args, "--import")
    for name in names:
        try:
            sys.path.insert(0, "")
            importlib.import_module(name)
        except (ImportError, ValueError) as error:
            raise InputError(f"--import {name}: cannot be imported ({error}).") from error
        finally:
            sys.path.remove("")
    return left, names


def run_plain(args: Sequence[str], modules: Sequence[str] = ()) -> int:
    """Parse and run a command that is not Lightning's."""
    chosen = parse_plain(args, modules)
    raise_on_interrupt()
    code: int = chosen.run(chosen)
    return code


def parse_plain(args: Sequence[str], modules: Sequence[str] = ()) -> argparse.Namespace:
    """Parse a command that is not Lightning's."""
    parser = Parser(
        prog="pmixseg",
        description="Brain-tumour segmentation when MRI sequences are missing. Research use only.",
        epilog="`pmixseg COMMAND --help` explains a command. "
        "Every command takes --import MODULE for classes of your own.",
    )
    parser.add_argument("--version", action="version", version=f"pmixseg {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in TRAINING.items():
        subparsers.add_parser(name, help=text, add_help=False)
    commands.add_to(subparsers)
    subparsers.add_parser(segment.NAME, help=segment.HELP, add_help=False)
    preprocess.add_to(subparsers)
    weights.add_to(subparsers)
    chosen, unknown = parser.parse_known_args(args, argparse.Namespace(modules=modules))
    if unknown:  # told by the command's own parser, which knows what is near
        subparsers.choices[chosen.command].error(f"unrecognized arguments: {unknown[0]}")
    return chosen
