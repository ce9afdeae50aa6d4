"""Means over cases as torchmetrics metrics that sync under DDP and count every case once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from pmixseg.errors import InputError
from pmixseg.evaluation.scores.conventions import Conventions
from pmixseg.evaluation.scores.metrics import CaseMetrics
from pmixseg.task import Task


class CaseMeans(Metric):
    """Means over cases of numbers that were computed elsewhere.

    A case counts once, whatever the sampler repeats so that no rank goes empty: cases are told
    apart by their id, also across processes. Undefined values (NaN) are left out of a mean.

    Args:
        shape: of what every case gives.
        kwargs: arguments of :class:`torchmetrics.Metric`.

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

    def update(self, found: Tensor, case_id: str) -> None:
        """Take the numbers of one case.

        Args:
            found: of ``shape``.
            case_id: cases with the same id count once.
        """
        digest = hashlib.blake2b(case_id.encode(), digest_size=8).digest()
        key = int.from_bytes(digest) >> 1
        self.keys.append(torch.tensor([key], device=self.device))
        self.values.append(found.to(self.device, torch.float32)[None])

    def compute(self) -> Any:
        """Means over cases, of ``shape``; NaN without any case."""
        return self.means().float()

    def means(self) -> Tensor:
        """Means over cases in float64, on the CPU."""
        keys, values = dim_zero_cat(self.keys), dim_zero_cat(self.values)
        # Order by key, so that the sum does not depend on which rank saw which case.
        _, first = np.unique(keys.cpu().numpy(), return_index=True)
        distinct = values[torch.from_numpy(first).to(values.device)].cpu().double()
        return distinct.nanmean(0)


class CaseScores(CaseMeans):
    """Mean over cases of any scores, per region and over regions.

    Args:
        task: names the regions.
        measures: names of numeric scores, see :data:`pmixseg.evaluation.scores.metrics.MEASURES`.
        conventions: how scores are defined.
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Raises:
        InputError: a measure is unknown or no number.

    Example:
        >>> from pmixseg.task import BRATS
        >>> scores = CaseScores(BRATS, measures=("dice",))
        >>> truth = torch.zeros(4, 4, 4, dtype=torch.uint8)
        >>> scores.update(truth, truth, (1, 1, 1), "a7")
        >>> {name: value.item() for name, value in scores.compute().items()}
        {'dice': 1.0, 'dice/WT': 1.0, 'dice/TC': 1.0, 'dice/ET': 1.0}
    """

    def __init__(
        self,
        task: Task,
        measures: Sequence[str] = ("dice", "hd95"),
        conventions: Conventions | None = None,
        **kwargs: Any,
    ) -> None:
        self.measures = tuple(measures)
        super().__init__([len(task.regions), len(self.measures)], **kwargs)
        self.task = task
        self.conventions = conventions or Conventions()
        nothing = np.zeros((1, 1, 1), np.uint8)
        known = CaseMetrics(nothing, task, (1, 1, 1), self.conventions).measures
        unknown = [m for m in self.measures if m not in known or m == "empty"]
        if unknown or not self.measures:
            raise InputError(f"measures {unknown} cannot be averaged; use names of {list(known)}.")

    def update(  # type: ignore[override]  # scored here, from what a metric of torchmetrics takes
        self,
        prediction: Tensor | NDArray[np.integer[Any]],
        truth: Tensor | NDArray[np.integer[Any]],
        spacing: Sequence[float],
        case_id: str,
    ) -> None:
        """Score one case.

        Args:
            prediction: class indices, ``[d, h, w]``.
            truth: class indices, the same shape.
            spacing: mm along each axis.
            case_id: cases with the same id count once.
        """
        case = CaseMetrics(_array(truth), self.task, spacing, self.conventions)
        rows = case.score(_array(prediction), only=self.measures)
        scored = [[float(row[m]) for m in self.measures] for row in rows]
        super().update(torch.tensor(scored), case_id)

    def compute(self) -> dict[str, Tensor]:
        """``{measure}`` and ``{measure}/{region}``, means over cases; NaN without any case."""
        means = self.means()
        found: dict[str, Tensor] = {}
        for m, measure in enumerate(self.measures):
            found[measure] = means[:, m].nanmean().float()
            for r, region in enumerate(self.task.regions):
                found[f"{measure}/{region}"] = means[r, m].float()
        return found


def _array(volume: Tensor | NDArray[np.integer[Any]]) -> NDArray[Any]:
    return volume.cpu().numpy() if isinstance(volume, Tensor) else volume
