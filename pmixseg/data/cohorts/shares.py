"""Divide a cohort among several machines or processes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pmixseg.errors import InputError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """Name one of ``total`` equal shares of a cohort.

    Cases are sorted by name and dealt like cards. So every case is in exactly one share, and the
    shares differ by one case at most. This holds as long as all machines see the same cohort.

    Args:
        number: of this share, from 1 to ``total``.
        total: how many shares there are.

    Raises:
        InputError: there is no such share.

    Example:
        >>> [Share(n, 3).of(["d", "b", "a", "c"]) for n in (1, 2, 3)]
        [['a', 'd'], ['b'], ['c']]
    """

    number: int
    total: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.total:
            raise InputError(
                f"part {self} does not exist; count from 1/{max(self.total, 1)} to "
                f"{max(self.total, 1)}/{max(self.total, 1)}."
            )

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    @classmethod
    def parse(cls, text: str | None) -> Share | None:
        """Read ``2/8``, the second of eight; ``None`` where nothing is given."""
        if text is None:
            return None
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if match is None:
            raise InputError(f"part '{text}' is not of the form 2/8, the second of eight parts.")
        return cls(int(match[1]), int(match[2]))

    def of(self, items: Sequence[Item], name: Callable[[Item], str] = str) -> list[Item]:
        """Return the items of this share of a cohort; no two have the same name."""
        return sorted(items, key=name)[self.number - 1 :: self.total]
