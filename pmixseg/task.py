"""Define a segmentation task: modalities, labels, regions, combinations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations as subsets_of_size
from typing import Any

from pmixseg.errors import InputError

Combination = tuple[str, ...]
"""A non-empty subset of modality names, in task order."""


@dataclass(frozen=True)
class Task:
    """Define what is segmented, and from which sequences; no other code names a modality.

    Args:
        name: short identifier, stored in checkpoints and records.
        modalities: names of the input sequences in channel order; one or more.
        labels: names of the foreground classes; class index = position + 1, background is 0.
        regions: region name -> names of the labels whose union it is.
        display: modality or region name -> how tables and figures write it (default: the name).

    Raises:
        InputError: empty or repeated names, names with ``+``, something that is no list of names,
            or a region of unknown labels.

    Example:
        >>> BRATS.num_classes, BRATS.region_classes("TC")
        (4, (1, 3))
    """

    name: str
    modalities: tuple[str, ...]
    labels: tuple[str, ...]
    regions: Mapping[str, tuple[str, ...]]
    display: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InputError(f"task: name is {self.name!r}; give a text.")
        for what in ("regions", "display"):
            value = getattr(self, what)
            if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
                raise InputError(
                    f"task '{self.name}': {what} is {value!r}, not a mapping from names; correct "
                    "the task."
                )
        # YAML and checkpoints give lists where the fields are tuples.
        object.__setattr__(self, "modalities", self._names("modalities", self.modalities))
        object.__setattr__(self, "labels", self._names("labels", self.labels))
        regions = {k: self._names(f"region '{k}'", v) for k, v in self.regions.items()}
        object.__setattr__(self, "regions", regions)
        object.__setattr__(self, "display", dict(self.display))
        for what, names in (("modalities", self.modalities), ("labels", self.labels)):
            if not names or len(set(names)) != len(names) or any("+" in n or not n for n in names):
                raise InputError(
                    f"task '{self.name}': {what} {list(names)} must be one or more different "
                    "names without '+'; correct the task."
                )
        if not self.regions:
            raise InputError(
                f"task '{self.name}' has no region; name at least one union of labels."
            )
        for region, members in self.regions.items():
            unknown = [m for m in members if m not in self.labels]
            if unknown or not members:
                raise InputError(
                    f"task '{self.name}': region '{region}' is {list(members)}, but must be a "
                    f"union of {list(self.labels)}; correct the region."
                )

    def _names(self, what: str, value: object) -> tuple[str, ...]:
        """Return a list of names; one name would be taken apart into its letters."""
        names = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else None
        if names is None or not all(isinstance(n, str) for n in names):
            # YAML reads "no", "on" and "1" as other things than names.
            raise InputError(
                f"task '{self.name}': {what} is {value!r}, not a list of names; write "
                "[name, name], in quotes where YAML reads something else."
            )
        return names

    @property
    def num_modalities(self) -> int:
        """Number of input sequences M."""
        return len(self.modalities)

    @property
    def num_classes(self) -> int:
        """Number of softmax classes C, background included."""
        return len(self.labels) + 1

    def region_classes(self, region: str) -> tuple[int, ...]:
        """Return the class indices whose union is ``region``.

        Raises:
            InputError: the task has no such region.
        """
        if region not in self.regions:
            raise InputError(
                f"task '{self.name}' has no region {region!r}; use one of {list(self.regions)}."
            )
        return tuple(self.labels.index(name) + 1 for name in self.regions[region])

    def show(self, name: str) -> str:
        """Return the name by which tables and figures write a modality or region."""
        return self.display.get(name, name)

    def combinations(self) -> list[Combination]:
        """Return all 2^M - 1 combinations, by size, then in task order."""
        return all_combinations(self.modalities)

    def to_dict(self) -> dict[str, Any]:
        """Return the task in primitives, for checkpoints and JSON."""
        raw = asdict(self)
        raw["modalities"], raw["labels"] = list(self.modalities), list(self.labels)
        raw["regions"] = {k: list(v) for k, v in self.regions.items()}
        return raw

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Task:
        """Read what :meth:`to_dict` wrote.

        Raises:
            InputError: not what that writes.
        """
        names = [field.name for field in fields(cls)]
        lacking = [n for n in names[:-1] if n not in raw] if isinstance(raw, Mapping) else names
        if lacking or set(raw) - set(names):
            raise InputError(f"a task is a mapping of {', '.join(names)}, not {raw!r:.80}.")
        return cls(**raw)


BRATS = Task(
    name="brats",
    modalities=("flair", "t1ce", "t1", "t2"),
    labels=("NCR", "ED", "ET"),
    regions={"WT": ("NCR", "ED", "ET"), "TC": ("NCR", "ET"), "ET": ("ET",)},
    display={"flair": "FLAIR", "t1ce": "T1ce", "t1": "T1", "t2": "T2"},
)
"""BraTS glioma: FLAIR, T1ce, T1, T2; necrotic core, oedema, enhancing tumour; WT, TC, ET."""


def all_combinations(modalities: Sequence[str]) -> list[Combination]:
    """Return every non-empty subset of ``modalities``, by size, then in the given order.

    Example:
        >>> [format_combination(c) for c in all_combinations(("flair", "t1"))]
        ['flair', 't1', 'flair+t1']
    """
    return [c for n in range(1, len(modalities) + 1) for c in subsets_of_size(modalities, n)]


def balanced_combinations(modalities: Sequence[str], turn: int = 0) -> list[Combination]:
    """Return a few combinations in which every modality is shown equally often.

    Of M modalities in a circle: neighbours, from 1 to M/2 of them, each beside all the others, and
    everything. 5 of the 15 of four modalities. ``turn`` is where on the circle to begin, so that
    another modality stands alone.

    Example:
        >>> [format_combination(c) for c in balanced_combinations(["a", "b", "c", "d"])]
        ['a', 'b+c+d', 'a+b', 'c+d', 'a+b+c+d']
        >>> [format_combination(c) for c in balanced_combinations(["a", "b", "c", "d"], turn=3)]
        ['d', 'a+b+c', 'a+d', 'b+c', 'a+b+c+d']
    """
    count = len(modalities)
    chosen: list[Combination] = []
    for size in range(1, count // 2 + 1):
        some = {(turn + k) % count for k in range(size)}
        chosen.append(tuple(m for k, m in enumerate(modalities) if k in some))
        chosen.append(tuple(m for k, m in enumerate(modalities) if k not in some))
    return [*chosen, tuple(modalities)]


def format_combination(combination: Iterable[str]) -> str:
    """Write a combination as text: the names of its modalities, joined by ``+``."""
    return "+".join(combination)


def parse_combination(text: str | Iterable[str], modalities: Sequence[str]) -> Combination:
    """Read ``"t1ce+flair"`` (or an iterable of names) into task order.

    Example:
        >>> parse_combination("t1+flair", BRATS.modalities)
        ('flair', 't1')
    """
    names = [n.strip() for n in text.split("+")] if isinstance(text, str) else list(text)
    unknown = [n for n in names if n not in modalities]
    if unknown or not names or len({*names}) < len(names):
        raise InputError(
            f"combination '{format_combination(names)}' names "
            f"{unknown or ('one modality twice' if names else 'no modality')}; use names of "
            f"{list(modalities)} joined by '+'."
        )
    return tuple(m for m in modalities if m in names)


def presence(combination: Iterable[str], modalities: Sequence[str]) -> tuple[bool, ...]:
    """Turn a combination into flags, one per modality.

    Example:
        >>> presence(("t1ce",), BRATS.modalities)
        (False, True, False, False)
    """
    chosen = set(combination)
    return tuple(m in chosen for m in modalities)
