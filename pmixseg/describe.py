"""Objects that remember their constructor arguments, so that a checkpoint can rebuild them.

A checkpoint may hold primitives only (it is read with ``weights_only=True``). So an object that
belongs to a model is written as ``{"class_path": ..., "init_args": {...}}``, the notation of
jsonargparse and of every YAML file here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pmixseg.argument_checks import argument_check, plain, takes_no
from pmixseg.errors import InputError
from pmixseg.old_paths import current_path


class Range(NamedTuple):
    """The numbers that an argument may be.

    Args:
        least: the smallest of them.
        greatest: the largest.
        open: the smallest itself is none of them.
        below: the largest itself is none of them.

    Example:
        >>> 0 in POSITIVE, str(POSITIVE), str(Range(1)), str(Range(0, 1)), str(SHARE)
        (False, 'a number above 0', '1 or more', '0 to 1', '0 or more, below 1')
    """

    least: float
    greatest: float = math.inf
    open: bool = False
    below: bool = False

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int | float):
            return False
        edges = (self.open and number == self.least) or (self.below and number == self.greatest)
        return self.least <= number <= self.greatest and not edges

    def __str__(self) -> str:
        if self.open:
            return f"a number above {self.least:g}"
        above = f"{self.least:g} or more"
        if self.below:
            return f"{above}, below {self.greatest:g}"
        return above if self.greatest == math.inf else f"{self.least:g} to {self.greatest:g}"


POSITIVE = Range(0, open=True)
NOT_NEGATIVE = Range(0)
COUNT = Range(1)
SHARE = Range(0, 1, below=True)
FRACTION = Range(0, 1)

Ranges = dict[str, Range]
"""Argument -> what it may be, as in ``Ranges(width=COUNT, dropout=Range(0, 1))``."""


class Described:
    """Base of classes whose instances remember their constructor's arguments.

    A class names in ``ranges`` what numbers its arguments may be; every number must be finite. One
    out of its range, or a value of another kind than the annotation's, is an ``InputError``; the
    classes do not say so again.

    Example:
        >>> class Ball(Described):
        ...     def __init__(self, size: int = 1) -> None: ...
        >>> Ball(2).init_args
        {'size': 2}
    """

    ranges: ClassVar[Mapping[str, Range]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _remembering(cls.__init__)  # type: ignore[method-assign]  # same signature

    @property
    def init_args(self) -> dict[str, Any]:
        """Arguments of the outermost constructor by name, or what their attributes are now."""
        given = self.__dict__.get("_init_args", {})  # a class without __init__ has none
        return {**given, **self._changed()}

    def _changed(self) -> dict[str, Any]:
        """Return attributes named as arguments that are not what the constructor made."""
        made = self.__dict__.get("_as_made", {})
        now = _attributes(self, made).items()
        other = {
            n for n, v in now if v is not made[n] or (isinstance(v, Described) and v._changed())
        }
        return {name: value for name, value in now if name in other}

    def check_changes(self) -> None:
        """Refuse attributes that were changed to what the constructor would have refused."""
        changed = self._changed()
        for base in type(self).__mro__:
            if check := getattr(vars(base).get("__init__"), "check", None):
                check(self, (), changed)

    def remember(self, **arguments: Any) -> None:
        """Put what an argument was made into in place of the argument as it was given.

        Arguments that the constructor does not take are left out.
        """
        known = self.__dict__.get("_init_args", {})
        taken = {*known, *constructor_arguments(type(self))}
        known.update({k: v for k, v in arguments.items() if k in taken})
        self.settle(*arguments)

    def settle(self, *attributes: str) -> None:
        """Take attributes, as they are now, for what the arguments have made."""
        if "_as_made" in self.__dict__:
            self.__dict__["_as_made"] |= _attributes(self, attributes)


def constructor_arguments(cls: Any) -> list[str]:
    """Return names of what a class's constructor takes, those that it hands on included."""
    names: dict[str, None] = {}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for base in getattr(cls, "__mro__", ()):
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            names |= {p.name: None for p in parameters if p.kind in by_name and p.name != "self"}
            if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
                break
    return list(names)


