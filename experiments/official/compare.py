"""What each repair of the public snippets changes, in numbers: prints the tables of the README.

python experiments/official/compare.py            # a minute, and the trainings after it
python experiments/official/compare.py --steps 0  # without trainings
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from pmixseg import BRATS, BraTSDataModule, PmixAlignment, SegmentationModule, StudentModule
from pmixseg.backbones import April2025Network, MultiEncoderUNet
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.keys import make_key
from pmixseg.data.missing import UniformCombinations
from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
from pmixseg.data.store.prepare import prepare
from pmixseg.evaluation.gap.latents import sample_latents
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.losses import AlignmentLoss, July2025Alignment, July2025Anchor, MixtureAnchor
from pmixseg.losses.official import INITIAL_DEVIATION, fill_july_2025
from pmixseg.modules import July2025Student
from pmixseg.types import Latents

CASES, TEST_CASES, SPACING = 16, 4, 5.0
WINDOW = (32, 40, 24)


def channel_mixing(network: April2025Network, image: Tensor) -> Tensor:
    """Say how much each latent channel changes when one modality is removed.

    Args:
        network: in eval mode.
        image: ``[B, M, D, H, W]``.

    Returns:
        ``[M, M]``: row m, column c: root mean squared change of channel c when modality m is set
        to 0, relative to the channel's standard deviation. Diagonal if channels were modalities.
    """
    with torch.no_grad():
        whole = network.encode(image)[0]
        rows = []
        for m in range(image.shape[1]):
            without = image.clone()
            without[:, m] = 0
            change = (network.encode(without)[0] - whole).square().mean((0, 2, 3, 4)).sqrt()
            rows.append(change / whole.std((0, 2, 3, 4)).clamp_min(1e-12))
    return torch.stack(rows)


def network() -> MultiEncoderUNet:
    """The network of every comparison."""
    return MultiEncoderUNet(BRATS.modalities, BRATS.num_classes, width=8, levels=3)


def row(*cells: object) -> None:
    """One line of a Markdown table."""
    print("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |")


# ------------------------------------------------------------------ without training


def mechanics() -> None:
    """Numbers of untrained networks and of the formulas alone."""
    torch.manual_seed(0)
    row("what", "official", "repaired")
    row("---", "---", "---")
    official = July2025Student(backbone=network()).eval()
    repaired = StudentModule(backbone=network()).eval()
    image = torch.randn(2, 4, *WINDOW)
    every = torch.ones(2, 4, dtype=torch.bool)
    latents = official.encode(image, every)
    assert isinstance(official.anchor, MixtureAnchor)
    trained = fill_july_2025(latents, every, official.anchor, training=True).features[0]
    tested = fill_july_2025(latents, every, official.anchor, training=False).features[0]
    row(
        "what the decoder reads of a complete case at test, relative to training (RMS)",
        (tested.norm() / trained.norm()).item(),
        1.0,
    )
    row("voxels of a hidden sequence move the training logits by (share of their SD)", *leak(image))
    keys = torch.tensor([make_key(0, 0, i) for i in range(20000)])
    masks = UniformCombinations().draw(keys, torch.ones(len(keys), 4, dtype=torch.bool), "abcd")
    wrong = (masks[::2] != masks[1::2]).float().mean().item()
    row("slots of a batch of two treated by the other sample's mask (row 0 counts for all)",
        f"{50 * wrong:.0f} %", "0 %")  # fmt: skip
    present = repaired.encode(image, every).restrict(torch.tensor([[True, False, False, False]]))
    levels = len(present.features)
    row("levels at which a missing slot is filled", f"1 of {levels}",
        f"the aligned ones, else {levels} of {levels}")  # fmt: skip
    row("alignment alone, 500 steps from w = 0.7, 0.1, 0.1, 0.1: w of the first", *drift())
    scores = INITIAL_DEVIATION * torch.randn(200_000, 4, dtype=torch.float64)
    raw = scores / scores.sum(1, keepdim=True)
    share = (raw.abs().amax(1) > 5).float().mean().item()
    negative = (raw < 0).any(1).float().mean().item()
    row("April: starts with a mixture weight beyond ±5", f"{100 * share:.0f} %", "0 %")
    row("April: starts with a negative mixture weight", f"{100 * negative:.0f} %", "0 %")
    mixing = channel_mixing(April2025Network(4, 4).eval(), torch.randn(2, 4, 16, 16, 16))
    own = mixing.diagonal().mean()
    others = (mixing.sum() - mixing.diagonal().sum()) / 12
    row(
        "April: removing a sequence changes other channels, relative to its own",
        (others / own).item(),
        0.0,
    )


def leak(image: Tensor) -> tuple[float, float]:
    """Largest change of training logits when a hidden sequence is replaced by noise."""
    changes = []
    every = torch.ones(2, 4, dtype=torch.bool)
    present = torch.tensor([[True, False, True, True]] * 2)
    other = image.clone()
    other[:, 1] = torch.randn_like(image[:, 1])
    for module in (July2025Student(backbone=network()), StudentModule(backbone=network())):
        with torch.no_grad():
            logits = [
                module.decode_subset(module.encode(x, every), present).logits
                for x in (image, other)
            ]
        changes.append(((logits[0] - logits[1]).abs().max() / logits[0].std()).item())
    return changes[0], changes[1]


def drift() -> tuple[float, float]:
    """Where the mixture weights go if only the alignment loss moves them."""
    torch.manual_seed(0)
    features = torch.randn(2, 4, 8, 4, 4, 4)
    every = torch.ones(2, 4, dtype=torch.bool)
    shares = []
    losses = (July2025Alignment(), AlignmentLoss("nmse", [8], BRATS.modalities, [0]))
    for loss in losses:
        anchor = July2025Anchor()
        anchor.bind(BRATS.modalities, 1)
        anchor.scores.data = torch.tensor([0.7, 0.1, 0.1, 0.1]).log()
        optimizer = torch.optim.SGD(anchor.parameters(), lr=1.0)
        for _ in range(500):
            optimizer.zero_grad()
            value = loss(Latents([features], BRATS.modalities, [every]), anchor, every, every)
            if value.requires_grad:
                value.backward()
                optimizer.step()
        shares.append(anchor.scores.softmax(0)[0].item())
    return shares[0], shares[1]


# ------------------------------------------------------------------ with training


def trainings(steps: int, weight: float, folder: Path) -> None:
    """Short trainings on one phantom cohort, and what their latents are like."""
    root, store = folder / "phantom", folder / "store"
    write_cohort(root, CASES, seed=1, settings=PhantomSettings(spacing=SPACING))
    prepare(find_cases(root, BRATS), store, BRATS, progress=False)
    row("arm", "level", "MSE to the anchor", "variance", "gap", "rank within a modality",
        "test WT Dice (%)")  # fmt: skip
    row("---", "---", "---", "---", "---", "---", "---")
    arms = {
        "no alignment": (StudentModule, None),
        "official-2025-07": (
            July2025Student,
            PmixAlignment(weight, official=July2025Alignment()),
        ),
        "`mse` at level 0, anchor detached": (
            StudentModule,
            PmixAlignment(weight, distance="mse", levels=[0]),
        ),
        "`nmse` at level 0": (StudentModule, PmixAlignment(weight, distance="nmse", levels=[0])),
        "`nmse`, the two coarsest levels": (StudentModule, PmixAlignment(weight, distance="nmse")),
        "repaired default (`case_nce`, the two coarsest levels)": (
            StudentModule,
            PmixAlignment(weight),
        ),
    }
    for name, (make, alignment) in arms.items():
        torch.manual_seed(0)
        settings = EvaluationSettings(window=WINDOW, batch_size=4, calibration=False, examples=0)
        module = make(backbone=network(), evaluation=settings, optimizer=torch.optim.Adam)
        data = BraTSDataModule(store, patch_size=24, batch_size=4, patches_per_case=2, seed=1)
        trainer = quiet(folder, steps, *filter(None, [alignment]))
        trainer.fit(module, data)
        dice = test(folder, module, data)
        images = [item["image"] for item in data.items("test")]
        for level, sample in sample_latents(
            module.eval(), images, WINDOW, module.anchor, [0, 1, 2]
        ).items():
            gap = sample.gap()
            shown = f"{dice:.1f}" if level == 0 else ""
            row(name, level, gap.numerator, gap.variance, gap.ratio, gap.rank_within, shown)
            name = ""
        if isinstance(module, July2025Student):
            alike = StudentModule(
                backbone=network(), evaluation=settings, fill_levels=(0,), anchor=July2025Anchor()
            )
            alike.load_state_dict(module.state_dict(), strict=False)
            shown = f"{test(folder, alike, data):.1f}"
            row("the same weights, filled at test as in training", "", "", "", "", "", shown)


def quiet(folder: Path, steps: int, *callbacks: PmixAlignment) -> Trainer:
    """A trainer that says nothing and writes next to nothing."""
    return Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def test(folder: Path, module: SegmentationModule, data: BraTSDataModule) -> float:
    """Mean whole-tumour Dice over test cases and combinations, in percent."""
    with contextlib.redirect_stdout(io.StringIO()):  # the table of all combinations
        (scores,) = quiet(folder, 0).test(module, data, verbose=False)
    return 100 * scores["test/dice/WT"]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of each training; 0: none")
    parser.add_argument("--weight", type=float, default=1.0, help="of the alignment")
    args = parser.parse_args()
    mechanics()
    if args.steps:
        print()
        with tempfile.TemporaryDirectory() as folder:
            trainings(args.steps, args.weight, Path(folder))


if __name__ == "__main__":
    main()
