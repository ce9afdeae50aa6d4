"""Means over cases as torchmetrics metrics that sync under DDP and count every case once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class CaseMeans(Metric):
    """Means over cases of numbers that were computed elsewhere.

    A case counts once, whatever the sampler repeats so that no rank goes empty: cases are told
    apart by their id, also across processes. Undefined values (NaN) are left out of a mean. Every
    case gives numbers of one ``shape``.

    Example:
        >>> dice = CaseMeans([2])
        >>> dice.update(torch.tensor([0.5, 1.0]), "a7")
        >>> dice.update(torch.tensor([0.7, float("nan")]), "b2")
        >>> dice.update(torch.tensor([0.5, 1.0]), "a7")
        >>> dice.compute()
        tensor([0.6000, 1.0000])
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    keys: list[Tensor]
    values: list[Tensor]

    def __init__(self, shape: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shape = tuple(shape)
        self.add_state("keys", [], dist_reduce_fx="cat")
        self.add_state("values", [], dist_reduce_fx="cat")
        self._start()

    def _start(self) -> None:
        # A rank that saw no case must still join the gathering, with tensors of the right shape.
        self.keys.append(torch.zeros(0, dtype=torch.int64, device=self.device))
        self.values.append(torch.zeros(0, *self.shape, device=self.device))

    def reset(self) -> None:
        """Forget every case."""
        super().reset()
        self._start()

    def update(self, numbers: Tensor, case_id: str) -> None:
        """Take the numbers of one case; cases with the same id count once."""
        digest = hashlib.blake2b(case_id.encode(), digest_size=8).digest()
        key = int.from_bytes(digest) >> 1
        self.keys.append(torch.tensor([key], device=self.device))
        self.values.append(numbers.to(self.device, torch.float32)[None])

    def compute(self) -> Any:
        """Return the means over cases, of ``shape``; NaN without any case."""
        keys, values = dim_zero_cat(self.keys), dim_zero_cat(self.values)
        # Order by key, so that the sum does not depend on which rank saw which case.
        _, first = np.unique(keys.cpu().numpy(), return_index=True)
        distinct = values[torch.from_numpy(first).to(values.device)].cpu().double()
        return distinct.nanmean(0).float()
