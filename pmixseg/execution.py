"""Choose how a step runs on its device: lean on a CPU, static on a GPU and under a compiler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_as_on_gpu = False


@contextlib.contextmanager
def as_on_gpu(on: bool = True) -> Iterator[None]:
    """Compute on a CPU as on a GPU, or not, so that tests and counts see what runs there."""
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, on
    try:
        yield
    finally:
        _as_on_gpu = before


def static_on(device: torch.device) -> bool:
    """Say whether a device is a GPU, or a CPU that shall work as one."""
    return device.type != "cpu" or _as_on_gpu


def on_cpu(x: Tensor) -> bool:
    """Say whether ``x`` lies on a CPU that shall work as one."""
    return not static_on(x.device)


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the CPU's random numbers and those of one device.

    ``torch.manual_seed`` seeds every kind of device there could be, in most of a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def runs_lean(x: Tensor) -> bool:
    """Say whether own layers run instead of torch's: on a CPU, not under a compiler."""
    return on_cpu(x) and not torch.compiler.is_compiling()


def runs_static(x: Tensor) -> bool:
    """Say whether every step does the same, whatever the flags of presence say.

    A GPU would have to wait for flags before the host could act on them, and a compiler would make
    a graph for each pattern; both compute every slot and mask it. A CPU skips what is absent, and
    so does an export, which is of one combination.
    """
    # Until torch 2.11 a compiler, too, is told that it is exporting.
    exports = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return not runs_lean(x) and not exports
