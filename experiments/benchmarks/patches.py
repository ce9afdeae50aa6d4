"""Milliseconds per training sample on one core: this package, MONAI, TorchIO, in turn.

A sample is a patch of 80 x 80 x 80 voxels of four modalities and its label, rotated (up to 10
degrees), zoomed (up to 10 %), flipped, and shifted and scaled in intensity. This package reads it
from the memory-mapped float16 store; MONAI and TorchIO are given the same cases as float32 volumes
in memory. Every round takes one sample of each contestant, so that whatever else the machine does
falls on all of them alike. What counts is processor time of the one thread; waiting for a busy
machine is not in it (the wall time is shown beside it).

    python experiments/benchmarks/patches.py [--data ROOT] [--rounds 60] [--cases 4]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
import torchio
from monai.utils import set_determinism
from rich.console import Console
from rich.table import Table
from torch.utils.data import default_collate

from pmixseg.data.augment import Augmentation
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.patches import PatchDataset
from pmixseg.data.phantom.cohort import write_cohort
from pmixseg.data.store.store import Store, prepare
from pmixseg.task import BRATS

PATCH = (80, 80, 80)
DEGREES, ZOOM, SHIFT, SCALE = 10.0, 0.1, 0.1, 0.1
RADIANS = DEGREES / 180 * np.pi
REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "brats2021"
Maker = Callable[[int], Any]


def ours(store: Store) -> dict[str, Maker]:
    """Reading alone, with foreground patches, and with augmentation, as in training."""
    uniform = PatchDataset(store, store.cases, PATCH)
    tumour = PatchDataset(store, store.cases, PATCH, foreground=1.0)
    augment = Augmentation(
        rotation=DEGREES, zoom=ZOOM, resample=1.0, gamma_probability=0.0, noise_probability=0.0
    )
    everything = Augmentation(resample=1.0, gamma_probability=1.0, noise_probability=1.0)
    return {
        "pmixseg: read": lambda i: uniform[0, i],
        "pmixseg: read around the tumour": lambda i: tumour[0, i],
        "pmixseg: read, augment": lambda i: augment(default_collate([tumour[0, i]])),
        "pmixseg: the same with noise and gamma": lambda i: everything(
            default_collate([tumour[0, i]])
        ),
    }


def monai(volumes: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Maker]:
    """Dictionary transforms on tensors in memory: the usual list, one affine, and lazy."""
    keys, modes = ("image", "label"), ("bilinear", "nearest")
    crop = mt.RandSpatialCropd(keys, PATCH, random_size=False)
    tumour = mt.RandCropByPosNegLabeld(keys, "label", PATCH, pos=1, neg=0, num_samples=1)
    flips = [mt.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)]
    intensity = [
        mt.RandShiftIntensityd("image", SHIFT, prob=1.0),
        mt.RandScaleIntensityd("image", SCALE, prob=1.0),
    ]
    angles = {"range_x": RADIANS, "range_y": RADIANS, "range_z": RADIANS}
    rotate = mt.RandRotated(keys, **angles, prob=1.0, mode=modes, padding_mode="zeros")
    affine = mt.RandAffined(
        keys,
        prob=1.0,
        rotate_range=(RADIANS,) * 3,
        scale_range=(ZOOM,) * 3,
        mode=modes,
        padding_mode="zeros",
    )
    pipelines = {
        "MONAI: crop": mt.Compose([crop]),
        "MONAI: crop, RandRotated": mt.Compose([crop, rotate, *flips, *intensity]),
        "MONAI: crop, RandAffined": mt.Compose([crop, affine, *flips, *intensity]),
        "MONAI: crop around the tumour, RandRotated": mt.Compose(
            [tumour, rotate, *flips, *intensity]
        ),
        "MONAI: crop, RandAffined, lazy": mt.Compose([crop, affine, *flips, *intensity], lazy=True),
    }
    held = [{"image": image, "label": label[None]} for image, label in volumes]
    return {name: _cycle(pipeline, held) for name, pipeline in pipelines.items()}


def tio(volumes: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Maker]:
    """Samplers and transforms on subjects in memory."""
    subjects = [
        torchio.Subject(
            image=torchio.ScalarImage(tensor=image), label=torchio.LabelMap(tensor=label[None])
        )
        for image, label in volumes
    ]

    def intensity(image: torch.Tensor) -> torch.Tensor:
        scale, shift = torch.rand(2) * 2 - 1
        return image * (1 + SCALE * scale) + SHIFT * shift

    change = torchio.Compose(
        [
            torchio.RandomAffine(scales=ZOOM, degrees=DEGREES, default_pad_value=0),
            torchio.RandomFlip(axes=(0, 1, 2), flip_probability=0.5),
            torchio.Lambda(intensity, types_to_apply=[torchio.INTENSITY]),
        ]
    )
    uniform = torchio.UniformSampler(PATCH)
    tumour = torchio.LabelSampler(PATCH, "label", {1: 1, 2: 1, 3: 1})
    return {
        "TorchIO: UniformSampler": _cycle(lambda s: next(uniform(s, 1)), subjects),
        "TorchIO: UniformSampler, transforms": _cycle(
            lambda s: change(next(uniform(s, 1))), subjects
        ),
        "TorchIO: LabelSampler, transforms": _cycle(lambda s: change(next(tumour(s, 1))), subjects),
    }


def _cycle(make: Callable[[Any], Any], held: list[Any]) -> Maker:
    return lambda i: make(held[i % len(held)])


def measure(
    contestants: dict[str, Maker], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds of every sample, one of each contestant per round, after a round to warm up.

    Returns:
        Processor time and wall time, per contestant.
    """
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, make in contestants.items():
            start, began = time.process_time(), time.perf_counter()
            make(i)
            if i > 0:
                spent[name].append(1000 * (time.process_time() - start))
                wall[name].append(1000 * (time.perf_counter() - began))
    return spent, wall


