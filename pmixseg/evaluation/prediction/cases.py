"""Predict one case on every combination, as label maps in the grid of its source."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from scipy.special import entr
from torch import Tensor

from pmixseg.argument_checks import check_fields, takes_no
from pmixseg.data.patches import CaseItem
from pmixseg.data.scans.boxes import Box
from pmixseg.data.scans.geometry import Geometry
from pmixseg.describe import COUNT, NOT_NEGATIVE, SHARE, Ranges
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.postprocess import check_names, postprocess
from pmixseg.evaluation.prediction.windows import BatchSize, Blend, Predictor, iterate_combinations
from pmixseg.evaluation.scores.calibration import CaseCalibration, Temperatures, tempered
from pmixseg.evaluation.scores.metrics import CaseMetrics, Conventions
from pmixseg.files import inside
from pmixseg.task import Combination, Task, format_combination, presence

ACCUMULATOR_BYTES = 1 << 30
"""Probabilities that may be held at once: combinations are done in chunks of this size."""

Validation = Literal["auto", "all", "balanced", "drawn"]
"""Which combinations a validation case is scored on."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Set how predictions are made and scored; every result file records it.

    Args:
        window: inference window in voxels; ``None``: the training patch.
        overlap: share of a window that its neighbour covers.
        blend: how overlapping windows are averaged.
        batch_size: windows in one forward pass; ``auto``: 1 on a CPU, on a GPU as many as fill it
            and its memory holds.
        postprocess: names of post-processing steps, in order (none by default).
        conventions: empty-mask and percentile rules.
        examples: test cases per process of which a small copy is kept for pictures (under 1 MB
            each); a report shows the worst of them.
        records: file of the results in the run folder, ``.csv`` or ``.parquet``.
        calibration: whether records hold ECE and Brier score.
        validation: combinations that a case is validated on, where a module trains for several:
            ``all`` of what was acquired; the few of :func:`~pmixseg.task.balanced_combinations`;
            one, ``drawn`` by the module's sampler; or ``auto``: all, where one encoding serves
            them and they are at most 15, else the balanced ones. A validation of a U-Net or RFNet
            on 15 combinations takes 9 to 11 times as long as on one, on the balanced 5 3 to 4
            times; where every combination is encoded anew it is 14 and 5 times.
        temperatures: number of modalities shown -> temperature of the probabilities, as
            ``pmixseg validate --calibrate`` fits them; they change no label. ``None``: all 1.

    Raises:
        InputError: a window, overlap, blending, batch size, number of examples, post-processing
            or validation that does not exist, a temperature that is not positive, or records of
            another ending.
    """

    ranges = Ranges(window=COUNT, batch_size=COUNT, overlap=SHARE, examples=NOT_NEGATIVE)

    window: tuple[int, int, int] | None = None
    overlap: float = 0.5
    blend: Blend = "gaussian"
    batch_size: BatchSize = "auto"
    postprocess: tuple[str, ...] = ()
    conventions: Conventions = field(default_factory=Conventions)
    examples: int = 64
    records: str = "records.csv"
    calibration: bool = True
    validation: Validation = "auto"
    temperatures: Mapping[Any, float] | None = None  # JSON has texts for keys

    def __post_init__(self) -> None:
        check_fields(self)
        check_names(self.postprocess)
        inside(Path(), self.records, "evaluation.records")
        if Path(self.records).suffix not in (".csv", ".parquet"):
            raise InputError(
                f"evaluation.records is '{self.records}'; give the name of a .csv or .parquet file "
                "in the run folder."
            )
        if self.temperatures is not None:
            checked = dict(Temperatures(self.temperatures).by_size)
            object.__setattr__(self, "temperatures", checked)

    def temperature(self, n_present: int) -> float:
        """Return the temperature of predictions from so many modalities."""
        return 1.0 if self.temperatures is None else self.temperatures.get(n_present, 1.0)

    @classmethod
    def of(cls, settings: EvaluationSettings | Mapping[str, Any] | None) -> EvaluationSettings:
        """Make settings from settings, from :meth:`to_dict`, or from nothing (the defaults)."""
        if settings is None:
            return cls()
        if isinstance(settings, EvaluationSettings):
            return settings
        if not isinstance(settings, Mapping):
            raise InputError(f"evaluation is {settings!r}; give EvaluationSettings, or a mapping.")
        values, known = dict(settings), [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise InputError(takes_no("evaluation", name, known))
        if isinstance(values.get("conventions"), Mapping):
            values["conventions"] = Conventions.from_dict(values["conventions"])
        values["postprocess"] = values.get("postprocess") or ()
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return primitives only."""
        return asdict(self)


