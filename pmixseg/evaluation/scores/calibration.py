"""Calibration of probabilities: ECE and Brier score per region, and temperature scaling.

Voxels far from the head are trivially right and would hide everything, so scores are taken over
the voxels that the caller names, usually the brain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from pmixseg.errors import InputError
from pmixseg.task import Task
from pmixseg.types import full_precision

BINS = 15
TEMPERATURE_RANGE = (0.05, 20.0)


@dataclass(frozen=True)
class Reliability:
    """Predicted probability against observed frequency, in bins of equal width.

    Args:
        count: voxels per bin, ``[bins]``.
        confidence: sum of their predicted probabilities.
        positive: how many of them truly belong to the region.
        squared: sum over all voxels of (p - y)².
    """

    count: NDArray[np.int64]
    confidence: NDArray[np.float64]
    positive: NDArray[np.int64]
    squared: float

    @property
    def ece(self) -> float:
        """Expected calibration error: Σ_b n_b / n · |frequency_b - mean probability_b|.

        Source: Guo et al. 2017 (arXiv 1706.04599), for the probability of belonging to the region.
        NaN without voxels.
        """
        voxels = int(self.count.sum())
        if not voxels:
            return math.nan
        return float(np.abs(self.positive - self.confidence).sum() / voxels)

    @property
    def brier(self) -> float:
        """Brier score: mean of (p - y)². NaN without voxels."""
        voxels = int(self.count.sum())
        return self.squared / voxels if voxels else math.nan


class CaseCalibration:
    """Calibration of many predictions of one case; what depends on the truth is done once.

    Voxels that a prediction does not reach, because nothing that it was shown lies there, count as
    certain background: all predictions of a case are scored on the same voxels. Voxels count where
    ``where`` says so; by default all do.
    """

    def __init__(
        self, truth: Int[Tensor, "d h w"], task: Task, where: Bool[Tensor, "d h w"] | None = None
    ) -> None:
        self.task = task
        self._truth = truth.cpu()
        self._where = torch.ones_like(self._truth, dtype=torch.bool) if where is None else where
        self._chosen: dict[Any, tuple[Tensor, dict[str, Tensor]]] = {}
        members = {r: torch.tensor(task.region_classes(r)) for r in task.regions}
        self._inside = {r: torch.isin(self._truth, own) for r, own in members.items()}
        self._voxels = int(self._where.sum())
        self._positive = {r: int(m[self._where].sum()) for r, m in self._inside.items()}

    def score(
        self, probabilities: Float[Tensor, "c d h w"], box: tuple[slice, slice, slice] | None = None
    ) -> dict[str, Reliability]:
        """Count the bins of one prediction, per region.

        The probability of a region is the sum over its classes. ``box`` says where the prediction
        lies in the truth's array; default all of it.
        """
        # Other accelerators than CUDA have no float64.
        device = probabilities.device if probabilities.is_cuda else torch.device("cpu")
        index, positives = self._choose(box, device)
        # Class by class: voxels of all chosen at once take four times as long.
        rows = probabilities.to(device).flatten(1)
        classes = {c for region in positives for c in self.task.region_classes(region)}
        chosen = {c: rows[c].index_select(0, index) for c in classes}
        by_region = {}
        for region, members in positives.items():
            first, *others = self.task.region_classes(region)
            p = chosen[first].to(torch.float64, copy=True)
            for other in others:
                p += chosen[other]
            p.clamp_(0, 1)
            bin_of = (p * BINS).long().clamp_(max=BINS - 1)
            count = bin_of.bincount(minlength=BINS).cpu().numpy()
            # On a GPU in a fixed order, if torch is asked for one; a weighted bincount has none.
            confidence = p.new_zeros(BINS).index_add_(0, bin_of, p).cpu().numpy()
            true_p = p[members]
            positive = bin_of[members].bincount(minlength=BINS).cpu().numpy()
            # Voxels out of reach: probability 0, right unless the truth is there.
            count[0] += self._voxels - len(p)
            unreached = self._positive[region] - len(members)
            positive[0] += unreached
            # Σ(p - y)² = Σp² + Σ over positives of (1 - 2p)
            squared = float(p @ p + (1 - 2 * true_p).sum()) + unreached
            by_region[region] = Reliability(count, confidence, positive, squared)
        return by_region

    def _choose(
        self, box: tuple[slice, slice, slice] | None, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return voxels that count inside a box, and which of them belong to each region."""
        key = (device, None if box is None else tuple((s.start, s.stop) for s in box))
        if key not in self._chosen:
            cut = box or (slice(None),) * 3
            where = self._where[cut].cpu()
            inside = {r: m[cut][where] for r, m in self._inside.items()}
            self._chosen[key] = (
                where.flatten().nonzero()[:, 0].to(device),
                {r: m.nonzero()[:, 0].to(device) for r, m in inside.items()},
            )
        return self._chosen[key]


def reliability(
    probabilities: Float[Tensor, "c d h w"],
    truth: Int[Tensor, "d h w"],
    task: Task,
    where: Bool[Tensor, "d h w"] | None = None,
) -> dict[str, Reliability]:
    """Count the calibration of one prediction, per region; see :class:`CaseCalibration`.

    Example:
        >>> from pmixseg.task import BRATS
        >>> p = torch.tensor([0.25, 0.0, 0.75, 0.0]).reshape(4, 1, 1, 1)
        >>> found = reliability(p, torch.tensor([[[2]]]), BRATS)
        >>> found["WT"].ece, found["WT"].brier
        (0.25, 0.0625)
    """
    return CaseCalibration(truth, task, where).score(probabilities)


