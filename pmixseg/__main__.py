"""``python -m pmixseg`` and the console script."""

from __future__ import annotations

import sys


def main() -> int:
    """Run one command in a process that is the command's alone; see :func:`pmixseg.cli.main`."""
    try:
        # Imported here, so that Ctrl-C in the first second is one line as well.
        from pmixseg import cli
        from pmixseg.cli.allocator import keep_freed_memory

        keep_freed_memory()
        return cli.main()
    except KeyboardInterrupt:
        print("pmixseg: stopped.", file=sys.stderr)  # noqa: T201  # the command line's own output
        return 130


if __name__ == "__main__":
    sys.exit(main())
