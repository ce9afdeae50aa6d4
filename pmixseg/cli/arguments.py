"""Read the command line before the parser does: flags, prefixes, near misses."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from pmixseg.argument_checks import nearest
from pmixseg.errors import InputError

SETTINGS = (".yaml", ".yml", ".json")
"""Endings of files that hold settings."""

NULL = re.compile(r"((?<![^=[,])|(?<=[:,] ))None(?![^],}])")
"""Null as Python writes it, and so wandb in the commands of a sweep."""


def options(args: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield every flag with its value: ``--name value`` or ``--name=value``.

    A value that looks like a flag is none; a flag without a value has ``None``.

    Example:
        >>> list(options(["fit", "--a", "1", "--b=2", "--c", "--d"]))
        [('--a', '1'), ('--b', '2'), ('--c', None), ('--d', None)]
    """
    for index, arg in enumerate(args):
        if not arg.startswith("-"):
            continue
        name, equals, value = arg.partition("=")
        if equals:
            yield name, value
        elif index + 1 < len(args) and not args[index + 1].startswith("-"):
            yield name, args[index + 1]
        else:
            yield name, None


def option(args: Sequence[str], *names: str) -> str | None:
    """Return the value of a flag, the last one given."""
    values = [value for name, value in options(args) if name in names and value is not None]
    return values[-1] if values else None


def flag_name(arg: str) -> str:
    """Return a flag without its value and without jsonargparse's ``init_args``.

    Example:
        >>> flag_name("--model.init_args.backbone.width=4")
        '--model.backbone.width'
    """
    return arg.partition("=")[0].replace(".init_args", "")


def repeated(args: Sequence[str]) -> str | None:
    """Find the first flag that comes twice; the parser of trainings silently keeps the last.

    Files may come several times. After ``--key+``, which adds one more entry to a list, flags below
    ``key`` speak of the new entry.

    Example:
        >>> repeated(["-c", "a.yaml", "-c", "b.yaml", "--data.seed=1"])
        >>> repeated(["--model.init_args.fill=zero", "--model.fill=anchor"])
        '--model.fill'
    """
    seen: set[str] = set()
    for name, _ in options(args):
        flag = flag_name(name)
        if flag.endswith("+"):
            seen = {other for other in seen if not other.startswith(f"{flag[:-1]}.")}
        elif flag in seen:
            return flag
        elif flag.startswith("--") and flag != "--config":  # no short one, and no negative number
            seen.add(flag)
    return None


def lost_file(args: Sequence[str]) -> tuple[str, str] | None:
    """Return the first flag whose value is a file of settings that is not there, with the file.

    The parser would take the name for a class, and import a module of that name.

    Example:
        >>> lost_file(["fit", "--data.task", "nowhere.yaml"])
        ('--data.task', 'nowhere.yaml')
    """
    for name, value in options(args):
        settings = value is not None and value.endswith(SETTINGS)
        if settings and name not in ("-c", "--config") and not Path(str(value)).is_file():
            return flag_name(name), str(value)
    return None


def config_files(args: Sequence[str]) -> list[Path]:
    """Return the configuration files among the arguments, in their order."""
    paths = [Path(v) for name, v in options(args) if name in ("-c", "--config") and v]
    return [path for path in paths if len(str(path)) < 1000 and path.is_file()]


