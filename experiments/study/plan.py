"""A study as YAML: arms × seeds × groups over one cohort, and the tables that are printed.

=============  ==================================================================================
key            meaning
=============  ==================================================================================
``name``       of the study and of its folder of results
``title``      heading of the printed tables
``cohort``     what is trained on, see :class:`~experiments.study.cohorts.Cohort`
``seeds``      list; the seed drives weights, batches, augmentation and missingness alike
``order``      ``seed`` (default): all groups and arms of a seed before the next; ``group``: all
               seeds of a group before the next group
``training``   what all trainings share, see :data:`SETTINGS`
``groups``     name -> settings of all its arms; a table compares arms within a group
``arms``       name -> settings; ``needs: ARM`` trains after that arm, with its checkpoint as the
               teacher; ``each: {PLACE: [values]}`` trains once per value, and together they are
               one arm; ``groups: [...]`` and ``seeds: [...]`` keep an arm to some of them
``tables``     see :mod:`experiments.study.analysis`
=============  ==================================================================================

Settings of groups and arms name a place by its dots (``module.init_args.fill: zero``); the value
replaces what stands there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from experiments.study.cohorts import Cohort
from pmixseg.errors import InputError

SETTINGS = ("steps", "seconds", "module", "data", "trainer", "align", "distill", "gap", "cases")
"""Keys of ``training``: optimizer steps; expected seconds of one training; the module, its data
module and the trainer; arguments of ``PmixAlignment``, ``Distillation`` and ``GapMonitor`` (absent:
none); which cases, see :class:`~experiments.study.cohorts.Cases`."""

ARM_KEYS = ("needs", "each", "groups", "seeds")


@dataclass(frozen=True)
class Training:
    """One training and its test.

    Args:
        group: table that it belongs to.
        arm: what it is compared as.
        seed: of everything random.
        settings: all of it, see :data:`SETTINGS`.
        part: value of ``each``, which tells trainings of one arm and seed apart.
        needs: name of the training whose checkpoint this one reads.
        kept: whether its checkpoint is needed by others.
    """

    group: str
    arm: str
    seed: int
    settings: Mapping[str, Any]
    part: str = ""
    needs: str | None = None
    kept: bool = False
    parts: int = 1
    """Trainings that are this arm together."""

    trial: bool = False
    """Only for its speed: it is not scored, and leaves nothing."""

    @property
    def name(self) -> str:
        """Unique in the study, and fit for a file name."""
        parts = [self.group, self.arm, self.part, f"s{self.seed}"]
        return "_".join(re.sub(r"[^\w.+-]+", "-", p) for p in parts if p)

    @property
    def fingerprint(self) -> str:
        """Of the settings: two trainings with the same one and the same seed are the same."""
        text = json.dumps(self.settings, sort_keys=True, default=str)
        return hashlib.sha256(f"{text}{self.seed}{self.needs}".encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Plan:
    """A study.

    Args:
        name: of the study.
        title: heading of its tables.
        tables: what is printed.
        cohort: of all trainings; none in a study that is only printed.
        trainings: in the order in which they run.
    """

    name: str
    title: str
    tables: Sequence[Mapping[str, Any]]
    cohort: Cohort | None = None
    trainings: Sequence[Training] = field(default_factory=tuple)

    def only(self, groups: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> Plan:
        """The same with some of the trainings.

        Raises:
            InputError: nothing is left.
        """
        chosen = tuple(
            t
            for t in self.trainings
            if (groups is None or t.group in groups) and (seeds is None or t.seed in seeds)
        )
        if not chosen:
            known = ", ".join(dict.fromkeys(t.group for t in self.trainings))
            raise InputError(f"{self.name}: no training is left; its groups are {known}.")
        return replace(self, trainings=chosen)


def read_plan(path: Path, changes: Mapping[str, Any] | None = None) -> Plan:
    """Read a plan.

    Args:
        path: the YAML file.
        changes: place -> value, over ``training``, ``cohort`` or any other key; for trials and for
            machines that are slower.

    Raises:
        InputError: it cannot be read, or a key is unknown.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as a plan ({error}); correct it.") from error
    known = ("name", "title", "tables", "cohort", "seeds", "order", "training", "groups", "arms")
    _known(raw, known, str(path))
    for place, value in (changes or {}).items():
        put(raw, place, value)
    cohort = Cohort(**raw["cohort"]) if "cohort" in raw else None
    trainings = tuple(_trainings(raw, str(path))) if "arms" in raw else ()
    names = [t.name for t in trainings]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise InputError(f"{path}: two trainings are called {twice[0]}; rename an arm.")
    return Plan(raw["name"], raw["title"], raw.get("tables") or [], cohort, trainings)


def put(raw: dict[str, Any], place: str, value: Any) -> None:
    """Set what a dotted place names, making the mappings on the way."""
    *path, last = place.split(".")
    for key in path:
        inner = raw.get(key)
        raw[key] = inner = inner if isinstance(inner, dict) else {}
        raw = inner
    raw[last] = copy.deepcopy(value)


def _known(raw: Any, known: Sequence[str], where: str) -> None:
    strange = sorted(set(raw) - set(known)) if isinstance(raw, dict) else [str(raw)[:40]]
    if strange:
        raise InputError(f"{where}: unknown keys {strange}; use {', '.join(known)}.")


def _trainings(raw: Mapping[str, Any], where: str) -> Iterator[Training]:
    _known(raw["training"], SETTINGS, f"{where}, training")
    groups = raw.get("groups") or {"all": {}}
    seeds = [int(seed) for seed in raw["seeds"]]
    needed = {str(a["needs"]) for a in raw["arms"].values() if a and "needs" in a}
    if needed - set(raw["arms"]):
        raise InputError(f"{where}: arms {sorted(needed - set(raw['arms']))} are needed; add them.")
    pairs = [(s, g) for s in seeds for g in groups]
    if raw.get("order", "seed") == "group":
        pairs = [(s, g) for g in groups for s in seeds]
    for seed, group in pairs:
        for arm, own in raw["arms"].items():
            own = own or {}
            if group not in own.get("groups", groups) or seed not in own.get("seeds", seeds):
                continue
            yield from _of_arm(raw["training"], group, groups[group] or {}, arm, own, seed, needed)


def _of_arm(
    shared: Mapping[str, Any],
    group: str,
    of_group: Mapping[str, Any],
    arm: str,
    own: Mapping[str, Any],
    seed: int,
    needed: set[str],
) -> Iterator[Training]:
    settings: dict[str, Any] = copy.deepcopy(dict(shared))
    for place, value in [*of_group.items(), *own.items()]:
        if place not in ARM_KEYS:
            put(settings, place, value)
    _known(settings, SETTINGS, f"arm {arm}")
    needs = Training(group, own["needs"], seed, {}).name if "needs" in own else None
    parts = [(place, value) for place, values in own.get("each", {}).items() for value in values]
    for place, value in parts or [("", "")]:
        ready = copy.deepcopy(settings)
        if place:
            put(ready, place, value)
        yield Training(
            group, arm, seed, ready, str(value), needs, arm in needed, max(len(parts), 1)
        )
