"""Small scenes for the tests of losses: features, anchors, networks, outputs, batches."""

from types import SimpleNamespace

import torch

from pmixseg.losses.alignment import AlignmentLoss
from pmixseg.losses.anchors import MixtureAnchor, NormalAnchor
from pmixseg.types import Latents, SegOutput

NAMES = ("flair", "t1ce", "t1", "t2")


def flags(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def bound(anchor, modalities=NAMES, levels=2):
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


def network(modalities=NAMES, channels=(2, 3), strides=(1, 2), num_classes=3, slots=None):
    return SimpleNamespace(
        modalities=modalities,
        slots=modalities if slots is None else slots,
        channels=channels,
        strides=strides,
        num_classes=num_classes,
    )


def output(logits, features=(), modalities=NAMES, present=None, decoder=None, brain=None):
    """What a network returns; the logits stand for its one decoder map if none is given."""
    if present is None:
        present = torch.ones(logits.shape[0], len(modalities), dtype=torch.bool)
    latents = Latents(list(features), modalities, [present] * len(features), brain=brain)
    return SegOutput(logits, latents, {}, [logits] if decoder is None else list(decoder))


def batch_of(label, present=None, case_id=None):
    every = torch.ones(label.shape[0], 4, dtype=torch.bool)
    return {
        "label": label,
        "present": every if present is None else present,
        "acquired": every,
        "case_id": case_id or [f"case{i}" for i in range(label.shape[0])],
        "case": torch.tensor([hash(c) for c in case_id or range(label.shape[0])]),
    }


def scene(net, samples=2, seed=0, dtype=torch.float32, side=4):
    """Random logits and latents of a network on patches of ``side``³."""
    torch.manual_seed(seed)
    features = [
        torch.randn(samples, len(net.slots), c, *[side // s] * 3, dtype=dtype)
        for c, s in zip(net.channels, net.strides, strict=True)
    ]
    return torch.randn(samples, net.num_classes, side, side, side, dtype=dtype), features


def labels(samples=2, side=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, classes, (samples, side, side, side), generator=generator)


def voxel(*values):
    """Logits of one sample and one voxel."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1, 1)