def main() -> None:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="cohort (default: real scans)")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--json", type=Path, default=None, help="write medians here, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    set_determinism(0)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        root = args.data or REAL
        if not root.exists():
            root = Path(folder) / "phantom"
            write_cohort(root, args.cases)
        prepare(find_cases(root, BRATS)[: args.cases], Path(folder) / "store", BRATS)
        store = Store.open(Path(folder) / "store")
        volumes = []
        for name in store.cases:
            stored = store.read(name)
            assert stored.label is not None
            volumes.append(
                (
                    torch.from_numpy(stored.image.astype(np.float32)),
                    torch.from_numpy(stored.label.astype(np.float32)),
                )
            )
        spent, wall = measure({**ours(store), **monai(volumes), **tio(volumes)}, args.rounds)
    report(spent, wall, root.name, args.json)


def report(
    spent: dict[str, list[float]], wall: dict[str, list[float]], cohort: str, path: Path | None
) -> None:
    """Print the table and the ratios that are promised."""
    median = {name: float(np.median(t)) for name, t in spent.items()}
    table = Table(title=f"ms per sample, {cohort}, one thread, {len(spent['pmixseg: read'])} each")
    for column in ("", "median", "10 %", "90 %", "wall"):
        table.add_column(column, justify="right" if column else "left")
    for name, t in spent.items():
        cells = (median[name], *np.percentile(t, [10, 90]), np.median(wall[name]))
        table.add_row(name, *(f"{cell:.1f}" for cell in cells))
    say = Console(width=100)
    say.print(table)
    for rival in ("MONAI", "TorchIO"):
        full = {n: m for n, m in median.items() if n.startswith(rival) and "," in n}
        fastest = min(full, key=lambda n: full[n])
        for name in ("pmixseg: read", "pmixseg: read, augment"):
            say.print(f"{name}: {full[fastest] / median[name]:.1f} x faster than {fastest}")
    if path is not None:
        path.write_text(json.dumps(median, indent=1))


if __name__ == "__main__":
    main()
