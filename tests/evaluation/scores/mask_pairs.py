"""Pairs of masks on which scores are compared with independent implementations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]
SPACINGS = ((1.0, 1.0, 1.0), (1.0, 1.0, 3.0), (0.5, 2.0, 1.25), (0.9375, 0.9375, 6.0))


def blob(rng: np.random.Generator, shape: tuple[int, ...], fill: float, grain: float) -> Mask:
    """Smoothed noise above its quantile: one or several ragged blobs."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), grain)
    return noise > np.quantile(noise, 1 - fill)


def mask_pairs(count: int, seed: int = 0) -> Iterator[tuple[str, Mask, Mask, tuple[float, ...]]]:
    """``count`` pairs (name, prediction, truth, spacing), every sort in turn."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        shape = tuple(int(n) for n in rng.integers(5, 26, 3))
        spacing = SPACINGS[i % len(SPACINGS)]
        sort = SORTS[i % len(SORTS)]
        yield f"{i}-{sort}", *_pair(sort, rng, shape), spacing


SORTS = (
    "blobs",
    "same",
    "shifted",
    "single voxels",
    "voxel and blob",
    "noise",
    "touching every border",
    "full and hollow",
    "truth empty",
    "prediction empty",
    "both empty",
    "far apart",
    "plane",
)


def _pair(sort: str, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Mask, Mask]:
    empty = np.zeros(shape, bool)
    a = blob(rng, shape, rng.uniform(0.02, 0.6), rng.uniform(0.5, 3))
    b = blob(rng, shape, rng.uniform(0.02, 0.6), rng.uniform(0.5, 3))
    one, two = empty.copy(), empty.copy()
    one[tuple(rng.integers(0, shape))] = True
    two[tuple(rng.integers(0, shape))] = True
    match sort:
        case "same":
            return a, a.copy()
        case "shifted":
            return a, np.roll(a, int(rng.integers(1, 4)), int(rng.integers(0, 3)))
        case "single voxels":
            return one, two
        case "voxel and blob":
            return one, b
        case "noise":
            return rng.random(shape) < 0.3, rng.random(shape) < 0.05
        case "touching every border":
            shell = np.ones(shape, bool)
            shell[1:-1, 1:-1, 1:-1] = False
            return shell, b | shell
        case "full and hollow":
            hollow = np.ones(shape, bool)
            hollow[2:-2, 2:-2, 2:-2] = False
            return np.ones(shape, bool), hollow
        case "truth empty":
            return a, empty
        case "prediction empty":
            return empty, b
        case "both empty":
            return empty, empty.copy()
        case "far apart":
            one, two = empty.copy(), empty.copy()
            one[:2, :2, :2] = True
            two[-1:, -1:, -2:] = True
            return one, two
        case "plane":
            one, two = empty.copy(), empty.copy()
            one[shape[0] // 2] = True
            two[:, shape[1] // 3] = True
            return one, two
    return a, b


def lesion_pairs(
    count: int, seed: int = 0
) -> Iterator[tuple[str, NDArray[np.uint8], NDArray[np.uint8], tuple[float, ...]]]:
    """``count`` pairs of BraTS class maps with several lesions, some small, missed or invented."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        shape = tuple(int(n) for n in rng.integers(16, 37, 3))
        spacing = ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, 2.0))[i % 3]
        truth = np.zeros(shape, np.uint8)
        prediction = truth.copy()
        for _ in range(int(rng.integers(0, 7))):
            _paint(truth, rng)
        moves = rng.integers(-2, 3, 3)
        if i % 5:
            prediction = np.roll(truth, moves, (0, 1, 2))
        for _ in range(int(rng.integers(0, 3))):
            _paint(prediction, rng)
        for _ in range(int(rng.integers(0, 3))):
            low = [int(rng.integers(0, n)) for n in shape]
            prediction[tuple(slice(a, a + 9) for a in low)] = 0
        yield f"{i}", prediction, truth, spacing


def _paint(volume: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """A ball of oedema with a core of another class."""
    centre = [rng.uniform(0, n) for n in volume.shape]
    radius = rng.uniform(0.8, 6)
    grid = np.meshgrid(*[np.arange(n) for n in volume.shape], indexing="ij")
    squared = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True))
    volume[squared <= radius**2] = 2
    volume[squared <= (0.7 * radius) ** 2] = rng.integers(1, 4)
