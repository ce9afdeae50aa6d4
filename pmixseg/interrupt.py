"""Stop a command on Ctrl-C: one line, exit code 130, no process left behind.

A ``KeyboardInterrupt`` in the midst of an import may be swallowed, or come out as another error,
since the library is half loaded. So Ctrl-C ends the process at once while nothing is at stake, and
raises from then on.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from types import FrameType

STOPPED = 130
"""The exit code of a command that Ctrl-C has stopped."""

TERMINATED = 143
"""The exit code of a training that SIGTERM has stopped, as of a process that it ends."""


def exit_on_interrupt() -> None:
    """Let Ctrl-C end the process at once, while a command only imports and reads."""
    signal.signal(signal.SIGINT, _exit)


def finish_in_peace() -> None:
    """Let Ctrl-C do nothing once Python closes down, where it would end by the signal, wordless."""
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def raise_on_interrupt() -> None:
    """Let Ctrl-C raise ``KeyboardInterrupt`` again: from here on something may have to be closed.

    In an import it still ends the process at once. Changes nothing in a process that has handlers
    of its own.
    """
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, _raise)


def say_stopped(code: int = STOPPED) -> int:
    """Print the one line of a stopped command.

    Args:
        code: the exit code.

    Returns:
        The exit code.
    """
    print("pmixseg: stopped.", file=sys.stderr, flush=True)  # noqa: T201  # the command line's own output
    return code


def _exit(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"pmixseg: stopped.\n")  # print could be what the signal has interrupted
    os._exit(STOPPED)


def _raise(signum: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            _exit(signum, frame)
        frame = frame.f_back
    raise KeyboardInterrupt
