"""Hold a module without making it a part of the holder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Borrowed(Generic[T]):
    """Hold a module without registering it.

    ``nn.Module`` takes every module among its attributes for a part of its own: into the
    checkpoint, the optimizer, DDP's buckets and ``train()``. What stands in a ``Borrowed`` is in
    none of them; its owner looks after it.

    Args:
        value: what is borrowed; ``None`` where there is nothing.

    Example:
        >>> from torch import nn
        >>> reader = nn.Module()
        >>> reader.teacher = Borrowed(nn.Linear(1, 1))
        >>> list(reader.parameters()), reader.teacher.value.in_features
        ([], 1)
    """

    value: T
