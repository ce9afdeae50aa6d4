"""Means of the losses of an epoch, and the loss of the progress bar, without waiting for a GPU."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class EpochMeans:
    """Sums up vectors of losses on their device."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}

    def add(self, names: tuple[str, ...], values: Tensor, samples: int) -> None:
        """Add the values of one step.

        Args:
            names: of the values.
            values: one vector, detached.
            samples: weight of the step.
        """
        before = self._sums.get(names)
        if before is None:
            self._sums[names] = (values * samples, samples)
        else:
            total, count = before
            self._sums[names] = (torch.add(total, values, alpha=samples), count + samples)

    def settle(self) -> dict[str, Tensor]:
        """Means by name; begins anew."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for names, (total, count) in self._sums.items():
            for name, value in zip(names, total.unbind(), strict=True):
                sums[name] = sums[name] + value if name in sums else value
                counts[name] = counts.get(name, 0) + count
        self._sums = {}
        return {name: value / counts[name] for name, value in sums.items()}


class LateValue:
    """A number from a GPU that is read when it has arrived, a few steps late, without waiting."""

    def __init__(self) -> None:
        self._coming: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._last: Tensor | None = None

    def put(self, value: Tensor) -> Tensor | None:
        """Send for a number.

        Args:
            value: a scalar, on any device.

        Returns:
            The newest number that has arrived, on the CPU; ``None`` before the first.
        """
        value = value.detach()
        if value.device.type != "cuda":
            return value
        host = torch.empty((), dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # untyped in torch
        event.record()
        self._coming.append((event, host))
        while self._coming and self._coming[0][0].query():  # type: ignore[no-untyped-call]  # untyped in torch
            self._last = self._coming.popleft()[1]
        return self._last
