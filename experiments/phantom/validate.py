"""Does the phantom tell sequences apart as real scans do? One modality-dropout U-Net decides.

python experiments/phantom/validate.py --out experiments/phantom/validation.json

Trains one early-fusion U-Net (MONAI) on random combinations of FLAIR, T1ce, T1 and T2, tests it on
all 15, and compares with the published row of RFNet on BraTS 2018 (the numbers
printed in DeMoSeg's table). Exit code 1 if a criterion is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from pmixseg.data.phantom.cohort import PhantomSettings, make_case
from pmixseg.evaluation.records.published import NAMES, published_dice
from pmixseg.task import BRATS, Combination, format_combination, presence

FIRST_TEST_CASE = 10_000
COMBINATIONS = BRATS.combinations()
REGIONS = tuple(BRATS.regions)
PATCH = 48


class BlockUNet(nn.Module):
    """MONAI's DynUNet on blocks of 2×2×2 voxels: an eighth of the cost, no voxel thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.net = DynUNet(
            spatial_dims=3,
            in_channels=8 * BRATS.num_modalities,
            out_channels=8 * BRATS.num_classes,
            kernel_size=[3, 3, 3],
            strides=[1, 2, 2],
            upsample_kernel_size=[2, 2],
            filters=(32, 64, 128),
            norm_name="instance",
        )

    def forward(self, image: Tensor) -> Tensor:
        """``[B, M, D, H, W]`` with sizes divisible by 8 to logits ``[B, C, D, H, W]``."""
        blocks = rearrange(image, "b c (d i) (h j) (w k) -> b (c i j k) d h w", i=2, j=2, k=2)
        logits = self.net(blocks)
        return rearrange(logits, "b (c i j k) d h w -> b c (d i) (h j) (w k)", i=2, j=2, k=2)


def load(seed: int, indices: range, settings: PhantomSettings) -> list[tuple[Tensor, Tensor]]:
    """Cases z-scored inside the brain and cropped to a box that holds it, sides divisible by 8."""
    cases = []
    for index in indices:
        case = make_case(seed, index, settings)
        image = np.stack([case.images[m] for m in BRATS.modalities]).astype(np.float32)
        for values in image:
            inside = values > 0
            mean, deviation = values[inside].mean(), values[inside].std()
            values[inside] = (values[inside] - mean) / deviation
        box = []
        for axis in range(3):
            other = tuple(a for a in range(4) if a != axis + 1)
            where = np.flatnonzero((image != 0).any(axis=other))
            box.append(slice(where[0], where[-1] + 1))
        pad = [(0, max(-(s.stop - s.start) % 8, PATCH - (s.stop - s.start))) for s in box]
        cases.append(
            (
                torch.from_numpy(np.pad(image[:, *box], [(0, 0), *pad])),
                torch.from_numpy(np.pad(case.label[*box], pad).astype(np.int64)),
            )
        )
    return cases


def train(cases: list[tuple[Tensor, Tensor]], steps: int, seed: int) -> BlockUNet:
    """Dice + cross-entropy on random patches and combinations, AdamW, one-cycle."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    net = BlockUNet()
    criterion = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    flags = _flags()
    started, running = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        images, labels = [], []
        for _ in range(2):
            image, label = cases[int(torch.randint(len(cases), (1,), generator=draw))]
            corner = [int(torch.randint(n - PATCH + 1, (1,), generator=draw)) for n in label.shape]
            patch = [slice(c, c + PATCH) for c in corner]
            image, label = image[:, *patch], label[*patch]
            if torch.rand(1, generator=draw) < 0.5:
                image, label = image.flip(1), label.flip(0)
            gain, offset = 0.1 * torch.randn(2, len(image), 1, 1, 1, generator=draw)
            image = torch.where(image == 0, 0.0, image * (1 + gain) + offset)
            shown = flags[int(torch.randint(len(flags), (1,), generator=draw))]
            images.append(image * shown)
            labels.append(label[None])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = net(torch.stack(images))
        loss = criterion(logits.float(), torch.stack(labels))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += (loss.item() - running) / min(step, 100)
        if step % 200 == 0:
            spent = time.monotonic() - started
            print(f"step {step}/{steps}  loss {running:.3f}  {spent:.0f} s", flush=True)
    return net.eval()


def _flags() -> Tensor:
    flags = [presence(c, BRATS.modalities) for c in COMBINATIONS]
    return torch.tensor(flags, dtype=torch.float32)[..., None, None, None]


@torch.no_grad()
def evaluate(net: BlockUNet, cases: list[tuple[Tensor, Tensor]]) -> NDArray[np.float64]:
    """Dice per case, combination and region; both empty counts 1, one empty 0."""
    dice = np.zeros((len(cases), len(COMBINATIONS), len(REGIONS)))
    for i, (image, label) in enumerate(cases):
        predicted: list[Tensor] = []
        for shown in _flags().split(5):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                predicted += net(image * shown).argmax(1)
        for k, segmented in enumerate(predicted):
            for r, region in enumerate(REGIONS):
                classes = torch.tensor(BRATS.region_classes(region))
                a, b = torch.isin(segmented, classes), torch.isin(label, classes)
                size = int(a.sum() + b.sum())
                dice[i, k, r] = 2 * int((a & b).sum()) / size if size else 1.0
    return dice


def published() -> dict[tuple[str, Combination], float]:
    """RFNet's Dice in % by region and combination."""
    rows = published_dice().query("table_source == 'DeMoSeg' and dataset == 'BraTS2018'")
    row = {}
    for line in rows[rows["method"] == "RFNet"].itertuples():
        if line.combination == "mean15_stated":
            continue
        names = list(NAMES) if line.combination == "all" else line.combination.split("+")
        chosen = {NAMES[name] for name in names}
        combination = tuple(m for m in BRATS.modalities if m in chosen)
        row[line.region, combination] = float(line.dice_percent)
    return row


