"""Compile the training step into one graph: when, how, and the fallback if it fails."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from pmixseg.errors import first_line
from pmixseg.modules.training.optimization import accumulation, is_parallel
from pmixseg.types import Batch

Compile = bool | Literal["auto"]
Losses = tuple[Tensor, Tensor, tuple[str, ...]]
"""The loss of a step, its parts in one vector, and their names."""
LossFunction = Callable[[Batch, int | Tensor, Mapping[str, float | Tensor]], Losses]

FEWEST_STEPS = 3000
"""Steps of a training below which compiling would cost more than it saves.

On an H100 and an H200 it takes 60 to 90 s for MultiEncoderUNet and saves 30 to 37 ms a step, 220 s
and 70 ms for RFNet (``experiments/benchmarks/README.md``).
"""


@dataclass(frozen=True)
class Plan:
    """How a training step is compiled.

    Args:
        cuda_graphs: replay whole graphs, so that the host starts one operation instead of
            thousands.
        whole: refuse to break the graph; several processes must, to exchange sums.
        channels_last: lay volumes and weights with the channels last, as the card's
            half-precision convolutions read them.
    """

    cuda_graphs: bool
    whole: bool
    channels_last: bool = False

    @property
    def mode(self) -> str | None:
        """The mode of ``torch.compile``."""
        return "reduce-overhead" if self.cuda_graphs else None

    def __str__(self) -> str:
        graphs = "CUDA graphs" if self.cuda_graphs else "without CUDA graphs"
        return f"{graphs}, channels last" if self.channels_last else graphs


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled; the same one at each call.

    Patches and windows have one size each: symbolic ones only let inductor fail.
    """
    made: Callable[..., Any] = torch.compile(function, dynamic=False)
    return made


def plan(setting: Compile, device: torch.device, trainer: Trainer) -> Plan | None:
    """Decide how a training compiles its step, if it does."""
    if setting is False or (setting == "auto" and not _pays(device, trainer)):
        return None
    alone = not is_parallel(trainer)
    # Gradients that outlive a step would lie in memory that the next replay overwrites.
    each = trainer.accumulate_grad_batches == 1 and accumulation(trainer) is None
    replays = device.type == "cuda" and alone and each
    half = "16" in str(trainer.precision)
    return Plan(cuda_graphs=replays, whole=alone, channels_last=half and device.type == "cuda")


def _pays(device: torch.device, trainer: Trainer) -> bool:
    if device.type != "cuda" or trainer.estimated_stepping_batches < FEWEST_STEPS:
        return False
    from torch.utils._triton import has_triton  # no public question; part of torch since 2.1

    return bool(has_triton())


class CompiledStep:
    """Computes the losses of training steps, compiled if possible.

    The first call also compiles the backward pass, on a trial whose effects on random state and
    buffers are undone, so that a failure of the compiler shows before it can spoil a step.
    ``losses`` is compiled; it asks for no tensor's value.
    """

    def __init__(self, losses: LossFunction, how: Plan, module: nn.Module) -> None:
        self.plain, self.plan = losses, how
        self.compiled: LossFunction | None = torch.compile(
            losses, fullgraph=how.whole, dynamic=False, mode=how.mode
        )
        self._module = (module,)
        self._tried = False
        self._scalars: tuple[Any, int | Tensor, dict[str, float | Tensor]] | None = None
        if how.channels_last:
            arrange(module, torch.channels_last_3d)
        if not how.whole:
            # DDP would cut the graph at its buckets; one graph per backward pass is faster here.
            uncut = torch._dynamo.config.patch(optimize_ddp=False)
            self.compiled = uncut(self.compiled)

    def __call__(self, batch: Batch, epoch: int, weights: Mapping[str, float]) -> Losses:
        """Compute the losses of one step."""
        if self.compiled is None:
            return self.plain(batch, epoch, weights)
        device = batch["image"].device
        tensors, (number, factors) = _tensors(batch), self._on(device, epoch, weights)
        if self.plan.channels_last:
            image = batch["image"].contiguous(memory_format=torch.channels_last_3d)
            tensors = {**tensors, "image": image}
        if not self._tried:
            self._tried = True
            self._try(tensors, number, factors)
            return self(batch, epoch, weights)
        if self.plan.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # untyped in torch
        return self.compiled(tensors, number, factors)

    def release(self) -> None:
        """Lay the weights as they were."""
        if self.plan.channels_last:
            arrange(self._module[0], torch.contiguous_format)

    def _on(
        self, device: torch.device, epoch: int, weights: Mapping[str, float]
    ) -> tuple[int | Tensor, dict[str, float | Tensor]]:
        """Return numbers as tensors: a graph would be compiled anew for each value of a number."""
        key = (device, epoch, tuple(weights.items()))
        if self._scalars is None or self._scalars[0] != key:
            made: dict[str, float | Tensor] = {
                name: torch.tensor(weight, device=device) for name, weight in weights.items()
            }
            self._scalars = (key, torch.tensor(epoch, device=device), made)
        return self._scalars[1:]

    def _try(self, batch: Batch, epoch: Any, weights: Mapping[str, Any]) -> None:
        assert self.compiled is not None
        module, device, start = self._module[0], batch["image"].device, time.perf_counter()
        devices = [device] if device.type == "cuda" else []
        kept = [buffer.clone() for buffer in module.buffers()]
        parameters = [p for p in module.parameters() if p.requires_grad]
        dump = logging.getLogger("torch._inductor.scheduler")  # of a graph that cannot be compiled
        dump.disabled = True
        try:
            with torch.random.fork_rng(devices):
                total = self.compiled(batch, epoch, weights)[0]
                with torch.autocast(device.type, enabled=False):
                    torch.autograd.grad(total, parameters, allow_unused=True)
        except Exception as error:  # whatever a compiler, a C++ compiler or a driver raises
            self.compiled = None
            reason = f"{type(error).__name__}: {first_line(error)[:160].rstrip('.')}"
            rank_zero_warn(
                f"The training step could not be compiled ({reason}), so it runs uncompiled; "
                "model.compile: false spares the attempt."
            )
        else:
            rank_zero_info(
                f"Training step compiled in {time.perf_counter() - start:.0f} s ({self.plan}); "
                "model.compile: false turns it off."
            )
        finally:
            dump.disabled = False
            with torch.no_grad():
                for buffer, before in zip(module.buffers(), kept, strict=True):
                    buffer.copy_(before)


def arrange(module: nn.Module, layout: torch.memory_format) -> None:
    """Lay the weights of 3-D convolutions in memory in another order; no value changes."""
    for parameter in module.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def _tensors(batch: Mapping[str, Any]) -> Any:
    """Return a batch without its names, which would be compiled into the graph."""
    kept = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
    if "of_task" in batch:
        kept["of_task"] = _tensors(batch["of_task"])
    return kept
