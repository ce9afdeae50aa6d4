"""Run the command line: ``python -m pmixseg`` and the ``pmixseg`` console script."""

from __future__ import annotations

import sys

from pmixseg.interrupt import STOPPED, exit_on_interrupt, finish_in_peace, say_stopped


def _without_loaders(ignored: sys.UnraisableHookArgs) -> None:
    # A loader whose workers could not start is told in a sentence; its end adds a traceback.
    if "DataLoaderIter" not in repr(ignored.object):
        sys.__unraisablehook__(ignored)


def main() -> int:
    """Run one command in a process that is the command's alone; see :func:`pmixseg.cli.main`."""
    exit_on_interrupt()
    finish_in_peace()
    sys.unraisablehook = _without_loaders
    try:
        from pmixseg import cli  # after the line above: this import takes a while
        from pmixseg.cli.allocator import keep_freed_memory

        keep_freed_memory()
        code = cli.main()
    except KeyboardInterrupt:
        code = say_stopped()
    exit_on_interrupt()  # Ctrl-C does not wait for what is still being closed
    if code == STOPPED:
        # Python ends by the signal itself if Ctrl-C once came in the midst of an exec() of text,
        # as dataclasses use it; the next exec() takes that mark away.
        exec("")
    return code


if __name__ == "__main__":
    sys.exit(main())
