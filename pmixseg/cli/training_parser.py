"""Read the words and the settings files of a training command."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from pmixseg.cli.arguments import SETTINGS, flag_name, split_class
from pmixseg.cli.commands import read_task
from pmixseg.cli.settings_files import broken_file, check_settings
from pmixseg.errors import InputError
from pmixseg.old_paths import current_yaml

CHECKPOINT = "Checkpoint to read: a path, or last or best, those of --run; fit resumes it."
_load_yaml = get_loader("yaml")
# Words of Lightning that are objects, as of its Timer, are written as text.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, word: dumper.represent_data(word.value))


def _read_settings(text: str, folder: Path) -> Any:
    """Return a file, or a value; classes may be named by paths of an earlier version."""
    # Else there are no two keys, no alias, and no number that is read as another.
    if text.count(":") + text.count("?") > 1 or "*" in text or re.search(r"\b0\d|\d:\d", text):
        check_settings(text)
    try:
        content = _load_yaml(text)
    except (ValueError, RecursionError) as error:  # of PyYAML, for 0b or the 45th of a month
        raise yaml.YAMLError(str(error)) from error
    return with_named_files(current_yaml(content), folder)


def with_named_files(config: Any, folder: Path) -> Any:
    """Put what the files of a task and of a split hold in place of their names.

    A split without a class gets the one that its arguments are of. The config is changed. A file
    may also lie in ``folder``: the working folder is that of the settings while they are parsed.
    """
    for place, name in (
        (("data",), "task"),
        (("model", "init_args"), "task"),
        (("data",), "split"),
    ):
        settings = config
        for key in place:
            settings = settings.get(key) if isinstance(settings, dict) else None
        if isinstance(settings, dict) and settings.get(name):
            settings[name] = _content(name, settings[name], folder)
    return config


def _content(name: str, value: Any, folder: Path) -> Any:
    """Return what a task or a split is, given by its settings or by a file that holds them."""
    if isinstance(value, str):
        # Not Path.is_file, which fails where a text is too long to be a name.
        paths = [path for path in (Path(value), folder / value) if os.path.isfile(path)]  # noqa: PTH113  # see above
        if name == "task" and paths:
            return read_task(paths[0]).to_dict()
        if not paths or not value.endswith(SETTINGS):
            return value
        if broken := broken_file(paths[0]):
            raise InputError(broken)
        value = yaml.safe_load(paths[0].read_text(encoding="utf-8"))
    if name == "split" and isinstance(value, dict) and not {"class_path", "init_args"} & set(value):
        return {"class_path": split_class(value), "init_args": value}
    return value


class TrainingParser(LightningArgumentParser):
    """Lightning's parser; it takes whole flags only, and leaves mistakes to be told by us."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "exit_on_error": False, "allow_abbrev": False})
        read = functools.partial(_read_settings, folder=Path.cwd())
        set_loader("yaml", read, exceptions=(yaml.YAMLError,))

    def add_method_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add what a method of the Trainer takes, without a title from its docstring."""
        added: list[str] = super().add_method_arguments(*args, **{**kwargs, "as_group": False})
        for action in self._actions:
            if action.dest == "ckpt_path":
                action.help = CHECKPOINT
        return added


def whole_numbers_first(hint: Any) -> Any:
    """Return a type hint that reads ``1`` as one batch and ``1.0`` as all of them.

    To Python ``float | int`` is ``int | float``, and ``Optional`` hands out whichever of the two
    the process has seen first; a parser tries them in the order in which they stand.
    """
    kinds = list(get_args(hint))
    if get_origin(hint) is not Union or not {int, float} <= set(kinds):
        return hint
    first, second = sorted((kinds.index(int), kinds.index(float)))
    kinds[first], kinds[second] = int, float
    return Union[tuple(kinds)]  # noqa: UP007  # the kinds are known only here


def with_files(args: Sequence[str]) -> list[str]:
    """Put what the files of a task and of a split hold in place of their names.

    The parser takes a name for a class first, and imports a module that has it.
    """
    words = list(args)
    for index, word in enumerate(args):
        name, equals, value = word.partition("=")
        if flag_name(name) not in ("--data.task", "--model.task", "--data.split"):
            continue
        if not equals:
            value = args[index + 1] if index + 1 < len(args) else ""
        content = _content(name.rpartition(".")[2], value, Path.cwd()) if value else value
        if content != value:
            text = json.dumps(content)
            words[index if equals else index + 1] = f"{name}={text}" if equals else text
    return words
