"""Run functions in worker processes that end with this one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import (
    active_children,
    current_process,
    get_all_start_methods,
    get_context,
    parent_process,
)
from multiprocessing.context import BaseContext
from multiprocessing.util import Finalize
from threading import Thread, current_thread, main_thread
from types import FrameType
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from pmixseg.errors import InputError, memory_error, warn_in_one_line
from pmixseg.interrupt import end_server

NOT_BEGUN = (
    "in a script, call this under `if __name__ == '__main__':`, since every worker reads the "
    "script anew; else there is too little memory, so use fewer workers."
)
"""Why workers end before they have done anything."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def results(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    *,
    where: object,
    preload: Sequence[str] = (),
) -> Iterator[tuple[Item, Result]]:
    """Do a piece of work for each item, and yield each item with its result as it is done.

    Where this process stops before the end, by Ctrl-C or an error, the workers are interrupted: a
    piece of work in hand clears up, and no other is begun. Workers leave Ctrl-C to this process,
    use one core, and die when it dies.

    Work is a function of a module, or a ``partial`` of one: other processes import it. With 0
    workers or less it is done here. The message about a worker that was killed begins with
    ``where``. Modules to ``preload`` are imported once, not once a worker, where the system allows
    it.

    Raises:
        InputError: a worker was killed, most likely for lack of memory.
    """
    if workers <= 0:
        for item in items:
            with threadpool_limits(1, "blas"):  # several threads for small products take longer
                result = work(item)
            yield item, result
        return
    end_if_read_anew()
    others, done = {child.pid for child in active_children()}, 0
    server = start_server(preload)
    with _starting():
        pool = ProcessPoolExecutor(workers, server, initializer=start_worker)
    try:
        with _interrupted_later(), _starting():
            futures = {pool.submit(partial(_piece, work), item): item for item in items}
        for future in as_completed(futures):
            result = future.result()
            done += 1
            yield futures[future], result
    except BrokenProcessPool as error:
        why = (
            "a worker process was killed, most likely for lack of memory; start again with fewer "
            "workers; what is done is kept."
            if done
            else f"the worker processes ended before the first case: {NOT_BEGUN}"
        )
        raise InputError(f"{where}: {why}") from error
    except BaseException:
        for child in active_children():
            if child.pid is not None and child.pid not in others:
                os.kill(child.pid, signal.SIGINT)
        raise
    finally:
        with suppress(RuntimeError):  # its thread may never have begun
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _starting() -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and memory_error(error) is None:
            raise  # of something else
        raise InputError(
            f"the system starts no more processes ({error or 'the server ended'}); allow more "
            "(ulimit -u), or use fewer workers."
        ) from error


def end_if_read_anew() -> None:
    """End a worker that comes to where workers are started.

    A worker of a script without a main guard reads the script anew, and comes here again. Python
    would print a traceback per worker; the first process says in a sentence what is wrong.
    """
    if getattr(current_process(), "_inheriting", False):
        os._exit(1)


class _Interruption:
    """Remembers whether a worker is at work, and whether it shall stop."""

    at_work = False
    asked = False


def _interrupt(signum: int, frame: FrameType | None) -> None:
    first, _Interruption.asked = not _Interruption.asked, True
    if _Interruption.at_work and first:  # clearing up is not interrupted once more
        raise KeyboardInterrupt


def _piece(work: Callable[[Item], Result], item: Item) -> Result:
    _Interruption.at_work = True
    try:
        if _Interruption.asked:
            raise KeyboardInterrupt
        # Else small matrix products would wait for threads on the cores of other workers. Here, and
        # how warnings look as well: a library may have been loaded since the last item.
        threadpool_limits(1)
        warn_in_one_line()
        return work(item)
    finally:
        _Interruption.at_work = False


def start_worker() -> None:
    """Do what a worker does first."""
    signal.signal(signal.SIGINT, _interrupt)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    try:
        Thread(target=_end_with_parent, daemon=True).start()
    except RuntimeError:  # there are no more threads; the first process says so
        os._exit(1)


def _end_with_parent() -> None:
    """End this process when its parent has ended, however that came about.

    A killed parent closes no pool, and its workers would wait for work for ever.
    """
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def start_server(preload: Sequence[str]) -> BaseContext:
    """Start the process that forks workers, and let it import what they need meanwhile.

    Not a plain fork: this process may hold threads (torch, the progress bar) that it breaks. A
    server that runs already imports no more. The way to start workers is returned: by that server,
    or anew where the system has none.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    from multiprocessing import forkserver  # there is none on Windows

    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, *preload])
    Finalize(None, end_server, exitpriority=-1)  # once whoever else was forked has been joined
    # The server is deaf to Ctrl-C, also while it imports. SIGTERM waits until it is known.
    with _interrupted_later(), _interrupted_by(signal.SIG_IGN, signal.SIGINT), _starting():
        forkserver.ensure_running()
    return context


@contextmanager
def _interrupted_by(handler: Any, *numbers: int) -> Iterator[None]:
    """Set another handler of signals for a while; only the main thread may do so."""
    if current_thread() is not main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of the block: half a pool cannot be closed.

    A SIGTERM that would end this process at once still does.
    """
    signals: list[int] = []
    both = (signal.SIGINT, signal.SIGTERM)
    raising = [n for n in both if n == signal.SIGINT or callable(signal.getsignal(n))]
    with _interrupted_by(lambda signum, frame: signals.append(signum), *raising):
        yield
    if signals:
        signal.raise_signal(signals[0])
