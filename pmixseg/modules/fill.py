"""Fill the slot of a missing modality between encoder and decoder (docs/method/filling.md).

With ``zero`` nothing is done here: a decoder reads an absent slot as 0 (``Latents.masked``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from pmixseg.backbones.base import Backbone
from pmixseg.errors import InputError
from pmixseg.execution import runs_static
from pmixseg.losses.anchors import Anchor, MixtureAnchor
from pmixseg.slot_sums import choose_slots
from pmixseg.types import Latents

Fill = Literal["zero", "anchor"]


def default_fill(backbone: Backbone, shows_subsets: bool) -> Fill:
    """Return the anchor for a network with slots to fill that ever misses one, else zero."""
    several = len(backbone.slots) > 1 and shows_subsets
    return "anchor" if several and backbone.fillable else "zero"


def fitting_anchor(anchor: Anchor | None, fill: Fill, backbone: Backbone) -> Anchor | None:
    """Return the anchor with a place for each slot and level; the default where none is named."""
    if anchor is None and fill == "zero":
        return None
    anchor = MixtureAnchor() if anchor is None else anchor
    if fill == "anchor" and not anchor.can_fill:
        raise InputError(
            f"{type(anchor).__name__} has no features to fill a slot with; use fill: zero or "
            "a mixture or single-modality anchor."
        )
    anchor.bind(backbone.slots, len(backbone.channels))
    return anchor


def known_levels(levels: Sequence[int], backbone: Backbone) -> list[int]:
    """Return the levels to fill, each one that the network has."""
    count = len(backbone.channels)
    if not set(levels) <= set(range(count)):
        raise InputError(
            f"fill_levels is {list(levels)}, but {type(backbone).__name__} has levels 0 "
            f"to {count - 1}; name some of these."
        )
    return list(levels)


def fill_with_anchor(
    latents: Latents, anchor: Anchor, levels: Collection[int] | None = None
) -> Latents:
    """Replace absent slots by the anchor over the present ones, and mark them usable.

    ``z_m = f_m`` where modality m is shown, ``z_m = Σ_{j∈A} w'_j f_j`` where it is not (for a
    mixture anchor). The same rule holds in training and at test. Of levels that are not named
    (``None``: all are filled) absent slots stay. Features that needed no filling are shared, not
    copied.

    Raises:
        InputError: latents of a variational backbone, which combines present slots itself.
    """
    if latents.log_variance is not None:
        raise InputError(
            "a backbone with variances combines the present modalities itself; use fill: zero."
        )
    features, flags = list(latents.features), list(latents.usable)
    for level, present in enumerate(latents.usable):
        if levels is not None and level not in levels:
            continue
        raw = latents.features[level]
        if not runs_static(raw) and bool(present.all()):
            continue
        mixed = anchor(raw, present, level).unsqueeze(1)
        features[level] = choose_slots(present, raw, mixed)
        flags[level] = torch.ones_like(present)
    return latents.with_features(features, flags)


def learned_weights(anchor: Anchor | None, slots: int, levels: Sequence[int]) -> dict[int, Tensor]:
    """Return the weights that an anchor has learned where every modality is shown.

    Returns:
        Level -> ``[M]``, without gradient; the first level alone where all share their weights, and
        nothing for an anchor that learns none.
    """
    if not isinstance(anchor, MixtureAnchor) or not anchor.learned:
        return {}
    everything = torch.ones(1, slots, dtype=torch.bool, device=anchor.scores.device)
    own = levels[:1] if anchor.shared else levels
    return {level: anchor.weights(everything, level, detach=True)[0] for level in own}
