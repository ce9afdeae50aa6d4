"""A training whose loss is no longer finite ends, and says since when and what to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pmixseg.errors import InputError

NEVER = torch.iinfo(torch.int64).max


class FiniteLoss:
    """Remember the first step at which each part of the loss was not finite.

    On a GPU nothing waits for a value: the steps are kept on the device until :meth:`check` asks.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._first: Tensor | None = None

    def see(self, parts: Mapping[str, Tensor], step: int) -> None:
        """Look at the parts of the loss of one step.

        Args:
            parts: name -> value; the same names in every step.
            step: number of the optimizer step.
        """
        values = torch.stack([value.detach().float() for value in parts.values()])
        if self._first is None or tuple(parts) != self._names:
            self._names = tuple(parts)
            self._first = torch.full(values.shape, NEVER, device=values.device)
        now = torch.where(values.isfinite(), NEVER, step)
        self._first = torch.minimum(self._first, now)

    def check(self, rate: float) -> None:
        """Ask for the values.

        Args:
            rate: learning rate of the training, for the advice.

        Raises:
            InputError: some part was not finite.
        """
        if self._first is None:
            return
        steps: Sequence[int] = self._first.tolist()
        if min(steps) == NEVER:
            return
        self._first = None
        guilty = [n for n, s in zip(self._names, steps, strict=True) if s == min(steps)]
        raise InputError(
            f"the loss is not finite since step {min(steps)} ({', '.join(guilty)}), so the "
            f"training ends; try a lower learning rate than {rate:g}, "
            "--trainer.gradient_clip_val=1, or a lower weight of that term."
        )
