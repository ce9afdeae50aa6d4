"""Dice and HD95 of three regions for 15 predictions of one case: pmixseg against medpy and MONAI.

All three score the same full 240×240×155 masks in one run, and the numbers must be equal. The
truth is a real label map; the predictions are the truth under smooth deformations of growing
strength, every third with an invented lesion.

    python experiments/benchmarks/metrics.py [--data FOLDER] [--case BraTS2021_00000]

Times are seconds of one CPU core (process time), so other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from medpy.metric import binary as medpy
from monai.metrics import compute_dice, compute_hausdorff_distance
from numpy.typing import NDArray
from scipy import ndimage

from pmixseg.evaluation.scores.metrics import CaseMetrics, Conventions
from pmixseg.task import BRATS

LabelMap = NDArray[np.uint8]
Scores = NDArray[np.float64]
SPACING = (1.0, 1.0, 1.0)


def read_truth(path: Path) -> LabelMap:
    """Class indices of a BraTS 2021 label map."""
    truth = np.asarray(nib.load(path).dataobj).astype(np.uint8)
    truth[truth == 4] = 3
    return truth


def deformed(truth: LabelMap, count: int = 15, seed: int = 0) -> list[LabelMap]:
    """``count`` predictions: the truth under deformations of 0.5 to 8 voxels."""
    rng = np.random.default_rng(seed)
    inside = np.argwhere(truth)
    low, high = np.maximum(inside.min(0) - 16, 0), np.minimum(inside.max(0) + 17, truth.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    crop = truth[box]
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in crop.shape], indexing="ij"))
    predictions = []
    for i, strength in enumerate(np.linspace(0.5, 8, count)):
        coarse = rng.standard_normal((3, 6, 6, 6))
        shift = np.stack([ndimage.zoom(c, np.divide(crop.shape, 6), order=1) for c in coarse])
        prediction = np.zeros_like(truth)
        prediction[box] = ndimage.map_coordinates(crop, grid + strength * shift, order=0)
        if i % 3 == 2:
            corner = rng.integers(60, 100, 3)
            lesion = tuple(slice(c, c + n) for c, n in zip(corner, (6, 5, 4), strict=True))
            prediction[lesion] = rng.integers(1, 4)
        predictions.append(prediction)
    return predictions


def masks(label: LabelMap) -> NDArray[np.bool_]:
    """Regions as separate masks, ``[R, d, h, w]``, as the other libraries want them."""
    members = [BRATS.region_classes(r) for r in BRATS.regions]
    return np.stack([np.isin(label, classes) for classes in members])


def by_pmixseg(
    truth: LabelMap, predictions: list[LabelMap], rule: str, only: tuple[str, ...] | None
) -> Scores:
    """``[15, R, 2]``: Dice and HD95."""
    case = CaseMetrics(truth, BRATS, SPACING, Conventions(percentile=rule))
    rows = [case.score(p, only) for p in predictions]
    return np.array([[[r["dice"], r["hd95"]] for r in regions] for regions in rows])


def by_medpy(truth: NDArray[np.bool_], predictions: list[NDArray[np.bool_]]) -> Scores:
    """The same by medpy."""
    return np.array(
        [
            [[medpy.dc(p, t), medpy.hd95(p, t, SPACING)] for p, t in zip(one, truth, strict=True)]
            for one in predictions
        ]
    )


def by_monai(truth: torch.Tensor, predictions: list[torch.Tensor]) -> tuple[Scores, float]:
    """The same by MONAI, and the seconds that Dice took."""
    rows, dice_seconds = [], 0.0
    for p in predictions:
        start = time.process_time()
        dice = compute_dice(p, truth)
        dice_seconds += time.process_time() - start
        hd95 = compute_hausdorff_distance(p, truth, include_background=True, percentile=95)
        rows.append(np.stack([dice[0].numpy(), hd95[0].numpy()], -1))
    return np.array(rows, dtype=np.float64), dice_seconds


def timed(function: Callable[[], Scores], repeats: int = 1) -> tuple[Scores, float]:
    """Result and the least seconds of several runs."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        seconds.append(time.process_time() - start)
    return result, min(seconds)


def main() -> None:
    """Run and print one table row per library."""
    here = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=here.parent / "shared/data/brats2021")
    parser.add_argument("--case", default="BraTS2021_00000")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)

    truth = read_truth(arguments.data / arguments.case / f"{arguments.case}_seg.nii.gz")
    predictions = deformed(truth)
    both = ("dice", "hd95")
    pooled, ours = timed(lambda: by_pmixseg(truth, predictions, "pooled", both), 5)
    directed, _ = timed(lambda: by_pmixseg(truth, predictions, "max_directed", both))
    _, everything = timed(lambda: by_pmixseg(truth, predictions, "pooled", None), 3)

    # The time to split a label map into masks is not charged to the others.
    true, split = masks(truth), [masks(p) for p in predictions]
    tensor = torch.from_numpy(true)[None].float()
    tensors = [torch.from_numpy(s)[None].float() for s in split]
    start = time.process_time()
    from_monai, dice_seconds = by_monai(tensor, tensors)
    monai = time.process_time() - start
    from_medpy, medpy_seconds = timed(lambda: by_medpy(true, split))

    np.testing.assert_allclose(pooled, from_medpy, rtol=1e-9)
    np.testing.assert_allclose(directed, from_monai, rtol=1e-5)  # MONAI interpolates in float32
    print(f"{arguments.case}, {truth.shape}, WT {int((truth > 0).sum())} voxels; equal numbers")
    print(f"Dice {pooled[..., 0].min():.2f} to {pooled[..., 0].max():.2f}")
    for name, seconds in (
        ("pmixseg", ours),
        ("pmixseg, every measure", everything),
        ("MONAI, HD95 only", monai - dice_seconds),
        ("MONAI", monai),
        ("medpy", medpy_seconds),
    ):
        print(f"{name:24}{seconds:9.2f} s{seconds / ours:8.1f} x")


if __name__ == "__main__":
    main()
