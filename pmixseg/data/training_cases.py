"""Which cases a model was trained with, so that no test scores them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from pmixseg.argument_checks import check_fields
from pmixseg.data.cohorts.problems import listed, same_scans
from pmixseg.data.parts import PARTS, Split
from pmixseg.data.store.store import StoredCase
from pmixseg.data.store.stored import scan_hashes
from pmixseg.describe import describe
from pmixseg.errors import InputError, count_of

Scans = tuple[str, ...]
"""Hashes of the scans of one case, sorted."""

OTHER_VOXEL = 1.3
"""Ratio of sides from which voxels are others than those of the training."""


@dataclass(frozen=True)
class SeenCase:
    """A case that a model was trained or selected with.

    Args:
        name: of the case that is to be scored.
        part: ``training``, ``validation``, or ``earlier training``.
        known_as: the name under which the model has seen the same scans.
    """

    name: str
    part: str
    known_as: str

    def __str__(self) -> str:
        same = "" if self.known_as == self.name else f", its scans are those of {self.known_as}"
        return f"{self.name} ({self.part}{same})"


@dataclass(frozen=True)
class TrainingCases:
    """The split of a training, and what tells its cases in another cohort or under another name.

    Args:
        store: where the cases lay.
        train: names of the cases of the training part.
        val: names of the validation part, with which a model is selected.
        test: names of the test part.
        scans: name -> hashes of the scans, for cases of the training and validation parts.
        earlier: the same for cases of earlier trainings: of the weights that this one began with,
            and of its teacher.
        synthetic: all cases are of a phantom, those of earlier trainings too.
        lacking: names of cases that the split's file had and the store lacked.
    """

    store: str | None = None
    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    scans: Mapping[str, Scans] = field(default_factory=dict)
    earlier: Mapping[str, Scans] = field(default_factory=dict)
    synthetic: bool = False
    lacking: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)

    def after(self, before: TrainingCases | None) -> TrainingCases:
        """Return the same, with the cases of a training that this one builds on.

        A name that had other scans then is known by both.
        """
        if before is None:
            return self
        own = set(self.train) | set(self.val)
        seen = {name: before.scans.get(name, ()) for name in (*before.train, *before.val)}
        every = {**self.earlier, **before.earlier, **seen}
        both = {k: (*v, *every.get(k, ())) for k, v in self.scans.items()}
        return replace(
            self,
            scans={k: tuple(sorted(set(v))) for k, v in both.items()},
            earlier={k: v for k, v in every.items() if k not in own},
            synthetic=self.synthetic and before.synthetic,
        )

    def replaced(self, before: TrainingCases) -> list[str]:
        """Return names of cases that have no scan in common with the case of that name before."""
        return [
            name
            for name, scans in self.scans.items()
            if before.scans.get(name) and not {*scans} & {*before.scans[name]}
        ]

    def seen(
        self, cases: Mapping[str, Scans], parts: Iterable[str] = ("training", "validation")
    ) -> list[SeenCase]:
        """Find cases (name -> hashes) that the model knows, by name or by the content of a scan.

        ``parts`` count beside those of earlier trainings.
        """
        # The part that each name was in: training before validation before earlier trainings.
        where = dict.fromkeys(self.earlier, "earlier training")
        where |= dict.fromkeys(self.val, "validation") | dict.fromkeys(self.train, "training")
        counted = {k: p for k, p in where.items() if p == "earlier training" or p in set(parts)}
        # The name that each scan was known by.
        hashes = {**self.earlier, **self.scans}
        owner = {scan: name for name in counted for scan in hashes.get(name, ())}
        seen = []
        for name, scans in cases.items():
            trained_as = (
                name if name in counted else next((owner[s] for s in scans if s in owner), None)
            )
            if trained_as is not None:
                seen.append(SeenCase(name, counted[trained_as], trained_as))
        return seen

    def to_dict(self) -> dict[str, Any]:
        """Return primitives, for a checkpoint."""
        described: dict[str, Any] = describe(vars(self), "cases")
        return described

    @classmethod
    def from_dict(cls, raw: Any, where: str) -> TrainingCases:
        """Read what :meth:`to_dict` wrote."""
        try:
            # Checkpoints of before do not tell of the last two.
            known = {field.name: raw[field.name] for field in fields(cls)[:-2]}
            synthetic = raw.get("synthetic", False) is True
            return cls(**known, synthetic=synthetic, lacking=raw.get("lacking", ()))
        except (InputError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{where} does not say which cases it was trained on; it is damaged."
            ) from error


def scans_of(cases: Iterable[StoredCase]) -> dict[str, Scans]:
    """Return hashes that tell the scans of stored cases, whatever they are called, by name now."""
    return {case.case_id: scan_hashes(case.meta) for case in cases}


def shared_scans(split: Split, cases: Iterable[StoredCase]) -> list[str]:
    """Return pairs of cases in different parts of a split that share a scan, as ``a and b``."""
    part_of = {case: part for part in PARTS for case in getattr(split, part)}
    scans = scans_of(case for case in cases if case.case_id in part_of)
    return [f"{one} and {two}" for one, two in same_scans(scans) if part_of[one] != part_of[two]]


def stored_cases(data: Any, *parts_read: str) -> list[StoredCase] | None:
    """Read the cases of parts of a data module's split; ``None`` without a store and a split."""
    parts, store = getattr(data, "parts", None), getattr(data, "store", None)
    if parts is None or store is None:
        return None
    return [store.read(case) for part in parts_read for case in getattr(parts, part)]