def take_out(args: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """Split a flag that may come several times off the arguments: its values, and the others.

    Example:
        >>> take_out(["fit", "--import", "a", "--x=1", "--import=b"], "--import")
        (['a', 'b'], ['fit', '--x=1'])
    """
    values: list[str] = []
    left: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg == name:
            values.append(next(rest, ""))
        elif arg.startswith(f"{name}="):
            values.append(arg.partition("=")[2])
        else:
            left.append(arg)
    return values, left


def with_checkpoint_path(args: Sequence[str]) -> list[str]:
    """Replace ``--ckpt_path last`` or ``best`` by that file of the run folder."""
    name = option(args, "--ckpt_path")
    if name not in ("last", "best"):
        return list(args)
    run = option(args, "--run")
    if run is None:
        raise InputError(
            f"--ckpt_path {name} is a checkpoint of a run; say which one with --run, or give the "
            "path of the file."
        )
    _, left = take_out(args, "--ckpt_path")
    return [*left, f"--ckpt_path={Path(run) / 'checkpoints' / f'{name}.ckpt'}"]


def with_split_class(args: Sequence[str]) -> list[str]:
    """Name the class of a split whose arguments alone are given."""
    prefix = "--data.split."
    arguments = {
        flag_name(flag).removeprefix(prefix): value
        for flag, value in options(args)
        if flag_name(flag).startswith(prefix)
    }
    named = bool({"class_path", "help"} & {*arguments}) or any(
        flag_name(arg) == "--data.split" for arg in args
    )
    if not arguments or named or any(_names_split(path) for path in config_files(args)):
        return list(args)
    first = next(i for i, arg in enumerate(args) if flag_name(arg).startswith(prefix))
    return [*args[:first], f"--data.split={split_class(arguments)}", *args[first:]]


def _names_split(path: Path) -> bool:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return bool(content["data"]["split"])
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return False


def split_class(arguments: Mapping[str, Any]) -> str:
    """Return the class of a split, from the names and kinds of its arguments.

    Example:
        >>> split_class({"train": "train.txt", "val": "val.txt"})
        'pmixseg.data.SplitFiles'
        >>> split_class({"train": "0.8"}), split_class({"fold": 1})
        ('pmixseg.data.Fractions', 'pmixseg.data.KFold')
    """
    # These take a while, and other commands need none.
    from pmixseg.data import splits
    from pmixseg.data.parts import PARTS

    parts = [value for name, value in arguments.items() if name in PARTS]
    if all(_is_number(value) for value in parts):
        likely: list[type[splits.SplitPlan]] = [splits.Fractions]
    else:
        lists = any(isinstance(value, list) for value in parts)
        likely = [splits.SplitLists if lists else splits.SplitFiles]
    if not parts:
        likely += [splits.SplitJson, splits.KFold, splits.WholeCohort]
    for cls in likely:
        with suppress(TypeError):
            inspect.signature(cls).bind(**arguments)
            return f"pmixseg.data.{cls.__name__}"
    known = {name for cls in likely for name in inspect.signature(cls).parameters}
    odd = sorted(set(arguments) - known) or sorted(arguments)
    raise InputError(
        f"no split of data.split takes {', '.join(odd)} together with what else is given; "
        f"{nearest(odd[0], known | {*PARTS}) or 'name its class (--data.split CLASS).'}"
    )


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def parted(texts: Iterable[str]) -> list[str]:
    """Part what a flag takes at spaces and commas, but not a value that has some itself.

    Example:
        >>> parted(["NCR=1,ED=2", "ET=3,4"]), parted(["NCR=the core, ED=2"])
        (['NCR=1', 'ED=2', 'ET=3,4'], ['NCR=the core', 'ED=2'])
        >>> parted(["fill_holes,largest_component"])
        ['fill_holes', 'largest_component']
    """
    between = {text: r"[\s,]+(?=[^\s,=]+=)" if "=" in text else r"[\s,]+" for text in texts}
    return [part for text, at in between.items() for part in re.split(at, text.strip(" ,"))]


def numbers_of(flag: str, pairs: Sequence[str], form: str) -> dict[str, int]:
    """Read ``NAME=NUMBER`` of a flag; ``form`` is an example for the message about another form.

    Example:
        >>> numbers_of("--series", ["t1ce=5,flair=3", "t2=1"], "t1ce=5")
        {'t1ce': 5, 'flair': 3, 't2': 1}
    """
    try:
        return {name: int(n) for name, n in (pair.split("=") for pair in parted(pairs))}
    except ValueError:
        raise InputError(f"{flag} {','.join(pairs)} is not of the form {form}.") from None
