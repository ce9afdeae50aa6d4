"""What a checkpoint may name: a file from elsewhere must not decide which code runs.

``weights_only=True`` keeps a checkpoint's pickle from running code. Its description of the model
names classes, which are imported and called; so these are checked, all of them, before the first
one is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pmixseg.describe import find_class
from pmixseg.errors import InputError

TRUSTED_PACKAGES = ("pmixseg", "monai", "torch")
"""Packages whose classes a checkpoint may name without being asked for with ``--import``."""

_named: list[str] = []


def trust(modules: Iterable[str]) -> None:
    """From now on trust these modules, and no others that were named before.

    The command line calls this with what follows ``--import``: it holds for every checkpoint that
    the command reads, a teacher's too.
    """
    _named[:] = modules


def trusted(modules: Iterable[str] = ()) -> tuple[str, ...]:
    """What a checkpoint may name classes of.

    Besides the packages, ``--import`` and ``modules`` that is ``__main__``: what a notebook or
    script defines was run by the same person.
    """
    return (*TRUSTED_PACKAGES, "__main__", *_named, *modules)


def check_description(value: Any, names: Iterable[str], where: str) -> None:
    """Refuse a description, at any depth, of what a checkpoint must not name.

    Nothing of it is made. Beside the class paths, text is refused where an object belongs:
    jsonargparse would take it for the path of a class, or of a file that names one.

    Args:
        value: a checkpoint's description of a model.
        names: see :func:`trusted`.
        where: how errors name the value.

    Raises:
        InputError: a class that is not trusted or no part of a model, or text for an object.
    """
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            check_description(item, names, f"{where}[{i}]")
    if not isinstance(value, Mapping):
        return
    for key, inner in value.items():
        check_description(inner, names, f"{where}.{key}")
        if "class_path" in str(key) and (key != "class_path" or not isinstance(inner, str)):
            raise _no_description(f"{where}.{key}", inner)
    if "class_path" in value:
        cls = find_class(value["class_path"], names)
        arguments = value.get("init_args") or {}
        if not isinstance(arguments, Mapping):
            raise _no_description(f"{where}.init_args", arguments)
        hints = _hints(cls)
        for name, inner in arguments.items():
            text = _is_text_for_an_object(inner, hints.get(name, Any))
            if text or not str(name).isidentifier():
                raise _no_description(f"{where}.{name}", inner)


def _no_description(where: str, found: Any) -> InputError:
    return InputError(
        f"the checkpoint says {found!r} for {where}, which describes no object; it was damaged or "
        "made to do harm, so do not use it."
    )


def _hints(cls: type) -> dict[str, Any]:
    """Types of the constructor's arguments, those of its bases after its own."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            try:
                found.update(get_type_hints(base.__init__))  # type: ignore[misc]  # only looked at
            except (NameError, TypeError):  # names that only a type checker imports
                continue
    return found


def _is_text_for_an_object(value: Any, hint: Any) -> bool:
    if not isinstance(value, str) or not _holds_objects(hint):
        return False
    return "." in value or str not in get_args(hint)  # such as "cpu" for a device or a name


def _holds_objects(hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return False
    if hint is type or origin in (type, Callable):
        return True
    if origin is not None:
        return any(_holds_objects(part) for part in get_args(hint))
    if not isinstance(hint, type):
        return False
    plain = hint.__module__ in ("builtins", "collections.abc", "typing", "pathlib")
    return not plain and not issubclass(hint, str | Enum)
