"""Refuse an argument whose value is of another kind than its annotation, in one sentence.

Only plain annotations are read: numbers, texts, words, lists and mappings of them, and classes.
What is more is left to whoever takes it.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from numbers import Integral, Real
from os import PathLike
from types import UnionType
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, Union, get_origin, get_type_hints

from pmixseg.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function or constructor refuse, in a sentence, a value of another kind.

    A :class:`~pmixseg.describe.Described` class does so without it.

    Args:
        function: its annotations say what is taken. An object may stand for an argument of a
            constructor, but not for one of another function.

    Example:
        >>> class Box:
        ...     @checked
        ...     def __init__(self, size: int, names: Sequence[str] | None = None) -> None: ...
        >>> Box("3")
        Traceback (most recent call last):
        ...
        pmixseg.errors.InputError: Box: size is '3'; give a whole number.
    """
    check = argument_check(function)
    bound = next(iter(inspect.signature(function).parameters), "") in _BOUND

    @functools.wraps(function)
    def checking(*args: P.args, **kwargs: P.kwargs) -> R:
        check(args[0] if bound and args else None, args[bound:], kwargs)
        return function(*args, **kwargs)

    return checking


_BOUND = ("self", "cls")


def check_fields(made: Any) -> None:
    """Check what a dataclass was made of; for its ``__post_init__``.

    Files give lists where fields are tuples, at any depth: they become tuples.

    Args:
        made: the instance. Its class may name in ``ranges`` what numbers its fields may be.

    Raises:
        InputError: a value of another kind than its annotation, or a number out of its range.
    """
    cls = type(made)
    for field in fields(made):
        kinds = _kinds_in(cls.__module__, str(field.type))
        value, given = getattr(made, field.name), getattr(made, field.name) is not field.default
        _check_argument(cls.__name__, cls.__mro__, field.name, value, kinds if given else ())
        object.__setattr__(made, field.name, _with_tuples(value, kinds))


def constructor_hints(cls: type) -> dict[str, Any]:
    """Return the types of what a class's constructor takes, and of what those of its bases take."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if init := vars(base).get("__init__"):
            with suppress(NameError, TypeError):  # names that only a type checker imports
                hints |= get_type_hints(init)
    return hints


def check_values(cls: type, arguments: Mapping[str, Any]) -> None:
    """Check arguments of another library's class, as far as its annotations say what they are."""
    names = {**sys.modules, **vars(sys.modules[cls.__module__])}
    for name, parameter in inspect.signature(cls).parameters.items():
        hint, value = parameter.annotation, arguments.get(name)
        if name in arguments and isinstance(value, _PLAIN):
            text = hint if isinstance(hint, str) else inspect.formatannotation(hint)
            _check_argument(cls.__name__, (), name, value, _kinds(text, names))


