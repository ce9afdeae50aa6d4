"""Processes that work for this one, and end with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import current_process, get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext
from threading import Thread

import torch


def worker_pool(workers: int, preload: Sequence[str]) -> ProcessPoolExecutor:
    """A pool whose processes leave Ctrl-C to this one, use one core, and die when it dies.

    Args:
        workers: how many processes.
        preload: modules that are imported once, not once a worker, where the system allows it.
    """
    # A worker of a script without a main guard reads the script anew, and comes here again. Python
    # would print a traceback per worker; the first process says in a sentence what is wrong.
    if getattr(current_process(), "_inheriting", False):
        os._exit(1)
    return ProcessPoolExecutor(workers, _context(preload), initializer=start_worker)


def start_worker() -> None:
    """What a worker does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent has ended, however that came about.

    A killed parent closes no pool, and its workers would wait for work for ever.
    """
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _context(preload: Sequence[str]) -> BaseContext:
    """Not a plain fork: this process may hold threads (torch, the progress bar) that it breaks."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, *preload])
    return context