class CasePrediction:
    """Probabilities of one case for one combination, where that combination has voxels.

    No dataclass: Lightning would take one apart to move what it finds in it.

    Args:
        combination: what the network was shown.
        probabilities: ``[C, d, h, w]`` in ``box`` of the prepared grid, at temperature 1.
        box: union of the boxes of the combination's modalities; background outside.
        geometry: the way back to the source.
        task: meaning of the classes.
        steps: post-processing, applied to label maps in the source grid.
        temperature: of the probabilities that are scored and written; labels do not depend on it.
    """

    def __init__(
        self,
        combination: Combination,
        probabilities: Float[Tensor, "c d h w"],
        box: Box,
        geometry: Geometry,
        task: Task,
        steps: tuple[str, ...] = (),
        temperature: float = 1.0,
    ) -> None:
        self.combination = combination
        self.probabilities = probabilities
        self.box = box
        self.geometry = geometry
        self.task = task
        self.steps = steps
        self.temperature = temperature

    @property
    def classes(self) -> Int64[Tensor, "d h w"]:
        """Most probable class in ``box``."""
        # The first of equal values, as argmax gives, but many times faster on a CPU.
        return self.probabilities.max(0).indices

    def on_grid(self) -> Int64[Tensor, "d h w"]:
        """Return the likeliest class in the store's crop, background where nothing was shown."""
        whole = self.geometry.box()
        classes = self.classes
        if self.box == whole:
            return classes
        placed = classes.new_zeros(whole.shape)
        placed[self.box.relative_to(whole).slices] = classes
        return placed

    @property
    def calibrated(self) -> Float[Tensor, "c d h w"]:
        """Probabilities at the temperature that was fitted, in ``box``."""
        return tempered(self.probabilities, self.temperature)

    def source_probabilities(self) -> Float[np.ndarray, "c x y z"]:
        """Return calibrated probabilities in the source grid; background 1 outside ``box``."""
        if not self.geometry.resampled:
            return self._to_source(self.calibrated)
        made = torch.from_numpy(self._to_source(self.probabilities))
        if self.temperature != 1:  # only now, since no temperature changes a label
            made = torch.where(made[1:].any(0), tempered(made, self.temperature), made)
        return made.numpy()

    def _to_source(self, probabilities: Float[Tensor, "c d h w"]) -> Float[np.ndarray, "c x y z"]:
        return self.geometry.to_source(probabilities.cpu().numpy(), self.box, order=1, first=1)

    def source_entropy(self) -> Float[np.ndarray, "x y z"]:
        r"""Compute the voxel-wise uncertainty :math:`-\sum_c p_c \ln p_c` in nats, 0 to ln C."""
        return entropy_of(self.source_probabilities())

    def labels(self) -> UInt8[np.ndarray, "x y z"]:
        """Return the class indices in the source grid and orientation, post-processed.

        With a resampled grid, probabilities are resampled and then compared: nearest-neighbour
        labels would have the coarse grid's steps.
        """
        if self.geometry.resampled:
            probabilities = self.probabilities.cpu().numpy()
            labels = self.geometry.to_source_classes(probabilities, self.box)
        else:
            classes = self.classes.to(torch.uint8).cpu().numpy()
            labels = self.geometry.to_source(classes, self.box, order=0)
        return postprocess(labels, self.steps, self.task, self.geometry.source_affine)