def judge(dice: NDArray[np.float64]) -> dict[str, Any]:
    """Mean Dice, and each criterion with its figure and whether it is met."""
    mean = 100 * dice.mean(axis=0)
    theirs, criteria = published(), {}
    for r, region in enumerate(REGIONS):
        row = [theirs[region, c] for c in COMBINATIONS]
        rho = float(spearmanr(mean[:, r], row).statistic)
        criteria[f"Spearman with RFNet, {region}"] = (rho, rho >= 0.8, ">= 0.8")
    et = mean[:, REGIONS.index("ET")]
    seen = np.array(["t1ce" in c for c in COMBINATIONS])
    ratio = float(et[~seen].mean() / et[seen].mean())
    criteria["ET Dice without T1ce / with it, mean"] = (ratio, 0.4 <= ratio <= 0.75, "0.4-0.75")
    without = COMBINATIONS.index(tuple(m for m in BRATS.modalities if m != "t1ce"))
    ratio = float(et[without] / et[-1])
    name = "ET Dice of FLAIR+T1+T2 / all four"
    criteria[name] = (ratio, 0.4 <= ratio <= 0.75, "0.4-0.75")
    wt = float(mean[-1, REGIONS.index("WT")])
    criteria["WT Dice of all four, %"] = (wt, 75 <= wt <= 95, "75-95")
    table = {
        format_combination(c): dict(zip(REGIONS, map(float, mean[k]), strict=True))
        for k, c in enumerate(COMBINATIONS)
    }
    return {
        "dice_percent": table,
        "criteria": {
            name: {"value": value, "met": bool(met), "bound": bound}
            for name, (value, met, bound) in criteria.items()
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spacing", type=float, default=3.0, help="mm")
    parser.add_argument("--train-cases", type=int, default=80)
    parser.add_argument("--test-cases", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--cohort-seed", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="of the network and its training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    settings = PhantomSettings(spacing=args.spacing)
    training = load(args.cohort_seed, range(args.train_cases), settings)
    net = train(training, args.steps, args.seed)
    last = FIRST_TEST_CASE + args.test_cases
    dice = evaluate(net, load(args.cohort_seed, range(FIRST_TEST_CASE, last), settings))

    result, theirs = judge(dice), published()
    print(f"\n{'mean Dice, %':<20}" + "".join(f"{r:>8}{'RFNet':>8}" for r in REGIONS))
    for c in COMBINATIONS:
        ours = result["dice_percent"][format_combination(c)]
        cells = "".join(f"{ours[r]:8.1f}{theirs[r, c]:8.1f}" for r in REGIONS)
        print(f"{format_combination(c):<20}{cells}")
    print()
    for name, criterion in result["criteria"].items():
        verdict = "met" if criterion["met"] else "NOT MET"
        print(f"{name:<40}{criterion['value']:8.3f}   must be {criterion['bound']:<9} {verdict}")
    if args.out:
        arguments = {k: v for k, v in vars(args).items() if k != "out"}
        args.out.write_text(json.dumps({"arguments": arguments, **result}, indent=1) + "\n")
    return 0 if all(criterion["met"] for criterion in result["criteria"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
