"""Write text in CSV files so that no spreadsheet runs it as a formula."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

_FORMULA = re.compile(r"'*[=+\-@\t\r].")


def _acts(text: str) -> bool:
    """Whether a spreadsheet may run it, or it is such a text with apostrophes before it."""
    if not _FORMULA.match(text):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def inert(table: pd.DataFrame) -> pd.DataFrame:
    """Put an apostrophe before text that a spreadsheet would take for a formula.

    Example:
        >>> inert(pd.DataFrame({"run": ["=1+1", "-x", "a"], "dice": [-1.0, 2.0, 3.0]})).run.tolist()
        ["'=1+1", "'-x", 'a']
    """

    def quoted(cell: Any) -> Any:
        return f"'{cell}" if isinstance(cell, str) and _acts(cell) else cell

    return table.map(quoted)


def original(table: pd.DataFrame) -> pd.DataFrame:
    """Take away the apostrophes of :func:`inert`.

    Example:
        >>> names = pd.DataFrame({"run": ["=1+1", "'=1+1", "'a", "-7", "-"]})
        >>> original(inert(names)).equals(names)
        True
    """

    def bare(cell: Any) -> Any:
        quoted = isinstance(cell, str) and cell.startswith("'") and _acts(cell[1:])
        return cell[1:] if quoted else cell

    return table.map(bare)
