"""Find what is wrong in a settings file, and in which line."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pmixseg.argument_checks import nearest, takes_no
from pmixseg.cli.arguments import SETTINGS
from pmixseg.describe import constructor_arguments, find_class
from pmixseg.errors import InputError

_OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")
"""Keys of a setting that names a class."""


OURS = ("model", "data", "align", "distill")
"""Keys of a file whose classes write no files: what they name must be there."""

GROUPS: Mapping[str, Any] = {
    **dict.fromkeys(("trainer", "data"), dict),
    # A path of a further file stands for settings, too.
    **dict.fromkeys(("align", "distill", "data.task"), dict | str),
    **dict.fromkeys(("model.init_args.task", "model.init_args.evaluation.conventions"), dict | str),
}
"""Keys of a file that hold settings -> what may stand there."""

MAX_VALUES = 100_000
"""Values of a file, with all that its aliases repeat."""


ODD = re.compile(r"[-+]?0[0-7_]*[1-7][0-7_]*|[^:]+:.*")
"""Numbers to the base of 8, or of 60, in a notation that looks like another."""


class BadSettings(yaml.MarkedYAMLError):
    """YAML that is well formed, and cannot be meant: ``problem`` says why and what to do."""


def check_settings(text: str) -> None:
    """Refuse a key that stands twice in one mapping, aliases without an end, and odd numbers.

    YAML silently keeps the last of two keys, and reads 010 as 8 and 1:30 as 90.

    Raises:
        BadSettings: there is such a key, alias or number.
        yaml.YAMLError: the text is no YAML.

    Example:
        >>> check_settings("a: {b: 1, b: 2}")
        Traceback (most recent call last):
        ...
        pmixseg.cli.settings_files.BadSettings: the key 'b' stands twice; keep one of them
          in "<unicode string>", line 1, column 11:
            a: {b: 1, b: 2}
                      ^
    """
    root = yaml.compose(text, yaml.SafeLoader)
    if root is not None and _size(root, {}) > MAX_VALUES:
        problem = f"its aliases repeat more than {MAX_VALUES} values; write them out"
        raise BadSettings(problem=problem, problem_mark=root.start_mark)
    for mapping in _mappings(root):
        seen: set[str] = set()
        for key, _ in mapping.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key '{key.value}' stands twice; keep one of them"
                raise BadSettings(problem=problem, problem_mark=key.start_mark)
            seen.add(str(key.value))
    for node in _nodes(root):
        if node.tag.endswith((":int", ":float")) and ODD.fullmatch(str(node.value)):
            read = yaml.safe_load(node.value)
            problem = f"YAML reads {node.value} as {read}; write {read}, or '{node.value}' for text"
            raise BadSettings(problem=problem, problem_mark=node.start_mark)


def _size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Count the values of a node; those of an alias count each time that it is used."""
    if id(node) in sizes:
        known = sizes[id(node)]
        if known is None:  # its own parts are being counted
            problem = "an alias stands inside what it repeats; remove it"
            raise BadSettings(problem=problem, problem_mark=node.start_mark)
        return known
    sizes[id(node)] = None
    parts = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else []
    children = (part[1] if isinstance(part, tuple) else part for part in parts)
    sizes[id(node)] = total = 1 + sum(_size(child, sizes) for child in children)
    return total


def broken_file(path: Path | str, text: str | None = None) -> str | None:
    """Say why a file, or the text that a flag has as value, is no YAML or holds no settings."""
    # Is it text, YAML, and without keys that stand twice?
    try:
        text = Path(path).read_text(encoding="utf-8") if text is None else text
        check_settings(text)
        content = yaml.safe_load(text)
    except BadSettings as error:
        return f"{path}, line {_line(error.problem_mark)}: {error.problem}."
    except yaml.MarkedYAMLError as error:
        line = f", line {_line(error.problem_mark)}" if error.problem_mark else ""
        return f"{path}{line}: this is no YAML ({error.problem}); correct it."
    except RecursionError:
        return f"{path} is nested too deeply to be read; correct it."
    except (OSError, ValueError, yaml.YAMLError) as error:
        return f"{path} cannot be read ({' '.join(str(error).split())}); correct it."
    # Does it hold settings, where there must be some, and name files that there are?
    if not isinstance(content, dict):
        return f"{path} holds no settings, but a {type(content).__name__}; write `key: value`."
    for keys, kinds in GROUPS.items():
        value = _at(content, keys)
        if not isinstance(value, kinds):
            return (
                f"{path}: {keys.replace('init_args.', '')} is {value}, but must hold settings; "
                "write them below it, `key: value`, or remove it."
            )
    for value in _values(yaml.compose(text, yaml.SafeLoader), OURS):
        if value.value.endswith(SETTINGS) and not any(
            (base / value.value).is_file() for base in (Path(path).parent, Path())
        ):
            return (
                f"{path}, line {_line(value.start_mark)}: the file {value.value} does not exist; "
                "correct its path."
            )
    return None


