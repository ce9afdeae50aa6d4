"""Read the words and the settings files of a training command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from pmixseg.cli.arguments import flag_name, with_guessed_split
from pmixseg.cli.commands import read_task
from pmixseg.cli.settings_files import check_settings
from pmixseg.old_paths import current_yaml

_load_yaml = get_loader("yaml")


def _read_settings(text: str) -> Any:
    """A file, or a value; classes may be named by paths of an earlier version."""
    check_settings(text)
    return with_guessed_split(current_yaml(_load_yaml(text)))


set_loader(
    "yaml",
    _read_settings,
    exceptions=(yaml.YAMLError,),
)


class TrainingParser(LightningArgumentParser):
    """Lightning's parser; it takes whole flags only, and leaves mistakes to be told by us."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "exit_on_error": False, "allow_abbrev": False})


def whole_numbers_first(hint: Any) -> Any:
    """Return a type hint that reads ``1`` as one batch and ``1.0`` as all of them.

    To Python ``float | int`` is ``int | float``, and ``Optional`` hands out whichever of the two
    the process has seen first; a parser tries them in the order in which they stand.

    Args:
        hint: of an argument.
    """
    kinds = list(get_args(hint))
    if get_origin(hint) is not Union or not {int, float} <= set(kinds):
        return hint
    first, second = sorted((kinds.index(int), kinds.index(float)))
    kinds[first], kinds[second] = int, float
    return Union[tuple(kinds)]  # noqa: UP007  # the kinds are known only here


def with_task(args: Sequence[str]) -> list[str]:
    """Put what a task's file holds in place of its name.

    The parser takes a name for a class first, and imports a module that has it.

    Raises:
        InputError: a file holds no task.
    """
    words = list(args)
    for index, word in enumerate(args):
        name, equals, value = word.partition("=")
        if flag_name(name) not in ("--data.task", "--model.task"):
            continue
        if not equals:
            value = args[index + 1] if index + 1 < len(args) else ""
        if Path(value).is_file():
            task = json.dumps(read_task(Path(value)).to_dict())
            words[index if equals else index + 1] = f"{name}={task}" if equals else task
    return words
