"""Small scenes for the tests of distillation: networks, outputs, batches."""

from types import SimpleNamespace

import torch

from pmixseg.types import Latents, SegOutput

NAMES = ("flair", "t1ce", "t1", "t2")


def flags(*rows):
    return torch.tensor(rows, dtype=torch.bool)


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
