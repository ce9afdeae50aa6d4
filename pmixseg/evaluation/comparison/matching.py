"""Check that the runs of two methods are pairs with the same seed, split and task."""

from __future__ import annotations

from collections.abc import Sequence

from pmixseg.errors import InputError
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.records.tables import run_name


def matching_notes(a: Sequence[Records], b: Sequence[Records]) -> list[str]:
    """Refuse one training counted twice; say where matched runs had other seeds.

    Args:
        a: runs of A.
        b: runs of B; run i is matched with run i of A.

    Returns:
        Sentences for :func:`pmixseg.evaluation.comparison.compare.compare`. Seeds are compared
        as far as the sidecars of both runs know them.

    Raises:
        InputError: the same checkpoint twice on one side.
    """
    for side, runs in (("A", a), ("B", b)):
        seen: dict[str, str] = {}
        for one in runs:
            digest = (one.sidecar.checkpoint or {}).get("sha256")
            if digest is None:
                continue
            if digest in seen:
                raise InputError(
                    f"runs '{seen[digest]}' and '{run_name(one)}' of {side} were scored with the "
                    "same checkpoint, which is one training and not two; give each training once."
                )
            seen[digest] = run_name(one)
    notes = [
        f"{run_name(one)}: {len(one.sidecar.seen)} of its test cases were used to train or select "
        "the model, so its scores are too good."
        for one in (*a, *b)
        if one.sidecar.seen
    ]
    odd = [
        f"{run_name(x)} ({_spell(x)}) with {run_name(y)} ({_spell(y)})"
        for x, y in zip(a, b, strict=False)
        if _differ(x, y)
    ]
    if not odd:
        return notes
    return [
        *notes,
        f"Runs of different seeds are matched: {'; '.join(odd)}. Name both sides in the order of "
        "their seeds, or the pairs share nothing.",
    ]


def _differ(x: Records, y: Records) -> bool:
    first, second = _seeds(x), _seeds(y)
    return any(first[name] != second[name] for name in first.keys() & second.keys())


def _spell(one: Records) -> str:
    return ", ".join(f"{name} {seed}" for name, seed in sorted(_seeds(one).items()))


def _seeds(one: Records) -> dict[str, int]:
    return dict(one.sidecar.config.get("seed") or {})
