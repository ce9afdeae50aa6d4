"""How fast several small trainings run at once, each in a process of its own."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.losses.segmentation import DiceCE
from pmixseg.modules.training.compilation import arrange

WAYS: dict[str, dict[str, Any]] = {
    "uncompiled": {},
    "CUDA graphs": {"backend": "cudagraphs"},
    "compiled, CUDA graphs": {"mode": "reduce-overhead"},
}
"""How the step of a small training runs -> arguments of torch.compile."""


def _train(
    device: str, way: str, seconds: float, ready: threading.Barrier, begin: threading.Barrier
) -> float:
    """Steps per second of one small training, from when all begin."""
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    side = 64 if device == "cuda" else 16
    net = MultiEncoderUNet(width=8).to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    image = torch.randn(4, 4, side, side, side, device=device)
    label = torch.randint(0, 4, (4, side, side, side), device=device)
    shown = torch.ones(4, 4, dtype=torch.bool, device=device)
    criterion = DiceCE()

    def losses() -> Tensor:
        return criterion(net(image, shown), {"label": label}, 0)  # type: ignore[typeddict-item]  # what DiceCE reads

    if WAYS[way]:
        arrange(net, torch.channels_last_3d)
        image = image.contiguous(memory_format=torch.channels_last_3d)
    run = torch.compile(losses, dynamic=False, **WAYS[way]) if WAYS[way] else losses

    def step() -> None:
        optimizer.zero_grad()
        if device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device, torch.bfloat16):
            loss = run()
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(10 if device == "cuda" else 1):
        step()
    ready.wait()
    begin.wait()
    number, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        step()
        number += 1
    return number / (time.perf_counter() - start)


def rate(
    device: str, way: str, trainings: int, seconds: float, turn: AbstractContextManager[None]
) -> float:
    """Measure the steps per second of all trainings together.

    Args:
        device: ``cuda`` or ``cpu``.
        way: one of :data:`WAYS`.
        trainings: how many run at once.
        seconds: for how long they are measured.
        turn: entered when all have compiled, left when they have been measured.
    """
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(trainings) as pool:
        ready, begin = (manager.Barrier(trainings + 1, timeout=600) for _ in range(2))
        job = (device, way, seconds, ready, begin)
        rates = pool.starmap_async(_train, [job] * trainings, chunksize=1)
        ready.wait()
        with turn:
            begin.wait()
            return sum(rates.get())
