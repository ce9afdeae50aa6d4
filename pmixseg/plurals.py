"""Write counts in sentences: ``1 case``, ``2 cases``."""

from __future__ import annotations


def count_of(number: int, one: str, many: str | None = None) -> str:
    """Say how many there are of something.

    Args:
        number: how many.
        one: what one of them is called.
        many: what several are called; by default ``one`` with an ``s``.

    Example:
        >>> count_of(1, "case"), count_of(2000, "case"), count_of(0, "case has", "cases have")
        ('1 case', '2,000 cases', '0 cases have')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"
