"""How the benchmarks of networks measure: seconds, operations, the yardstick of the machine."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pmixseg.backbones.layers import lean, norm, regions

KINDS = ("lean", "torch", "channels_last", "compiled")
"""Layers of this package on a CPU, torch's own contiguous and channels-last, torch.compile."""
TORCH_KINDS = ("torch", "channels_last")
"""Those that :func:`torch_layers` brings about."""


@contextlib.contextmanager
def torch_layers() -> Iterator[None]:
    """Run torch's own layers instead of the lean ones: in any layout, seen by the FLOP counter."""
    with contextlib.ExitStack() as stack:
        for module in (lean, norm, regions):
            stack.enter_context(mock.patch.object(module, "runs_lean", lambda x: False))
        yield


def gflop(call: Callable[[], Any]) -> float:
    """Billions of operations (2 per multiply-add), by ``torch.utils.flop_counter``."""
    from torch.utils.flop_counter import FlopCounterMode

    # Attention as products: the counter does not see what the kernel of a CPU does.
    with torch_layers(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def matmul_gflops(dtype: torch.dtype, cpu: bool, size: int = 2048) -> float:
    """Best GFLOP/s of a square matrix product, the yardstick of this machine."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = min(timed(lambda: a @ b, cpu)[0] for _ in range(8))
    return 2 * size**3 / best / 1e9


def autocast(precision: str) -> torch.autocast:
    """Automatic bf16, or nothing."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def timed(call: Callable[[], Any], cpu: bool = False) -> tuple[float, Any]:
    """Seconds of the wall clock or of the processor, and the result."""
    clock = time.process_time if cpu else time.perf_counter
    start = clock()
    result = call()
    return clock() - start, result


def round_of(calls: dict[str, Callable[[], None]], kind: str) -> float:
    """Processor seconds of one call, those of ended child processes included."""

    def spent() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    start = spent()
    with torch_layers() if kind in TORCH_KINDS else contextlib.nullcontext():
        calls[kind]()
    return spent() - start