def _remembering(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)
    check = argument_check(init)

    @functools.wraps(init)
    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = plain(args), {name: plain(value) for name, value in kwargs.items()}
        outermost = "_init_args" not in self.__dict__
        if outermost:
            try:
                bound = signature.bind(self, *args, **kwargs)
            except TypeError as error:
                _refuse_unknown(type(self), kwargs, str(error))
                init(self, *args, **kwargs)  # raises it anew, with the name of the class
                raise
            bound.apply_defaults()
            arguments = _by_name(type(self), bound)
            # nn.Module.__setattr__ is not ready before super().__init__().
            object.__setattr__(self, "_init_args", arguments)
        check(self, args, kwargs)
        self.__dict__.setdefault("_made", set()).add(remember)
        try:
            init(self, *args, **kwargs)
        except TypeError as error:
            if outermost:
                _refuse_unknown(type(self), kwargs, str(error))
            raise
        except AttributeError as error:
            own = error.obj is self or "before Module.__init__() call" in str(error)
            if own and (fault := _not_whole(self)) is not None:
                raise fault from error
            raise
        if outermost and (fault := _not_whole(self)) is not None:
            raise fault
        if outermost:
            del self.__dict__["_made"]
            named = constructor_arguments(type(self))
            self.__dict__["_as_made"] = _attributes(self, [*self.__dict__["_init_args"], *named])

    remember.check = check  # type: ignore[attr-defined]  # also a mark
    return remember


