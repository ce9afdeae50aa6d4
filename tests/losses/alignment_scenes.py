"""Small scenes for the tests of alignment: features, anchors and the loss of one level."""

import torch

from pmixseg.losses.alignment import AlignmentLoss
from pmixseg.losses.anchors import (
    MixtureAnchor,
    NormalAnchor,
)
from pmixseg.types import Latents

NAMES = ("flair", "t1ce", "t1", "t2")


def flags(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def bound(anchor, modalities=NAMES, levels=1):
    anchor.bind(modalities[:], levels)
    return anchor


def latents_of(features, present=None, log_variance=None):
    features = features if isinstance(features, list) else [features]
    b, m = features[0].shape[:2]
    present = torch.ones(b, m, dtype=torch.bool) if present is None else present
    return Latents(features, NAMES[:m], [present] * len(features), log_variance)


def align(
    features, distance="mse", anchor=None, present=None, acquired=None, encoded=None, **kwargs
):
    """Loss of one level with everything acquired, shown and encoded unless told otherwise."""
    b, m, c = features.shape[:3]
    every = torch.ones(b, m, dtype=torch.bool)
    alignment = AlignmentLoss(distance, [c], NAMES[:m], [0], **kwargs).to(features.dtype)
    anchor = bound(anchor or MixtureAnchor("uniform"), NAMES[:m]).to(features.dtype)
    latents = latents_of(features, every if encoded is None else encoded)
    return alignment(
        latents,
        anchor,
        every if present is None else present,
        every if acquired is None else acquired,
    )


def values(*numbers, channels=1):
    """One sample, voxels along the last axis: ``values([m0v0, m0v1], [m1v0, m1v1])``."""
    return torch.tensor(numbers, dtype=torch.float64).reshape(1, len(numbers), channels, 1, 1, -1)


def anchor_for(name, m=4):
    return bound(NormalAnchor() if name == "vid" else MixtureAnchor("uniform"), NAMES[:m])
