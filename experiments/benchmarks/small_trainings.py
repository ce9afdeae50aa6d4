"""How fast several small trainings run at once, each in a process of its own.

A bare step of a small U-Net shows what the card can do; a whole ``fit`` as the studies run it, with
loader, augmentation, fill and alignment, shows what their runner gets.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from pmixseg import BraTSDataModule, PmixAlignment, StudentModule
from pmixseg.backbones import MultiEncoderUNet
from pmixseg.data.splits import Fractions
from pmixseg.losses import MixtureAnchor
from pmixseg.losses.segmentation import DiceCE
from pmixseg.modules.training.compilation import arrange

WAYS: dict[str, dict[str, Any]] = {
    "uncompiled": {},
    "CUDA graphs": {"backend": "cudagraphs"},
    "compiled, CUDA graphs": {"mode": "reduce-overhead"},
}
"""How the step of a small training runs -> arguments of torch.compile."""


FITS = {"fit": False, "fit, compiled": True}
"""Whole trainings -> ``model.compile``."""


def _train(
    device: str,
    way: str,
    seconds: float,
    ready: threading.Barrier,
    begin: threading.Barrier,
    store: str,
) -> float:
    """Steps per second of one small training, from when all begin."""
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    side = 64 if device == "cuda" else 16
    if way in FITS:
        return _fit(device, FITS[way], seconds, (ready, begin), store)
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


class _Rate(Callback):
    """Measures a training's steps per second, from when all have warmed up."""

    def __init__(self, warm: int, seconds: float, barriers: tuple[threading.Barrier, ...]) -> None:
        self.warm, self.seconds, self.barriers = warm, seconds, barriers
        self.start, self.rate = 0.0, 0.0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Wait for the others once, count, stop."""
        done = trainer.global_step - self.warm
        if done < 0:
            return
        if trainer.strategy.root_device.type == "cuda" and done % 20 == 0:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if done == 0:
            for barrier in self.barriers:
                barrier.wait()
            self.start = time.perf_counter()
        elif done % 20 == 0 and now > self.start + self.seconds:
            self.rate, trainer.should_stop = done / (now - self.start), True


def _fit(
    device: str,
    compiled: bool,
    seconds: float,
    barriers: tuple[threading.Barrier, ...],
    store: str,
) -> float:
    """Steps per second of a training as in ``experiments/study/plans/real.yaml``."""
    card = device == "cuda"
    clock = _Rate(20 if card else 1, seconds, barriers)
    net = MultiEncoderUNet(width=16, levels=3, stem=2)
    module = StudentModule(
        backbone=net,
        fill="anchor",
        fill_levels=[1, 2],
        anchor=MixtureAnchor(weights="uniform"),
        criterion=DiceCE(include_background=False, batch_dice=True),
        compile=compiled,
    )
    data = BraTSDataModule(
        store,
        patch_size=64 if card else 16,
        batch_size=4,
        num_workers=1,
        patches_per_case=100_000,
        split=Fractions(1.0, 0.0, 0.0),
    )
    trainer = Trainer(
        accelerator="gpu" if card else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=100_000,
        gradient_clip_val=1.0,
        callbacks=[PmixAlignment(distance="case_nce", ratio=0.3), clock],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return clock.rate


def rate(
    device: str,
    way: str,
    trainings: int,
    seconds: float,
    turn: AbstractContextManager[None],
    store: str = "",
) -> float:
    """Measure the steps per second of all trainings together.

    Args:
        device: ``cuda`` or ``cpu``.
        way: one of :data:`WAYS` or :data:`FITS`.
        trainings: how many run at once.
        seconds: for how long they are measured.
        turn: entered when all have compiled, left when they have been measured.
        store: folder of prepared cases, for :data:`FITS`.
    """
    context = torch.multiprocessing.get_context("spawn")
    # Its processes may have loaders of their own, those of a Pool may not.
    pool = ProcessPoolExecutor(trainings, mp_context=context)
    with context.Manager() as manager, pool:
        ready, begin = (manager.Barrier(trainings + 1, timeout=600) for _ in range(2))
        job = (device, way, seconds, ready, begin, store)
        rates = [pool.submit(_train, *job) for _ in range(trainings)]
        ready.wait()
        with turn:
            begin.wait()
            return sum(one.result() for one in rates)
