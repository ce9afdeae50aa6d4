"""Turn a mistake on the command line or in a YAML file into one sentence."""

from __future__ import annotations

import argparse
import inspect
import linecache
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn, get_args

import yaml

from pmixseg.argument_checks import constructor_hints, nearest, takes_no
from pmixseg.cli.arguments import config_files, flag_name, options
from pmixseg.cli.settings_files import broken_file, wrong_class
from pmixseg.describe import below, constructor_arguments, find_class
from pmixseg.errors import InputError
from pmixseg.interrupt import causes_of

_OF = r"given class_path '([^']+)':\s+"
"""What jsonargparse says before the reason why a class could not be made."""

LIBRARIES = ("lightning", "lightning_fabric", "jsonargparse", "torch.optim", "wandb")
"""Packages whose deliberate complaints are about what a person asked for."""


class UsageError(InputError):
    """A flag, an argument or a file's key that a command does not take."""


class Parser(argparse.ArgumentParser):
    """A parser of a plain command: whole flags only, and mistakes as one sentence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def format_help(self) -> str:
        """Return the help, with the default of every flag that has one."""
        for action in self._actions:
            none = action.default is False or action.default in (None, "", [], argparse.SUPPRESS)
            if not none and action.help and "default" not in action.help:
                action.help += "; default %(default)s"
        return super().format_help()

    def parse_known_args(  # type: ignore[override]  # its overloads say no more
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse; a flag that comes twice, of which argparse silently keeps the last, is refused."""
        names = [name for name, _ in options(args or ())]
        for action in self._actions:
            if sum(names.count(flag) for flag in action.option_strings) > 1 and not isinstance(
                action, argparse._AppendAction
            ):
                self.error(f"{action.option_strings[-1]} is given more than once")
        namespace, left = super().parse_known_args(args, namespace)
        return namespace, left

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage text."""
        raise UsageError(plain_sentence(message, self))


def plain_sentence(message: str, parser: argparse.ArgumentParser) -> str:
    """Say what argparse says, with the nearest name that it knows.

    Example:
        >>> parser = Parser(prog="pmixseg inspect")
        >>> _ = parser.add_argument("--layout")
        >>> print(plain_sentence("unrecognized arguments: --laout x", parser))
        pmixseg inspect takes no --laout; did you mean --layout?
    """
    helps = f"see `{parser.prog} --help`."
    if unknown := re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.DOTALL):
        flag = unknown[1].partition("=")[0]
        options = [name for action in parser._actions for name in action.option_strings]
        return f"{parser.prog} takes no {flag}; {nearest(flag, options) or helps}"
    if choice := re.fullmatch(
        r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)", message
    ):
        names = [name.strip(" '") for name in choice[3].split(",")]
        what = "command" if choice[1] == "COMMAND" else choice[1]
        return (
            f"'{choice[2]}' is no {what}; "
            f"{nearest(choice[2], names) or 'use one of ' + ', '.join(names) + '.'}"
        )
    if lacking := re.fullmatch(r"the following arguments are required: (.*)", message):
        return f"{parser.prog} needs {lacking[1]}; {helps}"
    return f"{parser.prog}: {message}; {helps}"


def training_sentence(message: str, args: Sequence[str], known: Iterable[str]) -> str:
    """Say what jsonargparse says of the flags and files of a training command.

    The message may name every type that was tried; ``known`` are the flags of the command.
    """
    for said in (_unread_file, _unknown_name, _number_of_values):
        if sentence := said(message, args, known):
            return sentence
    # A class that is named in a wrong way, or else a value of another kind.
    wrong = (wrong_class(path) for path in config_files(args))
    return next(filter(None, wrong), None) or _value_sentence(message, args)


def _unread_file(message: str, args: Sequence[str], known: Iterable[str]) -> str | None:
    """Say that a file of settings cannot be read."""
    if "Problems parsing config" in message or message.startswith("Unexpected config"):
        broken = (broken_file(path) for path in config_files(args))
        return next(filter(None, broken), None) or " ".join(message.split())
    if lost := re.search(r"File does not exist: '([^']+)'", message):
        return f"the file {lost[1]} does not exist; correct its path."
    return None


def _unknown_name(message: str, args: Sequence[str], known: Iterable[str]) -> str | None:
    """Say that a class, the command or a file does not know a name."""
    if inside := re.search(rf"{_OF}unrecognized arguments: --([\w.]+)", message):
        return _unknown_inside(inside[1], inside[2].split("."), _keys(message), args)
    if inside := re.search(rf"{_OF}Group '(\S+)' does not accept option '([^']+)'", message):
        own = [*inside[2].split("."), *inside[3].split(".")]
        return _unknown_inside(inside[1], own, [*_keys(message), *own], args)
    if unknown := re.search(r"unrecognized arguments: (\S+)", message):
        flag = unknown[1].partition("=")[0]
        if not flag.startswith("-"):
            return f"'{flag}' is no flag; flags begin with --, see `pmixseg {args[0]} --help`."
        hint = nearest(flag, known) or f"see `pmixseg {args[0]} --help`."
        return f"pmixseg {args[0]} takes no {flag}; {hint}"
    if unknown := re.search(r"does not accept option '([^']+)'", message):
        place, flag = where(unknown[1].split("."), args), f"--{unknown[1]}"
        hint = nearest(flag, known).replace("--", "")
        return f"{place}: {unknown[1]} is no setting; {hint or 'correct its name.'}"
    return None


def _number_of_values(message: str, args: Sequence[str], known: Iterable[str]) -> str | None:
    """Say that there is a value too many, or that one is lacking."""
    if bare := re.fullmatch(r"argument (\S+): ignored explicit argument '?(.*?)'?", message):
        return f"{bare[1]} takes no value; leave out {bare[2]}."
    if lacking := re.fullmatch(r"argument (\S+): expected (.*)", message):
        return f"{lacking[1]} needs {lacking[2].replace('argument', 'value')}; give it."
    if inside := re.search(rf"{_OF}the following arguments are required: (.*)", message):
        keys, kind = _keys(message), inside[1].rpartition(".")[2]
        first = ".".join([*keys, inside[2].partition(",")[0]])
        return f"{where(keys, args)}: {kind} needs {inside[2]}; give it, as by --{first}=VALUE."
    if lacking := re.search(r"the following arguments are required: (.*)", message):
        return f"pmixseg {args[0]} needs {lacking[1].replace(f'{args[0]}.', '--')}; give it."
    return None


def _keys(message: str) -> list[str]:
    """Return the keys of the setting that a message is about, the outermost first."""
    path = [key for key in re.findall(r'Parser key "([^"]+)"', message) if key != "config"]
    nested = re.findall(r"NestedArg\(key='([^']+)'", message)
    if nested and path:  # the outermost one is told last
        path = [path[0], *nested[-1].split(".")]
    elif "Unable to load config" in message:
        path.pop()  # it stands twice
    return ".".join(path).replace("init_args.", "").split(".")


def _unknown_inside(
    class_path: str, own: Sequence[str], keys: Sequence[str], args: Sequence[str]
) -> str:
    """Say that an argument which is a group of settings has no such key.

    ``own`` names the argument, and the key below it; ``keys`` the setting, the outermost first.
    """
    group: Any = find_class(class_path)
    for key in own[:-1]:
        hint = constructor_hints(group).get(key)
        kinds = [hint, *get_args(hint)]
        group = next((kind for kind in kinds if is_dataclass(kind)), type(None))
    known, kind = list(inspect.signature(group).parameters), group.__name__
    if list(keys[:2]) == ["model", "task"]:  # which is linked to that of the data
        keys = ["data", *keys[1:]]
    return f"{where(keys, args)}: {takes_no(kind, own[-1], known)}"


def _value_sentence(message: str, args: Sequence[str]) -> str:
    """Say what is wrong with the value of a setting; kinds of messages are tried in turn."""
    if lost := re.search(r'Parser key "config": Path (.*)', message):
        return f"--config: the path {lost[1]}; correct it."
    keys = _keys(message)
    kinds = (_no_file, _no_argument, _no_class, _no_subclass, _wrong_kind, _no_class_named)
    for sentence in kinds:
        if said := sentence(message, keys, args):
            return said
    # Whatever else jsonargparse says: its first line that is no frame around another.
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    frame = r"Parser key .*:$|Does not validate|Errors:|Subtypes:|Problem with|Expected an? <class"
    reasons = [line for line in lines if not re.match(frame, line)]
    return f"{where(keys, args)}: {' '.join((reasons or lines)[0].split())}; correct it."


def _no_file(message: str, keys: list[str], args: Sequence[str]) -> str | None:
    """Say that a text stands where settings belong: it was taken for the name of a file."""
    lost = re.search(r"Unable to load config '(.*?)'\s", message)
    if lost and os.path.isfile(lost[1]) and (broken := broken_file(lost[1])):  # noqa: PTH113  # a long text
        return broken
    return lost and (
        f"{subject(keys, args)} is {lost[1]}, which is no file; name a YAML file, or its "
        "settings one by one."
    )


def _no_argument(message: str, keys: list[str], args: Sequence[str]) -> str | None:
    """Say that a class takes no such argument."""
    refused = re.findall(r"class_path '([^']+)':\s+Option '([^']+)' is not accepted", message)
    if not refused:
        return None
    cls, name = refused[-1]
    path = keys if keys[-1] == name else [*keys, name]
    known = constructor_arguments(find_class(cls))
    return f"{where(path, args)}: {takes_no(cls.rpartition('.')[2], name, known)}"


def _no_class(message: str, keys: list[str], args: Sequence[str]) -> str | None:
    """Say that a name belongs to no class, unless a number could be meant as well."""
    names = re.findall(r"dot import path string: (\S+)", message)
    names += re.findall(r"given class_path '([^']+)':\s+(?:module .* has no|No module)", message)
    number = r"^( *)- Expected a <class '(?:int|float|bool)'>\n\1- Expected a dot import path"
    if not names or re.search(number, message, re.MULTILINE):
        return None
    classes = classes_for(message)
    if paths := sorted({f"{c.__module__}.{c.__name__}" for c in classes if c.__name__ == names[0]}):
        return f"{where(keys, args)}: several classes are a {names[0]}; name {' or '.join(paths)}."
    hint = nearest(names[0].rpartition(".")[2], [cls.__name__ for cls in classes])
    hint = hint or "name a class by its path, package.Class, and --import its module if need be"
    return f"{where(keys, args)}: no class '{names[0]}' is known; {hint.rstrip('.')}"


def _no_subclass(message: str, keys: list[str], args: Sequence[str]) -> str | None:
    """Say that a class is of another kind than the setting asks for."""
    other, value = re.search(r"does not correspond to a subclass of (\w+)", message), _got(message)
    if not other or value is None:
        return None
    base = re.search(rf"<class '([\w.]+\.{other[1]})'>", message)
    classes = below(find_class(base[1])) if base else iter(())
    fitting = ", ".join(cls.__name__ for cls in classes if not inspect.isabstract(cls))
    return f"{subject(keys, args)} is {value}, but must be a {other[1]}: {fitting}."


def _wrong_kind(message: str, keys: list[str], args: Sequence[str]) -> str | None:
    """Say which types a setting may have; inner types stand further to the right."""
    expected = re.findall(
        r"^( *)(?:- )?(?:Not a valid (?=subclass)|"
        r"Expected (?!an? path but|a dot import)(?:an? )?)(.+?)(?:\. Got value: .*)?$",
        message,
        re.MULTILINE,
    )
    value = _got(message)
    if not expected or value is None:
        return None
    deepest = max(len(space) for space, _ in expected)
    kinds = dict.fromkeys(words(kind) for space, kind in expected if len(space) == deepest)
    if "a number" in kinds:
        kinds.pop("a whole number", None)  # it is one as well
    several = sorted(kinds, key=lambda word: word == "null")  # last; the others in their order
    return f"{subject(keys, args)} is {value}, but must be {' or '.join(several)}."


def _no_class_named(message: str, keys: list[str], args: Sequence[str]) -> str | None:
    """Say that a setting belongs to a class that is not named."""
    abstract = r"Expected an instantiatable class, but \S+ is abstract"
    if not re.search(abstract, message) or not keys[1:]:
        return None
    flag = "--" + ".".join(keys[:-1])
    return f"{subject(keys, args)} belongs to a class that is not named; add {flag} CLASS."


def _got(message: str) -> str | None:
    """Return the value that a message complains of."""
    pattern = r"(?:Got|Given) value: (?!NestedArg)(.*?)(?:\. Got value: .*)?$"
    value = re.search(pattern, message, re.MULTILINE)
    return value and value[1]


_WORDS = {
    "NoneType": "null",
    "bool": "true or false",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "complex": "a number",
    **dict.fromkeys(("tuple", "list", "set", "Sequence", "Iterable"), "a list in brackets"),
    **dict.fromkeys(("dict", "Mapping"), "a mapping in braces"),
}
"""Types that a setting may have, as a person calls them."""


def words(kind: str) -> str:
    """Return a type in words.

    Example:
        >>> [words(k) for k in ("<class 'int'>", "typing.Literal['zero', 'anchor']")]
        ['a whole number', 'one of zero, anchor']
    """
    if literal := re.match(r"typing\.Literal\[(.*)\]", kind):
        return "one of " + literal[1].replace("'", "")
    if plain := re.match(r"<class '([^']+)'>", kind):
        name = plain[1].rpartition(".")[2]
        return _WORDS.get(name, name)
    if several := re.match(r"tuple with (\d+) elements", kind):
        return f"a list of {several[1]}"
    if below_it := re.match(r"subclass of (\w+)|instantiatable class, but (\S+) is abstract", kind):
        name = below_it[1] or below_it[2].rpartition(".")[2]
        return f"a {name}" if below_it[1] else f"a {name}, by its class_path"
    return kind


def classes_for(message: str) -> list[type]:
    """Return the classes that stand where the message says none is known."""
    bases = re.findall(r"([a-z_][\w.]*\.[A-Z]\w*)", message)
    classes: list[type] = []
    for path in dict.fromkeys([*bases, "torch.optim.Optimizer"]):
        try:
            base = find_class(path)
        except InputError:
            continue
        if inspect.isclass(base):
            classes += below(base)
    return classes


def where(keys: Sequence[str], args: Sequence[str]) -> str:
    """Return the flag, or the file and line, in which a setting is given."""
    flag = "--" + ".".join(keys)
    if any(flag_name(arg) == flag for arg in args):
        return flag
    for path in reversed(config_files(args)):
        line = line_of(path, keys)
        if line is not None:
            return f"{path}, line {line}"
    return flag


def subject(keys: Sequence[str], args: Sequence[str]) -> str:
    """Return a setting as the subject of a sentence: the flag, or the file, line and name."""
    place, flag = where(keys, args), "--" + ".".join(keys)
    return place if place == flag else f"{place}: {flag.removeprefix('--')}"


def line_of(path: Path, keys: Sequence[str]) -> int | None:
    """Find the line of a YAML file with the last of ``keys``, below those before it."""
    node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    line, left = None, list(keys)
    # A level at a time; `init_args` is a level of the file that no key names.
    while left and isinstance(node, yaml.MappingNode):
        entries = {key.value: (key, value) for key, value in node.value}
        for name in (left[0], "init_args"):
            if name in entries:
                key, node = entries[name]
                break
        else:
            return line if len(left) < len(keys) else None
        if name == left[0]:
            line = key.start_mark.line + 1
            left.pop(0)
    return line


def complaint(error: BaseException) -> InputError | None:
    """Return a library's deliberate complaint about what a person asked for, as a sentence.

    It is deliberate where the library's own code raises it; an error that only passes through the
    library is a fault of the program, and ``None`` is returned.
    """
    if type(error).__module__ == "pydantic_core._pydantic_core":  # of wandb's settings
        lines = [line.partition(" [type=")[0].strip() for line in str(error).splitlines()[1:3]]
        return InputError(f"Wandb refuses: {': '.join(lines)}; correct it, or its WANDB_ variable.")
    *_, (frame, number) = walk_tb(error.__traceback__)
    module = str(frame.f_globals.get("__name__", ""))
    if module == "torch.optim.lr_scheduler" and isinstance(error, ArithmeticError | TypeError):
        schedule = type(frame.f_locals.get("self")).__name__
        return InputError(f"{schedule} cannot be used ({error}); correct its arguments.")
    line = linecache.getline(frame.f_code.co_filename, number)
    ours = not any(module == name or module.startswith(f"{name}.") for name in LIBRARIES)
    if ours or not line.strip().startswith("raise"):
        return None
    library = module.partition(".")[0].capitalize()
    # jsonargparse wraps the reason in all types that it tried.
    *_, reason = causes_of(error) if library == "Jsonargparse" else [error]
    return InputError(f"{library} refuses: {' '.join(str(reason).split())}")
