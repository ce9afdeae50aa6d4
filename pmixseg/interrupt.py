"""Stop a command on Ctrl-C or SIGTERM: one line, exit code 130 or 143, no process left behind.

A ``KeyboardInterrupt`` in the midst of an import may be swallowed, or come out as another error,
since the library is half loaded. So both signals end the process at once while nothing is at stake,
and raise from then on.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

STOPPED = 130
"""The exit code of a command that Ctrl-C has stopped."""

TERMINATED = 143
"""The exit code of a command that SIGTERM has stopped, as of a process that it ends."""


class Terminated(KeyboardInterrupt):
    """SIGTERM has come, which clears up as Ctrl-C does."""


def exit_on_interrupt() -> None:
    """Let Ctrl-C and SIGTERM end the process at once, while a command only imports and reads."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit)


def ignore_interrupt_at_exit() -> None:
    """Let Ctrl-C do nothing once Python closes down, where it would end by the signal, wordless."""
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def raise_on_interrupt(*, trains: bool = False) -> None:
    """Let both signals raise ``KeyboardInterrupt``: from here on something may have to be closed.

    In an import they still end the process at once. Changes nothing in a process that has handlers
    of its own.

    With ``trains``, SIGTERM is left to Lightning, whose training ends with the step in hand; a
    cluster may queue it again.
    """
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, _raise)
        signal.signal(signal.SIGTERM, signal.SIG_DFL if trains else _raise)


def stopping_code(error: BaseException | None) -> int | None:
    """Return the exit code of a command that Ctrl-C or SIGTERM ended; else ``None``.

    Libraries make other errors of it: Lightning exits with 1. What is raised while the signal ends
    an import or a library's call counts as well.
    """
    for cause in causes_of(error):
        if isinstance(cause, Terminated) or type(cause).__name__ == "SIGTERMException":
            return TERMINATED  # the second is Lightning's, which would exit with 0
        if isinstance(cause, KeyboardInterrupt):
            return STOPPED
    return None


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """Go through an error, what it was raised from or amid, and so on, each of them once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def report_stop(code: int = STOPPED) -> int:
    """Print the one line of a stopped command, and return its exit code."""
    print("pmixseg: stopped.", file=sys.stderr, flush=True)  # noqa: T201  # the command line's own output
    return code


def end_server(*, at_once: bool = False) -> None:
    """End the process that forks workers: after this one it would still import for seconds.

    ``at_once``, where Python does not close down, the folder of its socket goes as well.
    """
    server = getattr(sys.modules.get("multiprocessing.forkserver"), "_forkserver", None)
    if server is None or server._forkserver_pid is None:
        return
    with suppress(OSError):  # a fork of this process knows the server, but is not its parent
        if os.waitpid(server._forkserver_pid, os.WNOHANG)[0] == 0:
            os.kill(server._forkserver_pid, signal.SIGKILL)
            os.waitpid(server._forkserver_pid, 0)
        if at_once:
            Path(server._forkserver_address).unlink()
            Path(server._forkserver_address).parent.rmdir()
    server._forkserver_pid = None


def _exit(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"pmixseg: stopped.\n")  # print could be what the signal has interrupted
    end_server(at_once=True)
    os._exit(128 + signum)


def _raise(signum: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            _exit(signum, frame)
        frame = frame.f_back
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt
