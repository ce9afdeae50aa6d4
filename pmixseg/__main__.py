"""``python -m pmixseg`` and the console script."""

from __future__ import annotations

import sys

from pmixseg import cli
from pmixseg.cli.allocator import keep_freed_memory


def main() -> int:
    """Run one command in a process that is the command's alone; see :func:`pmixseg.cli.main`."""
    keep_freed_memory()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
