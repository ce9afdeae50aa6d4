"""The student: a network that sees only some sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pmixseg.data.patches import CaseItem
from pmixseg.errors import InputError
from pmixseg.modules.base import SegmentationModule
from pmixseg.task import Combination, balanced_combinations, parse_combination, presence
from pmixseg.types import Batch, Presence

CHEAP = 15
"""Combinations of one encoding that a validation decodes by default."""


class StudentModule(SegmentationModule):
    """Train on drawn subsets of the acquired modalities, or on one fixed combination.

    ``L_student = L_seg + Σ weight · term`` (docs/method/distillation.md).

    Args:
        combination: ``"t1ce"``, ``"flair+t2"``, …: a dedicated student. It builds encoders for
            these modalities only, is shown all of them unless a ``sampler`` draws subsets, and is
            tested on their subsets. ``None``: one student for every combination.
        kwargs: see :class:`~pmixseg.modules.base.SegmentationModule`.

    Raises:
        InputError: ``combination`` names a modality that the task does not have.
    """

    def __init__(self, combination: str | Sequence[str] | None = None, **kwargs: Any) -> None:
        self.combination = combination
        self.draws = combination is None or kwargs.get("sampler") is not None
        self._seen: set[str] = set()
        super().__init__(**kwargs)

    def select_modalities(self) -> tuple[str, ...]:
        """Return the modalities of the fixed combination, or all of the task."""
        if self.combination is None:
            return self.task.modalities
        return parse_combination(self.combination, self.task.modalities)

    @property
    def shows_subsets(self) -> bool:
        """Whether anything can be missing in training."""
        return self.draws and len(self.modalities) > 1

    def draw_present(self, batch: Batch) -> Presence:
        """Draw a subset of what was acquired and the student has inputs for.

        Raises:
            InputError: a training case has none of the student's modalities.
        """
        usable = batch["acquired"]
        if self.modalities != self.task.modalities:
            flags = presence(self.modalities, self.task.modalities)
            usable = torch.stack([u & f for u, f in zip(usable.unbind(1), flags, strict=True)], 1)
        self._check_cases(batch["case_id"], usable)
        if not self.draws:
            return usable
        return self.sampler.draw(batch["key"], usable, self.task.modalities)

    def _check_cases(self, names: Sequence[str], usable: Presence) -> None:
        # A case keeps what it has for a whole training: one look at each is enough, where looking
        # means waiting for a GPU.
        if usable.device.type == "cuda" and self._seen.issuperset(names):
            return
        lost = [name for name, some in zip(names, usable.any(1).tolist(), strict=False) if not some]
        if lost:
            raise InputError(
                f"case '{lost[0]}' has none of {list(self.modalities)}, which this student needs; "
                "leave it out of the training split."
            )
        self._seen.update(names)

    def validation_combinations(self, item: CaseItem) -> list[Combination]:
        """Return the combinations of ``evaluation.validation`` that were acquired.

        A student that is shown all of its combination in training is validated on that alone.
        """
        acquired, how = self.acquired_names(item), self.evaluation.validation
        if not self.draws:
            return [acquired]
        if how == "drawn":
            return [self._drawn(item, acquired)]
        every = self.test_combinations(item)
        cheap = self.shares_encoding and len(every) <= CHEAP
        if how == "all" or (how == "auto" and cheap):
            return every
        return balanced_combinations(acquired, int(item["key"]) % len(acquired))

    def _drawn(self, item: CaseItem, acquired: Combination) -> Combination:
        usable = torch.tensor([presence(acquired, self.task.modalities)])
        drawn = self.sampler.draw(item["key"].reshape(1).cpu(), usable, self.task.modalities)[0]
        return tuple(m for m, f in zip(self.task.modalities, drawn.tolist(), strict=True) if f)