def argument_check(
    function: Callable[..., Any],
) -> Callable[[Any, tuple[Any, ...], Mapping[str, Any]], None]:
    """Make a function that checks calls of another: an ``__init__``, other method, or function.

    It takes the instance, the positional arguments after it, and those by name.
    """
    making = function.__name__ == "__init__"
    parameters = dict(inspect.signature(function).parameters)
    first = next(iter(parameters), "")
    if bound := first in _BOUND:
        del parameters[first]

    @functools.cache  # at the first call, when all names of the module exist
    def expected(name: str, classes: bool) -> list[Kind]:
        annotation = parameters[name].annotation if name in parameters else ""
        names = function.__globals__
        return _kinds(str(annotation), names if classes else _choices(names))

    def check(self: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        of = self if inspect.isclass(self) else type(self)
        method = f"{of.__name__}.{function.__name__}" if bound else function.__name__
        owner = of.__name__ if making else method
        classes = type(self).__mro__ if making else ()
        for name, value in (*zip(parameters, args, strict=False), *kwargs.items()):
            kinds, an_object = expected(name, not making), not isinstance(value, _PLAIN)
            # To a constructor an object may stand for its description, and a description for it.
            if making and an_object and not kinds and not inspect.isclass(value):
                kinds = expected(name, True)
            elif making and an_object and _KINDS["Path"] not in kinds:
                kinds = []
            given = kinds and value is not parameters[name].default
            _check_argument(owner, classes, name, value, kinds if given else ())

    return check


def _choices(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return names of a module that stand for a ``Literal`` or a union of kinds."""
    return {name: a for name, a in names.items() if get_origin(a) in (Literal, Union, UnionType)}


class Kind(NamedTuple):
    """One of the kinds of values that an annotation names.

    Args:
        types: of the values.
        words: how a sentence says it.
        inside: of a list or mapping, the kinds of what it holds; empty where that is not checked.
        keys: likewise, of a mapping.
        only: the one value that a ``Literal`` names.
        fixed: a tuple, which a file gives as a list.
        length: how many things a list holds; 0: any number.
    """

    types: Any
    words: str
    inside: tuple[Kind, ...] = ()
    keys: tuple[Kind, ...] = ()
    only: Any = None
    fixed: bool = False
    length: int = 0

    def takes(self, value: Any) -> bool:
        """Say whether a value is of this kind: 2.0 is a whole number, a text no list."""
        if isinstance(value, bool) and self.types in (Integral, Real):
            return False
        if self.types is Integral and isinstance(value, Real):
            return float(value).is_integer()
        if self.only is not None:
            return isinstance(value, self.types) and value == self.only
        if self.types in (Collection, Iterable) and isinstance(value, str | bytes):
            return False
        return isinstance(value, self.types) and (not self.length or len(value) == self.length)


_KINDS: Mapping[str, Kind] = {
    "int": Kind(Integral, "a whole number"),
    "float": Kind(Real, "a number"),
    "str": Kind(str, "a text"),
    "bool": Kind(bool, "true or false"),
    "Path": Kind(PathLike, "a path"),
    "None": Kind(type(None), "null"),
    "NoneType": Kind(type(None), "null"),
    "Any": Kind(object, "anything"),
}
"""Annotation -> what it takes."""

_CONTAINERS = {
    **dict.fromkeys(("Collection", "Sequence", "list"), Kind(Collection, "a list")),
    "tuple": Kind(Collection, "a list", fixed=True),
    "Iterable": Kind(Iterable, "a list"),
    **dict.fromkeys(("Mapping", "dict"), Kind(Mapping, "a mapping")),
}

_NAMED = {
    "Backbone": "a pmixseg.backbones.Backbone (EarlyFusion for a network of MONAI)",
    "Criterion": "a pmixseg.losses.Criterion (it may call a loss of torch or MONAI)",
    "Task": "a pmixseg.Task, such as pmixseg.BRATS",
    "SegmentSettings": "SegmentSettings(...)",
    "Tensor": "a tensor",
    "OptimizerCallable": "the class of an optimizer, or functools.partial(CLASS, lr=...)",
    "LRSchedulerCallable": "the class of a scheduler, or functools.partial(CLASS, ...)",
}
"""Class -> how a sentence asks for an object of it."""

_PLAIN = (str, bytes, Real, type(None), list, tuple, set, Mapping)
"""Values that are judged where an object may stand for its description."""


def _kinds(annotation: str, names: Mapping[str, Any] | None = None) -> list[Kind]:
    """Return what an annotation takes; nothing where it takes more than is known here.

    Example:
        >>> [kind.words for kind in _kinds('int | Literal["auto"] | None')]
        ['a whole number', 'auto', 'null']
        >>> _kinds("Backbone | None")
        []
    """
    try:
        return _kinds_of(ast.parse(annotation, mode="eval").body, names or {})
    except (SyntaxError, LookupError):
        return []


@functools.cache
def _kinds_in(module: str, annotation: str) -> list[Kind]:
    return _kinds(annotation, vars(sys.modules[module]))


def _kinds_of(node: ast.expr, names: Mapping[str, Any]) -> list[Kind]:
    """Return what a part of an annotation takes.

    Raises:
        LookupError: more than is known here.
    """
    if isinstance(node, ast.BinOp):  # X | Y
        return [*_kinds_of(node.left, names), *_kinds_of(node.right, names)]
    if isinstance(node, ast.Subscript):  # X[Y]
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _kinds_of_generic(ast.unparse(node.value).rpartition(".")[2], parts, names)
    return _kinds_of_name(ast.unparse(node), names)


def _kinds_of_generic(name: str, parts: Sequence[ast.expr], names: Mapping[str, Any]) -> list[Kind]:
    """Return what ``name[parts]`` takes."""
    if name == "Callable":
        return [Kind(Callable, "a function")]
    if name == "Literal":
        values = [part.value for part in parts if isinstance(part, ast.Constant)]
        return [Kind(type(value), str(value), only=value) for value in values]
    texts = [ast.unparse(part) for part in parts if ast.unparse(part) != "..."]
    kinds = [tuple(_kinds(text, names)) for text in texts]
    if name in ("Mapping", "dict"):
        if not all(kinds):
            raise LookupError(name)
        return [_CONTAINERS[name]._replace(keys=kinds[0], inside=kinds[1])]
    inside = [kind for several in kinds for kind in several] if all(kinds) else []
    if name == "Union" and inside:
        return inside
    made = _CONTAINERS[name]._replace(inside=tuple(inside))
    if not made.fixed or len(texts) < len(parts):  # tuple[X, ...]
        return [made]
    return [made._replace(length=len(parts), words=f"a list of {len(parts)}")]


def _kinds_of_name(text: str, names: Mapping[str, Any]) -> list[Kind]:
    """Return what a plain name takes: a class, or a name for another annotation."""
    first, *further = text.split(".")
    name = (first, *further)[-1]
    if name in _KINDS:
        return [_KINDS[name]]
    meant = functools.reduce(lambda owner, part: vars(owner)[part], further, names[first])
    if inspect.isclass(meant) and not getattr(meant, "_is_protocol", False):
        return [Kind(meant, _NAMED.get(name, f"an object of {name}"))]
    if inspect.isclass(meant) or not (other := _kinds(str(meant))):
        raise LookupError(name)
    return [kind._replace(words=_NAMED.get(name, kind.words)) for kind in other]


def _check_kind(
    owner: str, name: str, value: Any, kinds: Iterable[Kind], says: str = "is", where: str = ""
) -> None:
    kind = next((kind for kind in kinds if kind.takes(value)), None)
    if kind is None:
        words = " or ".join(dict.fromkeys(kind.words for kind in kinds))
        first, *more = repr(value).splitlines()
        what = f"{first:.60}{'...)' if more else ''}"
        raise InputError(f"{owner}: {name} {says} {what}; give {words}{where}.")
    # Whatever can be gone through once is left alone, and objects judge themselves.
    parts = value.values() if isinstance(value, Mapping) else value
    inside = [(part, kind.inside) for part in parts] if isinstance(parts, Collection) else []
    inside += [(key, kind.keys) for key in value] if isinstance(value, Mapping) else []
    for part, several in inside:
        if several and isinstance(part, _PLAIN):
            _check_kind(owner, name, part, several, "holds", " there")


def _with_tuples(value: Any, kinds: Iterable[Kind]) -> Any:
    """Return a value with tuples for the lists that stand for them."""
    kind = next((kind for kind in kinds if kind.takes(value)), None)
    if kind is not None and kind.types is not type(value):
        value = plain(value)
    if kind is None or not kind.inside:
        return value
    if isinstance(value, dict):
        return {key: _with_tuples(part, kind.inside) for key, part in value.items()}
    if kind.fixed and isinstance(value, list | tuple):
        return tuple(_with_tuples(part, kind.inside) for part in value)
    return value


def plain(value: Any) -> Any:
    """Return numbers and arrays of NumPy as Python's own numbers and lists.

    Example:
        >>> import numpy
        >>> plain([numpy.int64(1), numpy.arange(2)])
        [1, [0, 1]]
    """
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def _check_argument(
    owner: str, classes: Iterable[type[Any]], name: str, value: Any, kinds: Iterable[Kind]
) -> None:
    """Refuse a value that an argument does not take, before anything is made of it."""
    if kinds:
        _check_kind(owner, name, value, kinds)
    parts = value if isinstance(value, list | tuple) else (value,)
    numbers = [part for part in parts if isinstance(part, int | float)]
    if any(math.isnan(number) for number in numbers):
        raise InputError(f"{owner}: {name} is {value}; give a number.")
    every = (vars(base).get("ranges", {}) for base in classes)
    known: Any = next((ranges[name] for ranges in every if name in ranges), None)
    if known is not None and not all(number in known for number in numbers):
        raise InputError(f"{owner}: {name} is {value}; give {known}.")
    if any(math.isinf(number) for number in numbers):
        raise InputError(f"{owner}: {name} is {value}; give a finite number.")


def takes_no(owner: str, name: str, known: Sequence[str]) -> str:
    """Say that a class has no such argument, with the nearest that it has."""
    hint = nearest(name, known) or f"it takes {', '.join(known) or 'no arguments'}."
    return f"{owner} takes no '{name}'; {hint}"


def _longer(flag: str, known: Sequence[str]) -> list[str]:
    """Complete a flag of which only the end was written, as ``--optimizer.lr``."""
    word, dot, rest = flag.removeprefix("--").partition(".")
    if not flag.startswith("--"):
        return []
    word = {"lr_scheduler": "scheduler"}.get(word, word)  # as other programs of Lightning name it
    whole = [name for name in known if name.endswith(f".{word}.{rest}")]
    return whole or [name + dot + rest for name in known if name.endswith(f".{word}")]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean …?`` for a name that is nearly one of ``known``; else nothing.

    Example:
        >>> nearest("widht", ["width", "levels"])
        'did you mean width?'
        >>> nearest("--optimizer.lr", ["--model.optimizer", "--trainer.logger"])
        'did you mean --model.optimizer.lr?'
        >>> nearest("--lr_scheduler", ["--model.scheduler", "--trainer"])
        'did you mean --model.scheduler?'
    """
    names = sorted(set(known))
    close = [k for k in names if len(name) > 3 and k.startswith(name)]
    close = close or [k for k in names if k.lower() == name.lower()]
    close = close or _longer(name, names)
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else ""
