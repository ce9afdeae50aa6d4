"""Draw which acquired modalities a sample shows: missingness protocols of the training.

The protocols stand in docs/method/missingness.md. A sampler is a pure function of the keys, so a
teacher, a student and a rerun see the same combinations. Masks that stay with a case for a whole
run are in :mod:`pmixseg.data.masks`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pmixseg.data.keys import uniform
from pmixseg.describe import Described
from pmixseg.errors import InputError
from pmixseg.task import all_combinations, parse_combination, presence
from pmixseg.types import Keys, Presence

_STREAM = "present"


class MissingnessSampler(Described, ABC):
    """Draw which modalities the network is shown, anew for every sample."""

    @abstractmethod
    def draw(self, keys: Keys, acquired: Presence, modalities: Sequence[str]) -> Presence:
        """Draw flags of the modalities to show, never empty and within ``acquired``.

        Args:
            keys: ``[B]``, one per sample.
            acquired: ``[B, M]``, at least one per row.
            modalities: the M names.

        Returns:
            ``[B, M]``, on the device of ``acquired``; a pure function of key and row.

        Raises:
            InputError: the protocol names a modality that is not among ``modalities``.
        """


class UniformCombinations(MissingnessSampler):
    """Draw every non-empty combination of the acquired modalities equally often.

    The protocol of RFNet, mmFormer and most others: 1/15 each where all four are acquired.
    """

    def draw(self, keys: Keys, acquired: Presence, modalities: Sequence[str]) -> Presence:
        """Draw the modalities to show, ``[B, M]``, never empty and within ``acquired``."""
        # The combinations of n acquired modalities are the binary numbers 1 .. 2^n - 1, one
        # digit for each of them.
        number = acquired.sum(1, keepdim=True)
        u = uniform(keys, _STREAM, 1).to(acquired.device, non_blocking=True)
        code = 1 + (u * (2.0**number - 1)).long()
        digit = acquired.long().cumsum(1) - 1
        return acquired & ((code >> digit.clamp(min=0)) & 1).bool()


class UniformSizes(MissingnessSampler):
    """Draw how many modalities are shown, then which.

    Sizes are equally likely, and so are the combinations of one size: the protocol of
    U-HVED. Single modalities and the complete set come up more often than under
    :class:`UniformCombinations`.
    """

    def draw(self, keys: Keys, acquired: Presence, modalities: Sequence[str]) -> Presence:
        """Draw the modalities to show, ``[B, M]``, never empty and within ``acquired``."""
        u = uniform(keys, _STREAM, 1 + len(modalities)).to(acquired.device, non_blocking=True)
        size = 1 + (u[:, :1] * acquired.sum(1, keepdim=True)).long()
        order = torch.where(acquired, u[:, 1:], 2.0)
        rank = order.argsort(1).argsort(1)
        return acquired & (rank < size)


class Bernoulli(MissingnessSampler):
    """Hide each modality on its own, at a rate of its own, but never all of them.

    Args:
        rates: probability in [0, 1) that a modality is missing: one number, or a number per
            modality name. Names left out are never missing.

    Raises:
        InputError: a rate outside [0, 1).
    """

    def __init__(self, rates: float | dict[str, float] = 0.5) -> None:
        check_rates(rates, "Bernoulli")
        self.rates = rates

    def draw(self, keys: Keys, acquired: Presence, modalities: Sequence[str]) -> Presence:
        """Draw the modalities to show, ``[B, M]``, never empty and within ``acquired``."""
        rates = rate_row(self.rates, modalities, "Bernoulli").to(acquired.device, non_blocking=True)
        u = uniform(keys, _STREAM, len(modalities)).to(acquired.device, non_blocking=True)
        return bernoulli_not_empty(u, rates.expand_as(u), acquired)


class FixedList(MissingnessSampler):
    """Draw one of the listed combinations.

    A case that lacks modalities is shown what it has of the combination; entries of which it has
    nothing are left out of its draw, and a case that has nothing of any entry is shown all it has.

    Args:
        combinations: like ``["flair+t1", "t1ce"]``.
        weights: relative frequency of each (default: equal).

    Raises:
        InputError: no combination, or weights that do not fit them.
    """

    def __init__(self, combinations: Sequence[str], weights: Sequence[float] | None = None) -> None:
        if not combinations:
            raise InputError("FixedList has no combination; list at least one, like 'flair+t1'.")
        self.combinations = tuple(combinations)
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(combinations)
        if len(self.weights) != len(combinations) or min(self.weights) < 0 or not sum(self.weights):
            raise InputError(
                f"FixedList: the weights {list(self.weights)} must be one number >= 0 for each of "
                f"{list(combinations)}, not all 0; correct the weights."
            )

    def draw(self, keys: Keys, acquired: Presence, modalities: Sequence[str]) -> Presence:
        """Draw the modalities to show, ``[B, M]``, never empty and within ``acquired``."""
        listed = [presence(parse_combination(c, modalities), modalities) for c in self.combinations]
        shown = torch.tensor(listed, device=acquired.device) & acquired[:, None]
        weights = torch.tensor(self.weights, dtype=torch.float64, device=acquired.device)
        return _draw_weighted(keys, shown, weights.expand(shown.shape[:2]), acquired)


class Protocols(MissingnessSampler):
    """Draw one of several named scanning protocols, each with the modalities it acquires.

    Drawn as in :class:`FixedList`; the names are for the people who read the configuration.

    Args:
        protocols: name -> combination.
        weights: name -> relative frequency (default 1 each).

    Raises:
        InputError: no protocol, or a weight for a name that is not among them.

    Example:
        >>> sampler = Protocols(
        ...     {
        ...         "complete": "flair+t1ce+t1+t2",
        ...         "no contrast agent": "flair+t1+t2",
        ...         "emergency": "flair+t1",
        ...         "old scanner": "t1+t2",
        ...     },
        ...     weights={"complete": 3},
        ... )
    """

    def __init__(
        self, protocols: Mapping[str, str], weights: Mapping[str, float] | None = None
    ) -> None:
        unknown = [name for name in weights or {} if name not in protocols]
        if unknown:
            raise InputError(
                f"Protocols: weights for {unknown}, which are not among {list(protocols)}; "
                "correct the names."
            )
        self.sampler = FixedList(
            tuple(protocols.values()), [(weights or {}).get(name, 1.0) for name in protocols]
        )

    def draw(self, keys: Keys, acquired: Presence, modalities: Sequence[str]) -> Presence:
        """Draw the modalities to show, ``[B, M]``, never empty and within ``acquired``."""
        return self.sampler.draw(keys, acquired, modalities)


class Dependent(MissingnessSampler):
    """Hide modalities so that the absence of one changes the odds of another's.

    Args:
        rates: probability in [0, 1) that a modality is missing, as in :class:`Bernoulli`.
        given_missing: modality -> {other: rate}: the modality's rate where the other is missing;
            with several others missing, the highest rate counts. A modality that is named here
            as *other* may not depend on a third one.

    Raises:
        InputError: a rate outside [0, 1), or a chain of dependences.

    Example:
        >>> sampler = Dependent({"t1": 0.2, "t1ce": 0.3}, {"t1ce": {"t1": 0.9}})
    """

    def __init__(
        self, rates: float | dict[str, float], given_missing: Mapping[str, Mapping[str, float]]
    ) -> None:
        check_rates(rates, "Dependent")
        for name, others in given_missing.items():
            check_rates(dict(others), f"Dependent, given_missing of {name}")
            chained = [other for other in others if other in given_missing]
            if chained:
                raise InputError(
                    f"Dependent: '{name}' depends on {chained}, which depend on others in turn; "
                    "let only independent modalities be depended on."
                )
        self.rates = rates
        self.given_missing = given_missing

    def draw(self, keys: Keys, acquired: Presence, modalities: Sequence[str]) -> Presence:
        """Draw the modalities to show, ``[B, M]``, never empty and within ``acquired``."""
        where, device = "Dependent", acquired.device
        subsets = [presence(c, modalities) for c in all_combinations(modalities)]
        flags = torch.tensor(subsets, device=device)
        rates = rate_row(self.rates, modalities, where).to(device).repeat(len(flags), 1)
        for name, others in self.given_missing.items():
            child = _position(name, modalities, where)
            parents = torch.tensor([_position(o, modalities, where) for o in others], device=device)
            weights = torch.tensor(list(others.values()), dtype=rates.dtype, device=device)
            rate = (~flags[:, parents] * weights).amax(1)
            rates[:, child] = torch.where(flags[:, parents].all(1), rates[:, child], rate)
        # Modalities that were never acquired have no say: their factor is 1.
        odds = torch.where(flags, 1 - rates, rates)
        factor = torch.where(acquired[:, None], odds, torch.ones_like(odds))
        within = ~(flags & ~acquired[:, None]).any(2)
        shown = flags.expand(len(acquired), -1, -1)
        return _draw_weighted(keys, shown, factor.prod(2) * within, acquired)


def bernoulli_not_empty(
    u: Float[Tensor, "b m"], rates: Float[Tensor, "b m"], acquired: Presence
) -> Presence:
    """Draw independent presence with probability ``1 - rates``, given that it is not empty.

    Exact, without rejection: as long as nothing is present, modality i is with probability
    p_i / P(any of i, i+1, .. is).
    """
    p = torch.where(acquired, 1 - rates, torch.zeros_like(rates))
    some = torch.zeros_like(p)
    tail = torch.zeros_like(p[:, 0])
    for i in reversed(range(p.shape[1])):
        tail = p[:, i] + (1 - p[:, i]) * tail
        some[:, i] = tail
    shown = torch.zeros_like(acquired)
    for i in range(p.shape[1]):
        odds = torch.where(shown.any(1), p[:, i], p[:, i] / some[:, i].clamp(min=1e-300))
        shown[:, i] = u[:, i] < odds
    return shown & acquired


def check_rates(rates: float | Mapping[str, float], where: str) -> None:
    """Raise :class:`InputError` unless every missing rate lies in [0, 1)."""
    values = rates if isinstance(rates, Mapping) else {"rates": rates}
    wrong = {name: rate for name, rate in values.items() if not 0 <= rate < 1}
    if wrong:
        raise InputError(
            f"{where}: the missing rates {wrong} are outside [0, 1); use the probability that "
            "the modality is missing, below 1."
        )


def rate_row(
    rates: float | Mapping[str, float], modalities: Sequence[str], where: str
) -> Float[Tensor, " m"]:
    """Return the missing rate per modality, float64; names left out are never missing."""
    if not isinstance(rates, Mapping):
        return torch.full((len(modalities),), float(rates), dtype=torch.float64)
    row = torch.zeros(len(modalities), dtype=torch.float64)
    for name, rate in rates.items():
        row[_position(name, modalities, where)] = rate
    return row


def _position(name: str, modalities: Sequence[str], where: str) -> int:
    if name not in modalities:
        raise InputError(f"{where}: unknown modality '{name}'; use names of {list(modalities)}.")
    return list(modalities).index(name)


def _draw_weighted(
    keys: Keys, shown: Tensor, weights: Float[Tensor, "b k"], acquired: Presence
) -> Presence:
    """Choose one of ``[B, K, M]`` per row, none that is empty; with none left, all is shown."""
    weights = torch.where(shown.any(2), weights, 0.0)
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1:]
    u = uniform(keys, _STREAM, 1).to(acquired.device, non_blocking=True)
    # Rounding may lift u * total to the total itself; then the last possible candidate is meant.
    last = (weights > 0).long().mul(torch.arange(weights.shape[1], device=weights.device)).amax(1)
    chosen = torch.minimum((cumulative <= u * total).sum(1), last)
    drawn = shown[torch.arange(len(shown), device=shown.device), chosen]
    return torch.where(total > 0, drawn, acquired)
