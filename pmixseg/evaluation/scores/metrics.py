"""Scores of predictions against the truth of one case, region by region, in the native grid.

Everything about the truth is computed once; a case is usually scored for many combinations.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from pmixseg.data.scans.geometry import Spacing
from pmixseg.errors import InputError
from pmixseg.evaluation.records.measures import names_of
from pmixseg.evaluation.scores.conventions import Conventions, dice
from pmixseg.evaluation.scores.lesions import RULES, Lesions
from pmixseg.evaluation.scores.regions import LabelMap, RegionMasks
from pmixseg.task import Task

__all__ = ["REGION_MEASURES", "CaseMetrics", "Conventions", "region_dice"]

REGION_MEASURES = names_of("overlap", "distance", "surface", "presence")
"""Every measure of a region, in the order of a record; lesion-wise ones follow if asked for."""
LESION_MEASURES = names_of("lesion")


class CaseMetrics:
    """Scores predictions of one case; what depends on the truth alone is computed once.

    Args:
        truth: class indices in the native grid, ``[d, h, w]``.
        task: names the regions.
        spacing: mm along each axis of ``truth``.
        conventions: what empty masks count, which percentile, and so on.

    Raises:
        InputError: ``truth`` is not a map of the task's class indices, or a spacing is not
            positive.

    Example:
        >>> from pmixseg.task import BRATS
        >>> truth = np.zeros((8, 8, 8), np.uint8)
        >>> truth[2:6, 2:6, 2:6] = 3
        >>> CaseMetrics(truth, BRATS, (1, 1, 1)).score(truth, only=("dice", "hd95"))[0]
        {'region': 'WT', 'dice': 1.0, 'hd95': 0.0}
    """

    def __init__(
        self,
        truth: LabelMap,
        task: Task,
        spacing: Sequence[float],
        conventions: Conventions | None = None,
    ) -> None:
        mm = tuple(float(s) for s in spacing)
        if len(mm) != 3 or not all(math.isfinite(s) and s > 0 for s in mm):
            raise InputError(f"spacing is {list(mm)}; give three positive numbers in mm.")
        self.task = task
        self.spacing: Spacing = (mm[0], mm[1], mm[2])
        self.conventions = conventions or Conventions()
        self.truth = RegionMasks(truth, task, self.spacing, "truth")
        self._lesions: dict[int, Lesions] = {}

    @property
    def measures(self) -> tuple[str, ...]:
        """Names that a scored row holds besides ``region``, in order."""
        return REGION_MEASURES + (LESION_MEASURES if self.conventions.lesion != "none" else ())

    def score(
        self, prediction: LabelMap, only: Collection[str] | None = None
    ) -> list[dict[str, Any]]:
        """Return every measure of every region, or only some of :attr:`measures`.

        Returns:
            One dict per region of the task: ``region``, ``dice``, ``hd95``, ``asd`` (mm), ``nsd``,
            ``sensitivity``, ``specificity``, ``precision``, ``volume_ml``, ``truth_volume_ml``,
            ``volume_error_ml`` (prediction minus truth), ``empty`` (which mask is: ``none``,
            ``truth``, ``prediction`` or ``both``), ``presence_fp`` (predicted but not there) and
            ``presence_fn`` (there but not predicted); with a lesion convention also
            ``lesion_dice``, ``lesion_hd95``, ``lesion_tp``, ``lesion_fp``, ``lesion_fn``.

        Raises:
            InputError: the prediction has another shape, or values outside the task, or ``only``
                names an unknown measure.
        """
        names = set(self.measures if only is None else only)
        unknown = sorted(names.difference(self.measures))
        if unknown:
            raise InputError(f"measures {unknown} are unknown; use names of {list(self.measures)}.")
        predicted = RegionMasks(prediction, self.task, self.spacing, "prediction")
        if predicted.shape != self.truth.shape:
            raise InputError(
                f"the prediction has shape {predicted.shape} but the truth {self.truth.shape}; "
                "bring the prediction into the truth's grid."
            )
        # Of each region, what is asked for alone.
        shared = self.truth.shared(predicted)
        rows = []
        for r, region in enumerate(self.task.regions):
            row = self._overlap(predicted.sizes[r], self.truth.sizes[r], shared[r])
            if names.intersection(names_of("distance")):
                row |= self._distance(predicted, r)
            if names.intersection(names_of("surface")):
                row["nsd"] = self._surface_dice(predicted, r)
            if names.intersection(LESION_MEASURES):
                row |= self._lesion_wise(predicted, r)
            rows.append({"region": region} | {k: row[k] for k in self.measures if k in names})
        return rows

    def _overlap(self, predicted: int, true: int, shared: int) -> dict[str, Any]:
        voxels = math.prod(self.truth.shape)
        millilitre = math.prod(self.spacing) / 1000
        negatives = voxels - true
        empty = {(0, 0): "both", (0, 1): "prediction", (1, 0): "truth", (1, 1): "none"}
        return {
            "dice": dice(predicted, true, shared),
            "sensitivity": _ratio(shared, true),
            "specificity": _ratio(negatives - (predicted - shared), negatives),
            "precision": _ratio(shared, predicted),
            "volume_ml": predicted * millilitre,
            "truth_volume_ml": true * millilitre,
            "volume_error_ml": (predicted - true) * millilitre,
            "empty": empty[int(predicted > 0), int(true > 0)],
            "presence_fp": predicted > 0 and true == 0,
            "presence_fn": predicted == 0 and true > 0,
        }

    def _distance(self, predicted: RegionMasks, r: int) -> dict[str, float]:
        rule = self.conventions
        if not predicted.sizes[r] or not self.truth.sizes[r]:
            both = predicted.sizes[r] == self.truth.sizes[r]
            value = rule.both_empty if both else rule.one_empty
            return {"hd95": value, "asd": value}
        a, b = predicted.surface(r), self.truth.surface(r)
        directed = [b.distances_from(a), a.distances_from(b)]
        pooled = np.concatenate(directed)
        if rule.percentile == "pooled":
            hd95 = np.percentile(pooled, 95)
        else:
            hd95 = max(np.percentile(d, 95) for d in directed)
        return {"hd95": float(hd95), "asd": float(pooled.mean())}

    def _surface_dice(self, predicted: RegionMasks, r: int) -> float:
        if not predicted.sizes[r] or not self.truth.sizes[r]:
            return float(predicted.sizes[r] == self.truth.sizes[r])
        a, b = predicted.surfels(r), self.truth.surfels(r)
        near = self.conventions.nsd_tolerance_mm + 1e-9  # a billionth for rounding
        agreed = a.areas[b.points.distances_from(a.points, near) <= near].sum()
        agreed += b.areas[a.points.distances_from(b.points, near) <= near].sum()
        return float(agreed / (a.areas.sum() + b.areas.sum()))

    def _lesion_wise(self, predicted: RegionMasks, r: int) -> dict[str, float]:
        if r not in self._lesions:
            kind = RULES[self.conventions.lesion]
            self._lesions[r] = kind(self.truth.mask(r), self.truth.box, self.spacing)
        return self._lesions[r].score(predicted.mask(r), predicted.box).row()


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def region_dice(
    prediction: Int[Tensor, "*shape"], truth: Int[Tensor, "*shape"], task: Task
) -> dict[str, float]:
    """Compute every region's Dice of a case, quickly and on the tensors' device (for validation).

    2·|P∩T| / (|P| + |T|); both empty gives 1.

    Example:
        >>> from pmixseg.task import BRATS
        >>> region_dice(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]), BRATS)
        {'WT': 1.0, 'TC': 0.6666666666666666, 'ET': 1.0}
    """
    classes = task.num_classes
    pairs = prediction.reshape(-1).long() * classes + truth.reshape(-1)
    table = torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes).tolist()
    scores = {}
    for region in task.regions:
        members = task.region_classes(region)
        shared = sum(table[p][t] for p in members for t in members)
        predicted = sum(sum(table[p]) for p in members)
        true = sum(row[t] for row in table for t in members)
        scores[region] = dice(predicted, true, shared)
    return scores
