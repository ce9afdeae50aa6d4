"""Write text in CSV files so that no spreadsheet runs it as a formula."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

_FORMULA = re.compile(r"'*[=+\-@\t\r].")


def _acts(text: Any) -> bool:
    """Say whether a spreadsheet may run it, or it is such a text with apostrophes before it."""
    if not isinstance(text, str) or not _FORMULA.match(text):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def quote_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """Put an apostrophe before text that a spreadsheet would take for a formula.

    Example:
        >>> table = pd.DataFrame({"run": ["=1+1", "-x", "a"], "dice": [-1.0, 2.0, 3.0]})
        >>> quote_formulas(table).run.tolist()
        ["'=1+1", "'-x", 'a']
    """
    return table.map(lambda cell: f"'{cell}" if _acts(cell) else cell)


def unquote_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """Take away the apostrophes of :func:`quote_formulas`.

    Example:
        >>> names = pd.DataFrame({"run": ["=1+1", "'=1+1", "'a", "-7", "-"]})
        >>> unquote_formulas(quote_formulas(names)).equals(names)
        True
    """

    def quoted(cell: Any) -> bool:
        return isinstance(cell, str) and cell.startswith("'") and _acts(cell[1:])

    return table.map(lambda cell: cell[1:] if quoted(cell) else cell)