def training_cases(data: Any) -> TrainingCases | None:
    """Return what a data module trains on; ``None`` for one that has no store and split."""
    seen = stored_cases(data, "train", "val")
    if seen is None:
        return None
    parts = data.parts
    return TrainingCases(
        str(data.store.root.resolve()),
        parts.train,
        parts.val,
        parts.test,
        scans_of(seen),
        synthetic=all(case.synthetic for case in seen),
        lacking=parts.lacking,
    )


def voxel_sizes(data: Any, part: str) -> tuple[float, float] | None:
    """Return the least and largest side of the voxels of a part of the split, in mm.

    Sides, and not volumes: thick slices of 0.45 x 0.45 x 5 mm have the volume of a 1 mm cube. A
    data module that has no store and split gives ``None``.
    """
    sides = [s for case in stored_cases(data, part) or () for s in case.geometry.grid_spacing]
    return (round(min(sides), 3), round(max(sides), 3)) if sides else None


def other_voxels(
    trained: tuple[float, float] | None, met: tuple[float, float] | None
) -> str | None:
    """Say in a phrase that a network meets voxels of another size than it was trained on.

    Sizes are the least and largest side, see :func:`voxel_sizes`; ``None`` is not known. Alike,
    they give ``None``.
    """
    if trained is None or met is None:
        return None
    if trained[0] / OTHER_VOXEL <= met[0] and met[1] <= trained[1] * OTHER_VOXEL:
        return None
    sizes = [f"{a:.3g}" if b - a < 0.01 else f"{a:.3g} to {b:.3g}" for a, b in (met, trained)]
    return (
        f"voxels of {sizes[0]} mm meet a model that was trained on voxels of {sizes[1]} mm and "
        "brings scans to no spacing of its own; expect wrong results, or resample the scans, or "
        "train on a store that was prepared at one spacing"
    )


def warn_of_seen(seen: Sequence[SeenCase], part: str, cost: str) -> None:
    """Warn, as a training begins, of cases that an earlier one knew, and say what that costs."""
    if seen:
        rank_zero_warn(
            f"{count_of(len(seen), 'case')} of the {part} part trained what this model begins with "
            f"or is taught by ({listed([case.name for case in seen])}), so {cost}; take the same "
            "split."
        )


def refusal_of_seen(seen: Sequence[SeenCase], part: str) -> str:
    """Return one sentence that refuses to score cases that a model knows."""
    cases = count_of(len(seen), f"case of the {part} part is", f"cases of the {part} part are")
    return (
        f"{cases} known to this model from its training "
        f"({listed([str(case) for case in seen])}): their scores would be too good; "
        "score others (a command without a split takes the checkpoint's own), or go on with "
        "--force (in Python: module.force = True)."
    )
