"""How the training data of a model were prepared, as far as predictions depend on it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from pmixseg.argument_checks import check_fields
from pmixseg.data.cohorts.problems import listed
from pmixseg.data.scans.canonical import NORMALISATION, STORE_DTYPE
from pmixseg.data.scans.geometry import spacing_of
from pmixseg.data.scans.normalisation import NORMALISATIONS
from pmixseg.data.training_cases import (
    SeenCase,
    TrainingCases,
    other_voxels,
    scans_of,
    stored_cases,
    training_cases,
    voxel_sizes,
    warn_of_seen,
)
from pmixseg.describe import COUNT, POSITIVE, Ranges, describe
from pmixseg.errors import InputError, count_of
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.evaluation.prediction.scans import Recipe
from pmixseg.task import Task

DATA_ATTRIBUTES = ("spacing", "normalisation", "patch_size", "split_name")
"""Attributes of a data module that a model reads."""


@dataclass(frozen=True)
class Preparation:
    """How the training data were prepared: what a new scan must be brought to.

    Args:
        spacing: voxel size in mm that the model was trained at; ``None``: each scan's own.
        normalisation: name of the intensity normalisation.
        patch: training patch in voxels; the inference window unless settings say otherwise.
        split: name or hash of the split the model was trained on.
        seed: ``everything`` (Lightning's, for the first weights) and ``data`` (patches,
            augmentation, missingness) of that training, as far as known.
        dtype: rounding of the normalised intensities; ``None``: not known.
        cases: the split of that training, and what tells its cases; ``None``: not known.
        voxels: least and largest side in mm of the voxels of the training cases; ``None``: not
            known.
    """

    ranges = Ranges(spacing=POSITIVE, voxels=POSITIVE, patch=COUNT)

    spacing: tuple[float, float, float] | None = None
    normalisation: str | None = None
    patch: tuple[int, int, int] | None = None
    split: str | None = None
    seed: Mapping[str, int] | None = None
    dtype: str | None = None
    cases: TrainingCases | None = None
    voxels: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """Return primitives, as a checkpoint holds them."""
        described: dict[str, Any] = describe(vars(self), "preparation")
        return described

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> Preparation:
        """Read what :meth:`to_dict` wrote; what an older version did not write is not known."""
        known = {field.name: raw.get(field.name) for field in fields(cls)}
        if known["cases"] is not None:
            known["cases"] = TrainingCases.from_dict(known["cases"], where)
        try:
            return cls(**known)
        except InputError as error:
            raise InputError(
                f"{where} does not say how its data were prepared; it is damaged."
            ) from error

    def merge(self, data: Any, evaluation: EvaluationSettings, *, fitting: bool) -> Preparation:
        """Take over a data module's preparation, or check it against a checkpoint's.

        Raises:
            InputError: a trained model meets data at another spacing or normalisation; or a data
                module that does not say how its cases were prepared.
        """
        lacking = [name for name in DATA_ATTRIBUTES if not hasattr(data, name)]
        if lacking:
            raise InputError(
                f"{type(data).__name__} does not say {', '.join(lacking)} of its cases, which a "
                "checkpoint needs to prepare a new scan alike; subclass pmixseg.BraTSDataModule, "
                "or give it these attributes."
            )
        spacing = None if data.spacing is None else spacing_of(data.spacing)
        theirs = Preparation(
            spacing=spacing,
            normalisation=data.normalisation,
            dtype=getattr(data, "dtype", None),
            patch=tuple(data.patch_size),
            split=data.split_name if fitting else self.split,
            seed=_seeds(data) if fitting else self.seed,
            # The weights still know what they were trained with before.
            cases=_after(training_cases(data), self.cases) if fitting else self.cases,
            voxels=voxel_sizes(data, "train" if fitting else "test"),
        )
        # A training takes over what its data say; a trained model checks it.
        if fitting or self.normalisation is None:
            return theirs
        self.refuse_other(theirs)
        return self.on(theirs)

    def on(self, data: Preparation) -> Preparation:
        """Return the preparation of data that a trained model meets; the split stays its own."""
        if data.normalisation is None:
            return self
        if other := other_voxels(self.voxels, data.voxels):
            rank_zero_warn(f"In the test cases {other}.")
        # What was taken from data to be tested on cannot know these.
        return replace(data, split=self.split, seed=self.seed, cases=self.cases, voxels=self.voxels)

    def after(self, trained: Preparation) -> Preparation:
        """Return the preparation of a training that continues from a checkpoint."""
        if self.split and trained.split and self.split != trained.split:
            rank_zero_info(
                f"The split is {self.split}, the checkpoint had {trained.split}; no test scores "
                "the training and validation cases of either."
            )
        if self.cases and trained.cases and (other := _replaced(self.cases, trained.cases)):
            rank_zero_info(f"{other}.")
        return self.building_on(trained)

    def building_on(self, trained: Preparation) -> Preparation:
        """Return the same, with the cases of a model that begins or teaches this training."""
        return replace(self, cases=_after(self.cases, trained.cases))

    def refuse_other(self, data: Preparation, whose: str = "the checkpoint") -> None:
        """Refuse data of another spacing or normalisation than this, where both are known."""
        if self.normalisation is None or data.normalisation is None:
            return
        for what in ("spacing", "normalisation"):
            if getattr(self, what) != getattr(data, what):
                raise InputError(
                    f"{whose} was trained with {what} {getattr(self, what)}, but the data have "
                    f"{getattr(data, what)}; prepare a store with {whose}'s {what}."
                )

    def window(self, settings: EvaluationSettings, strides: Sequence[int]) -> tuple[int, int, int]:
        """Return the size of an inference window.

        Raises:
            InputError: neither the settings nor a training gave one, or the backbone's largest
                stride does not divide it.
        """
        size = settings.window or self.patch
        if size is None:
            raise InputError("no window size is known; give evaluation.window, three voxel counts.")
        if any(s % strides[-1] for s in size):
            raise InputError(
                f"the window {size} must be divisible by the backbone's largest stride, "
                f"{strides[-1]}; change evaluation.window or data.patch_size."
            )
        return size

    def recipe(
        self,
        task: Task,
        settings: EvaluationSettings,
        strides: Sequence[int],
        device: torch.device,
        checkpoint: Mapping[str, str] | None,
    ) -> Recipe:
        """Say what new scans must be brought to, and how they are segmented."""
        return Recipe(
            task,
            self.window(settings, strides),
            settings,
            self.target_spacing(),
            self.dtype or STORE_DTYPE,
            self.normalisation or NORMALISATION,
            device,
            checkpoint,
            self.voxels,
            self.cases is not None and self.cases.synthetic,
        )

    def target_spacing(self) -> tuple[float, float, float] | None:
        """Return the voxel size in mm that a new scan is brought to; ``None`` keeps the scan's own.

        Raises:
            InputError: the model was trained on intensities normalised in another way than scans
                are now.
        """
        if self.normalisation not in (None, *NORMALISATIONS):
            raise InputError(
                f"the model was trained with normalisation '{self.normalisation}', but this "
                f"version of pmixseg makes {' and '.join(NORMALISATIONS)}; use the version it was "
                "trained with."
            )
        return self.spacing


def _seeds(data: Any) -> dict[str, int]:
    """Return the seeds of a training that starts now."""
    seed = os.environ.get("PL_GLOBAL_SEED", "")  # where seed_everything leaves it
    seeds = {"everything": int(seed)} if seed.isdigit() else {}
    return {**seeds, "data": int(getattr(data, "seed", 0) or 0)}


def are_synthetic(data: Any, part: str) -> bool | None:
    """Say whether all cases of a part are of a phantom; ``None`` where the data do not tell."""
    cases = stored_cases(data, part)
    return None if cases is None else all(case.synthetic for case in cases)


def seen_cases(
    data: Any, part: str, trained: Preparation, counted: Sequence[str]
) -> list[SeenCase]:
    """Find cases in a part of a data module's split that a model knows from its training.

    ``counted`` are the parts of the training's split that count. What cannot be known, and where
    the data were split in another way than the training's, is refused.
    """
    cases = stored_cases(data, part)
    if cases is None:
        return []
    if trained.cases is None:
        drawn = not getattr(data, "split_is_chosen", True)
        if drawn and trained.split not in (None, data.split_name):
            raise InputError(
                f"the checkpoint holds no lists of its cases, and its training had the split "
                f"'{trained.split}' where this is '{data.split_name}'; name the split "
                "(--data.split), or WholeCohort for cases that it has never seen."
            )
        return []
    # By their names and by their scans; names may be of other patients in another store.
    store = data.store
    known = scans_of(store.read(name) for name in trained.cases.scans if name in store.cases)
    if other := _replaced(TrainingCases(str(store.root), scans=known), trained.cases):
        rank_zero_warn(
            f"{other}: the names of its split may be of other patients here; for another cohort "
            "name a split (--data.split)."
        )
    return trained.cases.seen(scans_of(cases), counted)


def _after(now: TrainingCases | None, before: TrainingCases | None) -> TrainingCases | None:
    """Join the cases of a training and of what it builds on; warn if that knows its validation."""
    if now is None:
        return before
    if before is not None:
        known = before.seen({name: now.scans.get(name, ()) for name in now.val}, ("training",))
        warn_of_seen(known, "val", "val/dice is too good, also to select a checkpoint by")
    return now.after(before)


def _replaced(now: TrainingCases, before: TrainingCases) -> str | None:
    if not (others := now.replaced(before)):
        return None
    return (
        f"{count_of(len(others), 'case has', 'cases have')} other scans in {now.store} than in the "
        f"checkpoint's training, which read {before.store} ({listed(others)})"
    )