def _attributes(made: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return what an object holds under some names; a module keeps its parts apart."""
    held = {**vars(made), **vars(made).get("_modules", {})}
    return {name: held[name] for name in names if name in held}


def _by_name(cls: type[Any], bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return a constructor's arguments by name, those in ``*args`` by their names in the base."""
    arguments: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            further = [n for n in constructor_arguments(cls) if n not in arguments]
            if len(value) > len(further):
                raise InputError(
                    f"{cls.__name__}: {len(value)} values of *{name} have no names, by which a "
                    "checkpoint could hold them; let the constructor take a list."
                )
            arguments |= zip(further, value, strict=False)
        else:
            arguments[name] = value
    return arguments


def _refuse_unknown(cls: type[Any], given: Mapping[str, Any], message: str) -> None:
    """Refuse an argument that a class does not take, in a sentence instead of Python's words."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", message)
    known = constructor_arguments(cls)
    if unknown is None or (name := unknown[1]) in known or name not in given:
        return
    bases = [base for base in cls.__mro__[1:] if issubclass(base, Described)][:-1]
    kin = (other for base in bases for other in below(base))
    having = [other.__name__ for other in kin if name in constructor_arguments(other)]
    if having:
        raise TypeError(f"{cls.__name__} takes no '{name}'; {having[0]} does.")
    raise TypeError(takes_no(cls.__name__, name, known))


def below(base: type[Any]) -> Iterator[type[Any]]:
    """Yield a class and all classes derived from it."""
    yield base
    for cls in base.__subclasses__():
        yield from below(cls)


def _not_whole(made: Any) -> InputError | None:
    """Say which constructor of an object was left out; ``None`` if none was."""
    last = type(made)
    for base in type(made).__mro__:
        init = vars(base).get("__init__")
        # One that was put in its place from outside is not known to have been called, or not.
        if issubclass(base, Described) and hasattr(init, "check"):
            if init not in made.__dict__["_made"]:
                break
            last = base
    else:
        if not _is_module(made) or "_modules" in made.__dict__:
            return None
    return InputError(
        f"{type(made).__name__}: {last.__name__}.__init__ does not call super().__init__(...); let "
        "it do so before anything else."
    )


def describe(value: Any, where: str = "value") -> Any:
    """Write ``value`` with primitives only.

    The value is a primitive, path, list, mapping, :class:`Described` object, class, or
    ``functools.partial`` of a class; ``where`` is how the error names it.

    Raises:
        InputError: the object cannot be rebuilt from primitives.

    Example:
        >>> describe({"a": (1, 2.5)})
        {'a': [1, 2.5]}
    """
    value = plain(value.value if isinstance(value, Enum) else value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): describe(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [describe(v, f"{where}[{i}]") for i, v in enumerate(value)]
    # An object of ours, a class, or a partial of one; or what describes itself.
    made = _class_and_arguments(value)
    if made is not None:
        cls, arguments = made
        inner = {k: describe(v, f"{where}.{k}") for k, v in arguments.items()}
        if "<locals>" in cls.__qualname__:
            raise InputError(
                f"{where}: {cls.__qualname__} is defined inside a function, so no checkpoint can "
                "name it; move it to the top of a module."
            )
        return {"class_path": public_path(cls), "init_args": inner}
    if callable(getattr(value, "to_dict", None)) and not _is_module(value):
        return describe(value.to_dict(), where)
    if inspect.isroutine(value) or isinstance(value, functools.partial):
        raise InputError(
            f"{where}: a function cannot be written to a checkpoint; give a class, or "
            "functools.partial(CLASS, ...) with its arguments, as in functools.partial("
            "torch.optim.SGD, lr=0.1)."
        )
    raise InputError(
        f"{where}: a {type(value).__module__}.{type(value).__qualname__} cannot be written to a "
        "checkpoint; give plain numbers, texts and lists, or what it is made from as "
        "{'class_path': ..., 'init_args': {...}}."
    )


def _class_and_arguments(value: Any) -> tuple[type, Mapping[str, Any]] | None:
    """Return the class and arguments that make a value again; ``None`` if they are not known."""
    if isinstance(value, Described):
        return type(value), value.init_args
    if inspect.isclass(value):
        return value, {}
    if isinstance(value, functools.partial) and (cls := class_behind(value)) is not None:
        return cls, value.keywords
    return None


def class_behind(made: functools.partial[Any]) -> type | None:
    """Return the class that a partial makes; jsonargparse wraps it behind its own functions."""
    classes = [f for f in (made.func, *made.args) if inspect.isclass(f)]
    return classes[0] if len(classes) == 1 else None


def _is_module(value: Any) -> bool:
    torch = sys.modules.get("torch")  # not imported: the command line answers --help without it
    return torch is not None and isinstance(value, torch.nn.Module)


def public_path(obj: Any) -> str:
    """Return the shortest dotted path under which a package exports a class.

    A file may move to another folder of its package; what ``__all__`` exports may not. So a
    checkpoint names ``pmixseg.losses.DiceCE``, and never the file that holds the class today. A
    class or function that no package exports keeps the path of its module.

    Example:
        >>> from pmixseg.losses.segmentation import DiceCE
        >>> public_path(DiceCE)
        'pmixseg.losses.DiceCE'
    """
    parts, name = obj.__module__.split("."), obj.__qualname__
    for count in range(1, len(parts)):
        package = sys.modules.get(".".join(parts[:count]))
        exported = name in getattr(package, "__all__", ()) and getattr(package, name, None) is obj
        if exported:
            return ".".join([*parts[:count], name])
    return f"{obj.__module__}.{name}"


def is_description(value: Any) -> bool:
    """Say whether ``value`` is a ``{class_path, init_args}`` mapping."""
    return isinstance(value, Mapping) and isinstance(value.get("class_path"), str)


def find_class(class_path: str) -> Any:
    """Import the object that ``class_path`` names.

    What a *checkpoint* names is judged first, see :func:`pmixseg.modules.trust.resolve`. Paths of
    earlier versions are known.
    """
    class_path = current_path(class_path)
    parts = class_path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            target: Any = importlib.import_module(".".join(parts[:cut]))
            for name in parts[cut:]:
                target = getattr(target, name)
        except (ImportError, AttributeError, ValueError):  # ValueError: an empty name, as in "a..b"
            continue
        return target
    raise InputError(f"class '{class_path}' cannot be imported; correct its name or install it.")


def build(value: Any, **extra: Any) -> Any:
    """Undo :func:`describe` for one object: instantiate a ``{class_path, init_args}``.

    A ready object is returned as it is. Nested descriptions are left to the class, which builds its
    own arguments. ``extra`` arguments are added where ``init_args`` does not have them. A word,
    list or other mapping where an object belongs is refused.
    """
    primitive = isinstance(value, str | list | tuple | int | float | Mapping)
    if primitive and not isinstance(value, bool) and not is_description(value):
        name = value if str(value)[:1].isupper() and str(value).isidentifier() else "RFNet"
        raise InputError(
            f"{value!r} stands where an object belongs; give the object itself, as in {name}() and "
            f"not '{name}', or the path of its class, as in {{'class_path': "
            "'pmixseg.backbones.RFNet', 'init_args': {...}}."
        )
    if inspect.isclass(value) and issubclass(value, Described):
        name = value.__name__
        raise InputError(f"{name} is a class; give an object of it, as in {name}().")
    if not is_description(value):
        return value
    cls = find_class(value["class_path"])
    if not inspect.isclass(cls):
        raise InputError(f"'{value['class_path']}' is not a class; name a class.")
    arguments = {**extra, **(value.get("init_args") or {})}
    try:
        return cls(**arguments)
    except TypeError as error:
        raise InputError(
            f"{value['class_path']} cannot be made from {sorted(arguments)}: "
            f"{str(error).rstrip('.')}."
        ) from error
