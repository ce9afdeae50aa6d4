"""Collect the broken rules of a check, so that one run names all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from pmixseg.errors import InputError, count_of

TOLERANCE = 1e-4
"""Largest difference, relative to the largest value, that counts as float32 rounding.

Instance norm over a handful of voxels magnifies rounding; a broken rule shows as 1e-2 or more.
"""


class ConformanceError(AssertionError):
    """Report which rules of its contract a class breaks, one line per rule.

    Attributes:
        broken: rule -> what was found.
    """

    def __init__(self, subject: str, broken: Mapping[str, str]) -> None:
        self.broken = dict(broken)
        lines = "\n".join(f"  {rule}: {fault}" for rule, fault in broken.items())
        super().__init__(f"{subject} breaks {count_of(len(broken), 'rule')}:\n{lines}")


class Broken(Exception):
    """One rule is broken; the text says how."""


def run_rules(
    subject: str, rules: Mapping[str, Callable[[], object]], skip: Collection[str] = ()
) -> None:
    """Run every rule and raise one error for all that are broken.

    A rule raises :class:`Broken`; any other exception counts as broken too.

    Raises:
        InputError: ``skip`` names no rule.
        ConformanceError: a rule is broken.
    """
    unknown = set(skip) - set(rules)
    if unknown:
        raise InputError(f"skip names {sorted(unknown)}, but the rules are {list(rules)}.")
    broken: dict[str, str] = {}
    for name, rule in rules.items():
        if name in skip:
            continue
        try:
            rule()
        except Broken as fault:
            broken[name] = str(fault)
        except Exception as error:  # whatever foreign code raises is a finding
            broken[name] = f"raised {type(error).__name__}: {error}"
    if broken:
        raise ConformanceError(subject, broken)


def expect(holds: bool, message: str) -> None:
    """Raise :class:`Broken` unless ``holds``."""
    if not holds:
        raise Broken(message)


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference over the largest value (at least 1e-6); inf if not finite."""
    expect(a.shape == b.shape, f"shapes {list(a.shape)} and {list(b.shape)} differ")
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    if not a.numel():
        return 0.0
    scale = max(float(a.detach().abs().max()), float(b.detach().abs().max()), 1e-6)
    return float((a.detach().double() - b.detach().double()).abs().max()) / scale


def first_few(names: Sequence[str]) -> str:
    """Return the first few of ``names``, for an error."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
