"""Use a network that another module owns: no second owner, and eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

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


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules into eval mode, and every part back into the mode that it had.

    ``module.train(True)`` afterwards would also wake what is frozen in eval mode inside it. No
    part is asked for a tensor, so the block may stand in a compiled graph.

    Args:
        modules: with all their parts.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluating(net):
        ...     print(net.training, net[0].training)
        False False
        >>> net.training, net[0].training, net[1].training
        (True, True, False)
    """
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
