"""Decide which classes a checkpoint may name, so that no foreign file runs code.

``weights_only=True`` keeps a checkpoint's pickle from running code. Its description of the model
names classes, which are imported and called. So all of them are found and judged before the first
one is made (:func:`resolve`), and what is made then cannot reach the network (:func:`offline`).
"""

from __future__ import annotations

import importlib
import inspect
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from threading import get_ident
from typing import Any, Literal, get_args, get_origin

import torch
from monai.networks import nets
from monai.optimizers import Novograd, WarmupCosineSchedule
from torch import nn, optim
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from pmixseg.argument_checks import constructor_hints
from pmixseg.backbones.april2025 import April2025Network
from pmixseg.backbones.base import Backbone
from pmixseg.data.missing import MissingnessSampler
from pmixseg.describe import Described, find_class, public_path
from pmixseg.errors import InputError
from pmixseg.losses.anchors import Anchor
from pmixseg.losses.segmentation import Criterion
from pmixseg.modules.base import SegmentationModule
from pmixseg.modules.training.optimization import Schedule
from pmixseg.old_paths import current_path

CONTRACTS = (
    *(SegmentationModule, Backbone, Criterion, Anchor, MissingnessSampler, Schedule),
    April2025Network,
)
"""What a checkpoint may name of this package: what fulfils one of these."""

MONAI_NETWORKS: frozenset[type] = frozenset(
    {
        *(nets.UNet, nets.BasicUNet, nets.BasicUNetPlusPlus, nets.AttentionUnet, nets.VNet),
        *(nets.DynUNet, nets.SegResNet, nets.SegResNetVAE, nets.SegResNetDS, nets.SegResNetDS2),
        *(nets.SwinUNETR, nets.UNETR, nets.HighResNet, nets.MedNeXt),
    }
)
"""Segmentation networks that read and fetch nothing when they are made; others of MONAI do."""

_CLASSES = (*vars(optim).values(), *vars(lr_scheduler).values())
OPTIMIZATION: frozenset[type] = frozenset(
    {
        *(c for c in _CLASSES if inspect.isclass(c) and issubclass(c, Optimizer | LRScheduler)),
        *(Novograd, WarmupCosineSchedule),
    }
)
"""Optimizers and schedules of PyTorch and MONAI."""

PACKAGES = ("pmixseg", "torch.optim", "monai.networks.nets", "monai.optimizers")
"""Where a name is looked up that no module of the user's has."""


