"""A copy of the test's process, where a new one would first import libraries for seconds."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any


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
