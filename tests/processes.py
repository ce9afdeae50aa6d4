"""Processes that a test starts with the libraries imported: an import takes them seconds."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing
from lightning.pytorch.strategies import DDPStrategy

from pmixseg.errors import InputError

multiprocessing.set_forkserver_preload(
    ["lightning.pytorch", "pmixseg.callbacks", "pmixseg.modules", "pmixseg.data.datamodule"]
)


class Copy:
    """Call ``function(*args)`` in a copy of this process; what it returns is the exit code."""

    def __init__(self, function: Callable[..., int | None], *args: Any) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # read and closed by join
        self._child = os.fork()
        if self._child == 0:
            code = 99
            try:
                sys.stdout = sys.stderr = self._said
                code = function(*args) or 0
            except BaseException:
                traceback.print_exc()
            finally:
                self._said.flush()
                os._exit(code)

    def join(self) -> tuple[int, str]:
        """The exit code, and what was printed."""
        code = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
        with self._said as said:
            said.seek(0)
            return code, said.read()


def said_of_a_full_disk(write: Callable[[], Any]) -> str:
    """What ``write`` says where the system lets no file have more than 100 kB: its own error."""
    import resource

    def limited() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            write()
        except InputError as error:
            print(error)  # noqa: T201  # read from the copy
            return 7
        return 0

    code, said = Copy(limited).join()
    assert code == 7, said
    return said


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