def _at(content: Mapping[str, Any], keys: str) -> Any:
    """Return what stands at a dotted path of keys; an empty mapping where there is nothing."""
    value: Any = content
    for key in keys.split("."):
        value = value.get(key, {}) if isinstance(value, Mapping) else {}
    return value


def _values(root: yaml.Node | None, keys: Sequence[str]) -> Iterator[yaml.ScalarNode]:
    """Yield every text that stands in a mapping below one of the root's keys."""
    entries = root.value if isinstance(root, yaml.MappingNode) else []
    for mapping in (m for key, node in entries if key.value in keys for m in _mappings(node)):
        yield from (v for _, v in mapping.value if isinstance(v, yaml.ScalarNode))


def wrong_class(path: Path) -> str | None:
    """Return the first setting of a file that names a class in a wrong way, in a sentence."""
    for mapping in _mappings(yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)):
        entries = {key.value: (key, value) for key, value in mapping.value}
        if not {"class_path", "init_args"} & set(entries):
            continue
        for name, (key, _) in entries.items():
            if name not in _OF_A_CLASS:
                hint = nearest(name, _OF_A_CLASS) or "put the arguments of a class below init_args."
                return f"{path}, line {_line(key.start_mark)}: '{name}' is no key here; {hint}"
        if "class_path" in entries and (wrong := _wrong_argument(path, entries)):
            return wrong
    return None


def _wrong_argument(path: Path, entries: dict[str, tuple[Any, Any]]) -> str | None:
    key, named = entries["class_path"]
    class_path = str(named.value)
    if "." not in class_path:
        return None  # a name alone stands for a class of the kind that is needed there
    try:
        names = constructor_arguments(find_class(class_path))
    except InputError:
        module, _, name = class_path.rpartition(".")
        hint = nearest(name, _names_in(module)) or "correct it."
        return f"{path}, line {_line(key.start_mark)}: no class '{class_path}' is known; {hint}"
    arguments = entries["init_args"][1] if "init_args" in entries else None
    for key, _ in arguments.value if isinstance(arguments, yaml.MappingNode) else ():
        if key.value not in names:
            said = takes_no(class_path.rpartition(".")[2], key.value, names)
            return f"{path}, line {_line(key.start_mark)}: {said}"
    return None


def _names_in(module: str) -> list[str]:
    try:
        return dir(sys.modules.get(module) or find_class(module))
    except InputError:
        return []


def lacking_value(cls: Any, settings: Any, place: str) -> str | None:
    """Return the first argument that is null where its type knows none, with its place.

    Settings that name a class are looked into.
    """
    try:
        parameters = inspect.signature(cls).parameters
    except (TypeError, ValueError):
        return None
    for name, value in vars(settings).items():
        parameter = parameters.get(name)
        if value is None and parameter is not None and not _may_be_null(parameter):
            return f"{place}.{name}"
        # Then what the class of this argument, if it names one, is given itself.
        inner, path = getattr(value, "init_args", None), getattr(value, "class_path", None)
        if inner is not None and isinstance(path, str):
            try:
                lacking = lacking_value(find_class(path), inner, f"{place}.{name}")
            except InputError:
                continue  # whoever builds it says so
            if lacking is not None:
                return lacking
    return None


def _may_be_null(parameter: inspect.Parameter) -> bool:
    kind = str(parameter.annotation)
    untold = parameter.annotation is parameter.empty or parameter.default is None
    return untold or any(word in kind for word in ("None", "Optional", "Any"))


def _mappings(node: Any) -> Iterator[yaml.MappingNode]:
    """Yield every mapping below a node, once."""
    return (part for part in _nodes(node) if isinstance(part, yaml.MappingNode))


def _nodes(node: Any) -> Iterator[yaml.Node]:
    """Yield every node below one, once: an alias may lead back to it, or to many of them."""
    nodes, seen = [node], set()
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            nodes += reversed([value for _, value in node.value])
        elif isinstance(node, yaml.SequenceNode):
            nodes += reversed(node.value)


def _line(mark: Any) -> int:
    return int(mark.line) + 1
