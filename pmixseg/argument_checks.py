"""Refuse an argument whose value is of another kind than its annotation, in one sentence.

Only plain annotations are read: numbers, texts, words, lists of them. What is more is left to the
class that takes it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from numbers import Integral, Real
from os import PathLike
from typing import Any

from pmixseg.errors import InputError


def checked(init: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor refuse, in a sentence, a value of another kind than its annotation.

    A :class:`~pmixseg.describe.Described` class does so without it.

    Args:
        init: ``__init__`` of a class; an argument whose annotation is more than numbers, texts,
            words and lists of them is left to the class.

    Example:
        >>> class Box:
        ...     @checked
        ...     def __init__(self, size: int, names: Sequence[str] | None = None) -> None: ...
        >>> Box("3")
        Traceback (most recent call last):
        ...
        pmixseg.errors.InputError: Box: size is '3'; give a whole number.
    """
    check = argument_check(init)

    @functools.wraps(init)
    def checking(self: Any, *args: Any, **kwargs: Any) -> None:
        check(self, args, kwargs)
        init(self, *args, **kwargs)

    return checking


def check_fields(made: Any) -> None:
    """Check what a dataclass was made of; for its ``__post_init__``.

    Args:
        made: the instance.

    Raises:
        InputError: a value of another kind than its annotation.
    """
    for field in fields(made):
        value, kinds = getattr(made, field.name), _kinds(str(field.type))
        if kinds and value is not field.default:
            _check_kind(type(made).__name__, field.name, value, kinds)


def argument_check(
    init: Callable[..., None],
) -> Callable[[Any, tuple[Any, ...], Mapping[str, Any]], None]:
    """Make a function that checks the arguments of a call of ``init``.

    Args:
        init: ``__init__`` of a class.

    Returns:
        A function of the instance, the positional arguments after it, and those by name.
    """
    parameters = dict(list(inspect.signature(init).parameters.items())[1:])
    choices = {name: _choices(str(p.annotation)) for name, p in parameters.items()}
    kinds = {name: _kinds(str(p.annotation)) for name, p in parameters.items()}

    def check(self: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for name, value in (*zip(parameters, args, strict=False), *kwargs.items()):
            _check_argument(type(self), name, value, choices.get(name))
            if kinds.get(name) and value is not parameters[name].default:
                _check_kind(type(self).__name__, name, value, kinds[name])

    return check


_KINDS: Mapping[str, tuple[Any, str]] = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "str": (str, "a text"),
    "bool": (bool, "true or false"),
    "Path": (PathLike, "a path"),
    "None": (type(None), "null"),
}
"""Annotation -> what it takes, and how a sentence says it."""


_PLAIN = (str, bytes, Real, type(None), list, tuple, set, Mapping)
"""Values that are judged."""


def _kinds(annotation: str) -> list[tuple[Any, str]]:
    """What an annotation takes; nothing where it takes more than plain values and lists of them.

    Example:
        >>> [words for _, words in _kinds('int | Literal["auto"] | None')]
        ['a whole number', 'a text', 'null']
        >>> _kinds("Backbone | None")
        []
    """
    kinds: list[tuple[Any, str]] = []
    for part in re.split(r"\s*\|\s*", annotation):
        if part in _KINDS:
            kinds.append(_KINDS[part])
        elif re.fullmatch(r"(Sequence|list|tuple)\[[\w, .]+\]", part):
            kinds.append((Collection, "a list"))
        elif re.fullmatch(r"Literal\[\"[^\]]*\"\]", part):
            kinds.append(_KINDS["str"])
        else:
            return []
    return kinds


def _check_kind(owner: str, name: str, value: Any, kinds: list[tuple[Any, str]]) -> None:
    if not isinstance(value, _PLAIN):  # an object may stand for its description
        return
    text = isinstance(value, str)
    for kind, _ in kinds:
        whole = kind is Integral and isinstance(value, Real) and float(value).is_integer()
        if whole or (isinstance(value, kind) and (kind is not Collection or not text)):
            return
    words = list(dict.fromkeys(words for _, words in kinds))
    raise InputError(f"{owner}: {name} is {value!r:.60}; give {' or '.join(words)}.")


def _choices(annotation: str) -> tuple[str, ...] | None:
    """List the words that an annotation allows; ``None`` where it allows any or none.

    Example:
        >>> _choices('Literal["zero", "anchor"] | None')
        ('zero', 'anchor')
        >>> _choices('str | Literal["auto"]')
    """
    tree = ast.walk(ast.parse(annotation, mode="eval")) if "Literal[" in annotation else ()
    nodes = list(tree)
    if any(isinstance(node, ast.Name) and node.id == "str" for node in nodes):
        return None
    words = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return tuple(words) or None


def _check_argument(cls: type[Any], name: str, value: Any, choices: tuple[str, ...] | None) -> None:
    """Refuse a word or number that an argument does not know, before anything is made of it."""
    owner = cls.__name__
    if isinstance(value, str) and choices is not None and value not in choices:
        raise InputError(f"{owner}: {name} is '{value}'; use {' or '.join(choices)}.")
    parts = value if isinstance(value, list | tuple) else (value,)
    numbers = [part for part in parts if isinstance(part, int | float)]
    if any(math.isnan(number) for number in numbers):
        raise InputError(f"{owner}: {name} is {value}; give a number.")
    every = (vars(base).get("ranges", {}) for base in cls.__mro__)
    known: Any = next((ranges[name] for ranges in every if name in ranges), None)
    if known is not None and not all(number in known for number in numbers):
        raise InputError(f"{owner}: {name} is {value}; give {known}.")
    if any(math.isinf(number) for number in numbers):
        raise InputError(f"{owner}: {name} is {value}; give a finite number.")
