"""What a card is measured with: clocks, counters, a phantom cohort, a quiet trainer."""

from __future__ import annotations

import fcntl
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor

from pmixseg.backbones import Backbone, MultiEncoderUNet, RFNet
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
from pmixseg.data.store.prepare import prepare
from pmixseg.task import BRATS

NETWORKS = {"RFNet": RFNet, "MultiEncoderUNet": MultiEncoderUNet}


class Durations(SimpleProfiler):
    """Lightning's profiler without its table."""

    def summary(self) -> str:
        """Nothing; durations are read."""
        return ""


class Clock(Callback):
    """Seconds of a step, when the card has done its work.

    Args:
        first: step at which the clock starts; five steps before, the turn on the card begins.
        last: step at which it stops.
        bench: whose turn it is.
    """

    def __init__(self, first: int, last: int, bench: Bench) -> None:
        self.first, self.last, self.start, self.seconds = first, last, 0.0, 0.0
        self.turn, self.begin = bench.turn(), max(first - 5, 1)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Start or stop the clock."""
        if trainer.global_step == self.begin:
            self.turn.__enter__()
        if trainer.global_step == self.first:
            self.start = self._now()
        if trainer.global_step == self.last:
            self.seconds = (self._now() - self.start) / (self.last - self.first)

    def on_train_end(self, *args: Any) -> None:
        """End the turn."""
        self.turn.__exit__(None, None, None)

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class DriverCalls(Callback):
    """Milliseconds that the host spends in each call of the card's driver, per step.

    A call that waits for the card (``cudaStreamSynchronize``, a full queue in ``cudaGraphLaunch``)
    is longer than one that only starts work. Without a card there is nothing to see.

    Args:
        first: step after which calls are recorded, to the end of the training.
    """

    LEAST = 0.05

    def __init__(self, first: int) -> None:
        self.first, self.milliseconds = first, dict[str, float]()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self.profile = torch.profiler.profile(activities=activities)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Begin to record."""
        if trainer.global_step == self.first:
            self.profile.start()

    def on_train_end(self, trainer: Trainer, *args: Any) -> None:
        """Sum up the calls by name; those that take less than :attr:`LEAST` are left out."""
        self.profile.stop()
        steps = trainer.global_step - self.first
        for event in self.profile.key_averages():
            spent = event.self_cpu_time_total / 1e3 / steps
            if event.key.startswith("cu") and spent >= self.LEAST:
                self.milliseconds[f"{event.key} ({event.count / steps:.3g})"] = spent


@dataclass
class Bench:
    """Device, sizes and what was measured so far.

    Args:
        device: where everything runs.
        official: checkout of the published RFNet, if it is to be compared.
        rehearse: tiny volumes, one round.
        lock: file that several benchmarks on one card share: they compile at the same time and
            measure one after the other.
        networks: names of :data:`NETWORKS` to measure.
        batches: samples of the batches of ``steps``.
    """

    device: torch.device
    official: str | None = None
    rehearse: bool = False
    lock: Path | None = None
    networks: tuple[str, ...] = tuple(NETWORKS)
    batches: tuple[int, ...] = (1, 2)
    ceiling: float = 0.0
    rows: list[tuple[str, dict[str, float]]] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        """Whether there is a card."""
        return self.device.type == "cuda"

    @property
    def side(self) -> int:
        """Voxels of a patch along an axis."""
        return 16 if self.rehearse else 80

    def row(self, name: str, **values: float) -> None:
        """Print one row."""
        self.rows.append((name, values))
        print(f"| {name} | {', '.join(f'{k} {v:.4g}' for k, v in values.items())} |", flush=True)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other benchmark measures."""
        if self.lock is None:
            yield
            return
        with self.lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def seconds(self, call: Callable[[], object], rounds: int = 7, warm: int = 3) -> float:
        """Median time of a call."""
        if self.rehearse:
            rounds, warm = 1, 0
        for _ in range(warm):
            call()
        if self.cuda:
            torch.cuda.synchronize()
        with self.turn():
            return self._seconds(call, rounds)

    def _seconds(self, call: Callable[[], object], rounds: int) -> float:
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            if not self.cuda:
                call()
                times.append(time.perf_counter() - start)
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)

    def seconds_and_memory(
        self, call: Callable[[], object], rounds: int, warm: int
    ) -> dict[str, float]:
        """Median time and peak GiB of a call that is too long to be repeated for each."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = self.seconds(call, rounds, warm)
        gib = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0
        return {"s": seconds, "gib": gib}

    def memory(self, call: Callable[[], object]) -> float:
        """Peak GiB of a call, weights included."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0

    def work(self, call: Callable[[], object]) -> float:
        """Floating-point operations of a call, 2 per multiply-add."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            call()
        return float(counter.get_total_flops())

    def random(self, *shape: int) -> Tensor:
        """Normal numbers on the device."""
        return torch.randn(*shape, device=self.device)

    def network(self, name: str) -> Backbone:
        """One of :data:`NETWORKS` with random weights."""
        made = NETWORKS[name](width=4) if self.rehearse else NETWORKS[name]()
        return made.to(self.device)

    def autocast(self, precision: str) -> torch.autocast:
        """Automatic bf16, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    @contextmanager
    def busy(self) -> Iterator[dict[str, float]]:
        """Share of the wall time in which the card works; filled when the block ends."""
        share: dict[str, float] = {}
        if not self.cuda:
            yield share
            return
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            start = time.perf_counter()
            yield share
            torch.cuda.synchronize()
            wall = time.perf_counter() - start
        kernels = sum(event.self_device_time_total for event in profile.key_averages())
        share["busy"] = kernels / 1e6 / wall


@contextmanager
def phantom_store(bench: Bench) -> Iterator[Path]:
    """A prepared phantom cohort: at 1.5 mm some 90 x 120 x 100 voxels a case."""
    with tempfile.TemporaryDirectory() as folder:
        root, store = Path(folder) / "cohort", Path(folder) / "store"
        spacing = 5.0 if bench.rehearse else 1.5
        write_cohort(root, 4, seed=1, settings=PhantomSettings(spacing=spacing))
        prepare(find_cases(root, BRATS), store, BRATS, progress=False)
        yield store


def trainer_of(bench: Bench, folder: Path, precision: str, **settings: Any) -> Trainer:
    """A quiet trainer on the device."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="gpu" if bench.cuda else "cpu",
        devices=1,
        precision=precision,
        default_root_dir=folder,
        enable_model_summary=False,
        **quiet,
        **settings,
    )