Rows = list[dict[str, Any]]
Each = Callable[[Callable[[CasePrediction], Rows], Iterable[CasePrediction]], Iterable[Rows]]
"""How a function is applied to all predictions of a case, in their order."""


def predict_case(
    predictor: Predictor,
    image: Float[Tensor, "m d h w"],
    geometry: Geometry,
    task: Task,
    combinations: Sequence[Combination],
    window: Sequence[int],
    settings: EvaluationSettings,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[CasePrediction]:
    """Predict one prepared case for several combinations, sharing encodings where that is exact.

    The crop of a case depends on what is shown: it is the union of the shown modalities' boxes.
    Combinations with equal boxes share windows, and with them the encoding; so the result for a
    combination is what :func:`pmixseg.inference.segment` computes from these files alone.

    The predictor is in eval mode, and the image, in ``geometry.box()``, has its channels in the
    order of ``predictor.modalities``. Combinations are subsets of what the case has; predictions
    come grouped by box. ``progress`` gets (windows done, windows in all) of each group.
    """
    # Combinations whose modalities fill the same box share its windows.
    groups: dict[Box, list[Combination]] = {}
    for combination in combinations:
        groups.setdefault(geometry.box(combination), []).append(combination)
    whole = geometry.box()
    for box, members in groups.items():
        crop = image[(slice(None), *box.relative_to(whole).slices)]
        shown = torch.tensor([presence(c, predictor.modalities) for c in members])
        # As many of them at a time as memory holds sums for.
        size = 4 * predictor.num_classes * int(np.prod(box.shape))
        predictions = iterate_combinations(
            predictor,
            crop,
            shown,
            patch=window,
            overlap=settings.overlap,
            blend=settings.blend,
            batch_size=settings.batch_size,
            chunk=max(1, ACCUMULATOR_BYTES // size),
            progress=progress,
        )
        for rows, probabilities in predictions:
            for row, one in zip(rows, probabilities, strict=True):
                yield CasePrediction(
                    members[row],
                    one,
                    box,
                    geometry,
                    task,
                    settings.postprocess,
                    settings.temperature(len(members[row])),
                )


def entropy_of(probabilities: Float[np.ndarray, "c x y z"]) -> Float[np.ndarray, "x y z"]:
    r"""Compute the entropy :math:`-\sum_c p_c \ln p_c` in nats."""
    # One class at a time: the terms of all are as large as the probabilities.
    total: Float[np.ndarray, "x y z"] = functools.reduce(np.add, map(entr, probabilities))
    return total.clip(min=0)


def score_case(
    predictions: Iterable[CasePrediction],
    item: CaseItem,
    task: Task,
    settings: EvaluationSettings,
    each: Each = map,
) -> Rows:
    """Score predictions in the native grid, in mm.

    Calibration (``ece``, ``brier``) is measured in the prepared grid, where probabilities live,
    over the voxels in which any sequence of the case has signal: the same for every combination.

    One row per combination and region; none where the case has no label. ``each`` applies a
    function to all predictions, in their order; several threads may.
    """
    truth, geometry = item["stored"].native_label(), item["stored"].geometry
    if truth is None:  # then nothing is predicted either
        return []
    # What all predictions of the case are compared with.
    metrics = CaseMetrics(truth, task, geometry.source_zooms, settings.conventions)
    calibration: CaseCalibration | None = None
    if settings.calibration:
        brain = (item["image"] != 0).any(0).cpu()
        calibration = CaseCalibration(item["label"], task, brain)

    def scored(prediction: CasePrediction) -> Rows:
        """Return one row per region."""
        bins = {}
        if calibration is not None:
            place = prediction.box.relative_to(geometry.box()).slices
            bins = calibration.score(prediction.calibrated, place)
        named = {
            "case": item["case_id"],
            "combination": format_combination(prediction.combination),
            "n_present": len(prediction.combination),
        }
        rows = []
        for row in metrics.score(prediction.labels()):
            if row["region"] in bins:
                row |= {"ece": bins[row["region"]].ece, "brier": bins[row["region"]].brier}
            rows.append(named | row)
        return rows

    return [row for rows in each(scored, predictions) for row in rows]
