"""Set how the C library keeps freed memory while a command runs."""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of ``mallopt``, as in glibc's malloc.h."""
SETTINGS = {M_MMAP_THRESHOLD: 1 << 30, M_TRIM_THRESHOLD: (1 << 31) - 1, M_TOP_PAD: 1 << 26}
"""Bytes: blocks up to the first come from the heap, whose free end is kept up to the second."""


def keep_freed_memory() -> bool:
    """Let glibc use freed memory again instead of handing it back to the system.

    Features of a volume are tens of megabytes. glibc asks the system anew for every block of that
    size, and the system fills its pages with zeros, which on a CPU costs as much as the layer that
    writes into them (measured: ``experiments/benchmarks/README.md``, section Backbones).

    Returns:
        Whether it was done. Not without glibc, and not where the environment already says what
        malloc shall do (``MALLOC_…_``, ``GLIBC_TUNABLES``) or puts another in its place
        (``LD_PRELOAD``).
    """
    configured = any(name.startswith("MALLOC_") for name in os.environ)
    if configured or "GLIBC_TUNABLES" in os.environ or "LD_PRELOAD" in os.environ:
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    accepted = [library.mallopt(name, value) for name, value in SETTINGS.items()]
    return all(accepted)