def tempered(probabilities: Float[Tensor, "c ..."], temperature: float) -> Float[Tensor, "c ..."]:
    """Return softmax(log p / T), what logits divided by T would have given; no label changes.

    T > 1 makes them less certain. Classes come first.
    """
    if temperature == 1.0:
        return probabilities
    exact = full_precision(probabilities)
    # A probability of 0 has no logarithm; the smallest number stands for it.
    return exact.clamp_min(torch.finfo(exact.dtype).tiny).log_().div_(temperature).softmax(0)


@dataclass(frozen=True)
class Temperatures:
    """One temperature per number of present modalities.

    A network is usually more sure of itself than it should be, the more so the less it sees. Of
    ``by_size``, number of present modalities -> T > 0, a size that is not listed keeps T = 1.

    Example:
        >>> softer = Temperatures({1: 2.0})
        >>> [round(v, 3) for v in tempered(torch.tensor([0.9, 0.1]), softer.by_size[1]).tolist()]
        [0.75, 0.25]
    """

    by_size: Mapping[int, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_size", {int(k): float(v) for k, v in self.by_size.items()})
        bad = {k: v for k, v in self.by_size.items() if not (math.isfinite(v) and v > 0)}
        if bad:
            raise InputError(f"temperatures {bad} are not positive numbers; fit or correct them.")


@dataclass
class TemperatureFit:
    """Collects voxels of validation cases and finds the temperatures of least cross-entropy.

    Of one prediction ``voxels_per_case`` are kept, drawn without replacement.

    Example:
        >>> fit = TemperatureFit()
        >>> logits = torch.tensor([[4.0, 4.0, 4.0, 4.0], [0.0, 0.0, 0.0, 0.0]]).reshape(2, 4, 1, 1)
        >>> fit.add(logits, torch.tensor([0, 0, 0, 1]).reshape(4, 1, 1), n_present=1)
        >>> round(fit.temperatures().by_size[1], 3)  # right in 3 of 4: softmax(4 / T) = 3 / 4
        3.641
    """

    voxels_per_case: int = 20_000
    seed: int = 0
    _logits: dict[int, list[Tensor]] = field(default_factory=dict, repr=False)
    _truth: dict[int, list[Tensor]] = field(default_factory=dict, repr=False)
    _added: int = field(default=0, repr=False)

    def add(
        self,
        logits: Float[Tensor, "c d h w"],
        truth: Int[Tensor, "d h w"],
        n_present: int,
        where: Bool[Tensor, "d h w"] | None = None,
    ) -> None:
        """Add one validation case seen through one combination.

        Logits may be logarithms of probabilities (averaged over windows); ``where`` are the voxels
        that count, by default all.
        """
        chosen = logits.flatten(1) if where is None else logits[:, where]
        labels = truth.flatten() if where is None else truth[where]
        draw = np.random.default_rng((self.seed, self._added))
        size = min(self.voxels_per_case, len(labels))
        kept = torch.from_numpy(draw.choice(len(labels), size, replace=False))
        self._added += 1
        self._logits.setdefault(n_present, []).append(chosen[:, kept.to(chosen.device)].cpu())
        self._truth.setdefault(n_present, []).append(labels[kept.to(labels.device)].long().cpu())

    def temperatures(self) -> Temperatures:
        """Fit every size that was added.

        Cross-entropy is convex in 1/T, so its only root of slope is found by bisection, inside
        :data:`TEMPERATURE_RANGE`.
        """
        if not any(len(t) for parts in self._truth.values() for t in parts):
            raise InputError("no validation voxel to fit temperatures on; give labelled cases.")
        return Temperatures(
            {
                n: _fit(torch.cat(z, 1).double(), torch.cat(self._truth[n]))
                for n, z in sorted(self._logits.items())
            }
        )

    def cross_entropy(self, n_present: int, temperature: float) -> float:
        """Return the mean cross-entropy in nats of the voxels of one size at a temperature."""
        logits = torch.cat(self._logits[n_present], 1).double() / temperature
        truth = torch.cat(self._truth[n_present])
        return float(torch.nn.functional.cross_entropy(logits.T, truth))

    def ece(self, n_present: int, temperature: float, task: Task) -> float:
        """Compute the ECE of the voxels of one size at a temperature, mean over the task's regions.

        It is not what is minimised and may rise where cross-entropy and Brier score fall: one T
        for all voxels softens also the many that are surely background.
        """
        logits = torch.cat(self._logits[n_present], 1).double() / temperature
        truth = torch.cat(self._truth[n_present])
        bins = reliability(logits.softmax(0)[..., None, None], truth[:, None, None], task)
        return float(np.mean([one.ece for one in bins.values()]))


def _fit(logits: Float[Tensor, "c n"], truth: Int[Tensor, " n"]) -> float:
    right = logits.gather(0, truth[None]).mean()

    def slope(sharpness: float) -> float:
        expected = ((logits * sharpness).softmax(0) * logits).sum(0).mean()
        return float(expected - right)

    low, high = 1 / TEMPERATURE_RANGE[1], 1 / TEMPERATURE_RANGE[0]
    for _ in range(50):
        middle = math.sqrt(low * high)
        if slope(middle) <= 0:
            low = middle
        else:
            high = middle
    return 1 / math.sqrt(low * high)
