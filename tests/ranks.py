"""Two processes of one training, which begin with the libraries imported: one import serves all."""

from __future__ import annotations

import datetime
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing
from lightning.pytorch.strategies import DDPStrategy

multiprocessing.set_forkserver_preload(
    ["lightning.pytorch", "pmixseg.callbacks", "pmixseg.modules", "pmixseg.data.datamodule"]
)


def run_two(function: Callable[..., Any], *args: Any) -> None:
    """Call ``function(rank, *args)`` in two processes and wait for both."""
    torch.multiprocessing.start_processes(function, args, nprocs=2, start_method="forkserver")


class Ranks(DDPStrategy):
    """DDP whose ranks have weights of their own: pickling lets them share the caller's memory."""

    def model_to_device(self) -> None:
        super().model_to_device()
        assert self.model is not None
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            tensor.data = tensor.data.clone()


def spread(processes: int) -> dict[str, Any]:
    """What a Trainer takes to run in one process or in two."""
    if processes == 1:
        return {"devices": 1}
    limit = datetime.timedelta(seconds=120)
    return {"devices": 2, "strategy": Ranks(start_method="forkserver", timeout=limit)}
