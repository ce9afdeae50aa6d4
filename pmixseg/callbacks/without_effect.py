"""Find settings of an alignment that have no effect, and say so in one sentence each."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pmixseg.evaluation.records.curves import UNIFORM
from pmixseg.losses.alignment import AlignmentLoss
from pmixseg.losses.anchors import Anchor, NormalAnchor, WeightedAnchor
from pmixseg.losses.distances import KL, NMSE, VIC, VID, SmoothL1, Whitened
from pmixseg.modules.base import SegmentationModule

BLIND_TO_SCALE = (NMSE, SmoothL1, VIC, Whitened)
"""Distances that divide latents by their own deviations before they look at the anchor."""


def settings_without_effect(
    name: str, alignment: AlignmentLoss, anchor: Anchor, module: SegmentationModule, sample: bool
) -> Iterator[str]:
    """Say what will do nothing in a training that begins.

    ``sample``: the decoder reads samples of the distance's Gaussians.
    """
    distance = alignment.distance
    if len(module.backbone.slots) == 1 and isinstance(anchor, WeightedAnchor):
        yield (
            f"{name} aligns the one sequence of this {type(module).__name__} to itself, which "
            "changes nothing; leave it out, or align the teacher."
        )
    if (
        isinstance(distance, VID)
        and distance.standardised
        and not (module.draws and module.shows_subsets)
    ):
        yield (
            f"{name}.distance vid gives the latents no gradient where everything acquired is "
            f"shown, as in this {type(module).__name__}; use another distance."
        )
    if isinstance(distance, KL) and distance.with_heads and not sample:
        yield (
            f"{name}.distance kl trains heads that can meet the loss without the latents moving; "
            f"use --{name}.sample true, or another distance."
        )
    if isinstance(distance, BLIND_TO_SCALE) and isinstance(anchor, NormalAnchor):
        yield (
            f"{name}.distance {distance.name} to a NormalAnchor pushes at most the mean of the "
            "latents to 0, since it does not see their scale; use another anchor, or the distance "
            "mse."
        )
    if alignment.detach == "features" and isinstance(anchor, NormalAnchor):
        yield (
            f"{name}.detach features holds the latents still, and a NormalAnchor does not move, so "
            "nothing is aligned; leave it out, or use another anchor."
        )


def unmoved_weights(name: str, module: SegmentationModule) -> str | None:
    """Say that the learned weights of the model's anchor stayed uniform in a training."""
    weights = list(module.learned_weights.values())
    count = len(module.backbone.slots)
    if not weights or count < 2 or float((torch.stack(weights) - 1 / count).abs().max()) >= UNIFORM:
        return None
    return (
        f"the learned weights of the anchor stayed uniform (within {UNIFORM:g}), so {name} used a "
        "plain mean; train longer, with a higher learning rate, or use weights that are not "
        "learned: --model.anchor MixtureAnchor --model.anchor.weights uniform."
    )
