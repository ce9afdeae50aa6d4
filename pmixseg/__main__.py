"""Run the command line: ``python -m pmixseg`` and the ``pmixseg`` console script."""

from __future__ import annotations

import sys

from pmixseg.interrupt import (
    STOPPED,
    exit_on_interrupt,
    ignore_interrupt_at_exit,
    report_stop,
    stopping_code,
)


def _without_loaders(ignored: sys.UnraisableHookArgs) -> None:
    # A loader whose workers could not start is told in a sentence; its end adds a traceback.
    if "DataLoaderIter" not in repr(ignored.object):
        sys.__unraisablehook__(ignored)


def main() -> int:
    """Run one command in a process that is the command's alone; see :func:`pmixseg.cli.main`."""
    exit_on_interrupt()
    ignore_interrupt_at_exit()
    sys.unraisablehook = _without_loaders
    try:
        from pmixseg import cli  # after the line above: this import takes a while
        from pmixseg.cli.allocator import keep_freed_memory
        from pmixseg.errors import warn_in_one_line

        keep_freed_memory()
        warn_in_one_line()  # after the imports: Lightning sets a format of its own
        code = cli.main()
    except KeyboardInterrupt as error:
        code = report_stop(stopping_code(error) or STOPPED)
    exit_on_interrupt()  # Ctrl-C does not wait for what is still being closed
    if code == STOPPED:
        # Python ends by the signal itself if Ctrl-C once came in the midst of an exec() of text,
        # as dataclasses use it; the next exec() takes that mark away.
        exec("")
    return code


if __name__ == "__main__":
    sys.exit(main())