def resolve(value: Any, modules: Sequence[str] = (), where: str = "checkpoint") -> Any:
    """Judge every class that a checkpoint's description names, and say where it is today.

    Nothing is made, and nothing is imported but from :data:`PACKAGES` and ``modules``. Beside the
    class paths, text is refused where an object belongs: jsonargparse would take it for the path
    of a class, or of a file that names one.

    Args:
        value: a description of a model, or a part of one.
        modules: further Python modules whose classes it may name, by a person's word (the command
            line's ``--import``). What a notebook or script defines needs none: it was run by the
            same person.
        where: how errors name the value.

    Returns:
        The description, with the public paths of the classes as they are found now.

    Raises:
        InputError: a class that may not be named or is no part of a model, or text for an object.
    """
    if isinstance(value, list | tuple):
        return [resolve(item, modules, f"{where}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    for key, inner in value.items():
        if "class_path" in str(key) and (key != "class_path" or not isinstance(inner, str)):
            raise _no_description(f"{where}.{key}", inner)
    # Parts first, then the class itself and what it is given.
    inside = {key: resolve(inner, modules, f"{where}.{key}") for key, inner in value.items()}
    if "class_path" not in value:
        return inside
    cls = _class_of(value["class_path"], modules)
    arguments = inside.get("init_args") or {}
    if not isinstance(arguments, Mapping):
        raise _no_description(f"{where}.init_args", arguments)
    arguments = dict(arguments)
    hints = constructor_hints(cls)
    for name, inner in arguments.items():
        if isinstance(inner, str) and name in getattr(cls, "class_arguments", ()):
            arguments[name] = public_path(_class_of(inner, modules))
        elif _is_text_for_an_object(inner, hints.get(name, Any)) or not str(name).isidentifier():
            raise _no_description(f"{where}.{name}", inner)
    path = public_path(cls)
    return {**inside, "class_path": path, **({"init_args": arguments} if arguments else {})}


def _class_of(written: str, modules: Sequence[str]) -> type:
    """Return a class that a checkpoint may name."""
    path = current_path(written)
    if path.startswith("__main__."):
        path = _of_a_script(path, modules)
    named = (*PACKAGES, *modules, "__main__")
    if not any(path.startswith(f"{name}.") for name in named):
        module = path.rpartition(".")[0] or path
        raise InputError(
            f"the checkpoint names {written}, which is not among the networks, criteria, anchors, "
            "samplers, optimizers and schedules that any checkpoint may use; if you trust it, "
            f"load with --import {module} (in Python: modules=['{module}'])."
        )
    cls = find_class(path)
    if inspect.isclass(cls):
        if cls in MONAI_NETWORKS | OPTIMIZATION:
            return cls
        if _lies_in(cls, ("pmixseg",)) and issubclass(cls, CONTRACTS):
            return cls
        # A module that imports others' classes does not vouch for them.
        own = _lies_in(cls, (*modules, "__main__"))
        if own and issubclass(cls, Described | nn.Module | Optimizer | LRScheduler):
            return cls
    if path.startswith(PACKAGES[1:]) and not any(path.startswith(f"{m}.") for m in modules):
        module = path.rpartition(".")[0]
        advice = f"if you trust it, load with --import {module} (in Python: modules=['{module}'])"
    else:
        advice = "it was damaged or made to do harm, so do not use it"
    raise InputError(
        f"the checkpoint names {written}, which is no network, criterion, anchor, sampler, "
        f"optimizer or schedule that it may use; {advice}."
    )


def _of_a_script(path: str, modules: Sequence[str]) -> str:
    """Say where a class is that was defined in the script or notebook that trained the model."""
    name = path.removeprefix("__main__.")
    if hasattr(sys.modules["__main__"], name.split(".")[0]):
        return path
    for module in modules:
        if hasattr(importlib.import_module(module), name.split(".")[0]):
            return f"{module}.{name}"
    raise InputError(
        f"the checkpoint's class {name} was defined in a script or notebook; load with --import "
        f"SCRIPT, the module that defines it (in Python: modules=['SCRIPT'])."
    )


def _lies_in(cls: type, modules: Sequence[str]) -> bool:
    return any(cls.__module__ == m or cls.__module__.startswith(f"{m}.") for m in modules)


@contextmanager
def offline(where: str) -> Iterator[None]:
    """Let the calling thread reach no network, and no repository of ``torch.hub``, in a block."""
    thread = get_ident()

    def shut(function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if get_ident() != thread:
                return function(*args, **kwargs)
            raise InputError(
                f"making the model of {where} asks for something of the network; if you trust it, "
                "name the module of its classes with --import (in Python: modules=[...])."
            )

        return ask

    # Every way out that the making of a network is known to take.
    doors = [
        *(
            (torch.hub, name)
            for name in ("load", "load_state_dict_from_url", "download_url_to_file")
        ),
        *((socket, name) for name in ("getaddrinfo", "create_connection")),
        (socket.socket, "connect"),
    ]
    with ExitStack() as opened:
        for owner, name in doors:
            function = getattr(owner, name)
            setattr(owner, name, shut(function))
            opened.callback(setattr, owner, name, function)
        yield


def _no_description(where: str, value: Any) -> InputError:
    return InputError(
        f"the checkpoint says {value!r} for {where}, which describes no object; it was damaged or "
        "made to do harm, so do not use it."
    )


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
