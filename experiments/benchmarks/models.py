"""The model table: parameters, operations, training memory and time of every backbone.

    python experiments/benchmarks/models.py [--only RFNet UHVED]

Operations (2 per multiply-add, in billions) are counted by ``torch.utils.flop_counter`` for one
forward pass of all sequences at the stated patch. A training step is forward, Dice + cross-entropy
and backward of one patch in a process of its own: processor seconds of one thread, and how much the
largest resident set (``ru_maxrss``) grew. Testing is one window, every combination of four
sequences. Freed memory is kept, as every command of this package does.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from measuring import gflop

from pmixseg.backbones import (
    UHVED,
    Backbone,
    DeMoSeg,
    EarlyFusion,
    MMFormer,
    MultiEncoderUNet,
    RFNet,
    ShaSpec,
)
from pmixseg.cli.allocator import keep_freed_memory
from pmixseg.evaluation.prediction.windows import iterate_combinations
from pmixseg.losses import DiceCE

SIDE = 80
DYNUNET = {
    "class_path": "monai.networks.nets.DynUNet",
    "init_args": {
        "kernel_size": [3] * 5,
        "strides": [1, 2, 2, 2, 2],
        "upsample_kernel_size": [2] * 4,
        "filters": [32, 64, 128, 256, 320],
        "norm_name": ["INSTANCE", {"affine": True}],
    },
}
SEGRESNET = {"class_path": "monai.networks.nets.SegResNet", "init_args": {"init_filters": 16}}
MODELS: dict[str, Callable[[], Backbone]] = {
    "MultiEncoderUNet": MultiEncoderUNet,
    "RFNet": RFNet,
    "MMFormer": partial(MMFormer, patch_size=SIDE),
    "UHVED": UHVED,
    "ShaSpec": ShaSpec,
    "DeMoSeg": DeMoSeg,
    "EarlyFusion(DynUNet)": partial(EarlyFusion, DYNUNET),
    "EarlyFusion(SegResNet)": partial(EarlyFusion, SEGRESNET),
}
SOURCES = {
    "MultiEncoderUNet": ("this package; blocks of nnU-Net", "–", "–"),
    "RFNet": (
        "Ding et al., ICCV 2021",
        "layers, fusion, losses, weights (importable)",
        "cheap form of the fusion; logits instead of probabilities",
    ),
    "MMFormer": (
        "Zhang et al., MICCAI 2022",
        "layers, transformers, losses, weights (importable)",
        "token order corrected unless `official: true`",
    ),
    "UHVED": (
        "Dorent et al., MICCAI 2019",
        "blocks, widths, codes, product with the prior",
        "biases, norm without parameters, log-variances within ±10",
    ),
    "ShaSpec": (
        "Wang et al., CVPR 2023",
        "two encoders, mean of shared features for the missing, both auxiliary tasks",
        "blocks, widths and decoder of `MultiEncoderUNet`",
    ),
    "DeMoSeg": (
        "kk42yy/DeMoSeg 73cd4bb",
        "groups and their order, channel ordering, widths, decoder, deep supervision",
        "any number of modalities; no bias before a norm; patches of any size",
    ),
    "EarlyFusion(DynUNet)": ("MONAI; nnU-Net", "MONAI's network, unchanged", "–"),
    "EarlyFusion(SegResNet)": ("MONAI; Myronenko 2018", "MONAI's network, unchanged", "–"),
}
"""Source, what is faithful, what differs."""


def measure(name: str) -> dict[str, float]:
    """One row, in this process."""
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = MODELS[name]()
    image = torch.randn(1, 4, SIDE, SIDE, SIDE)
    label = torch.randint(0, 4, (1, SIDE, SIDE, SIDE))
    shown = torch.ones(1, 4, dtype=torch.bool)
    flags = torch.tensor([row for row in product([False, True], repeat=4) if any(row)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    DiceCE()(net.train()(image, shown), {"label": label}, 0).backward()  # type: ignore[typeddict-item]  # the loss reads no more
    step = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    net.zero_grad()
    start = time.process_time()
    next(iterate_combinations(net.eval(), image[0], flags, patch=(SIDE,) * 3, overlap=0.0))
    test = time.process_time() - start
    with torch.no_grad():
        operations = gflop(lambda: net(image, shown))
    return {
        "parameters": sum(p.numel() for p in net.parameters()) / 1e6,
        "gflop": operations,
        "train_gib": (peak - before) / 2**20,
        "train_s": step,
        "test_s": test,
        "shares": float(net.shares_encoding),
    }


def main() -> int:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--child", choices=MODELS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child)))
        return 0
    print(
        f"| backbone | parameters, M | GFLOP at {SIDE}³ | training step: memory, GiB | CPU s | "
        "15 combinations of one window, CPU s | shares encoding |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in args.only:
        done = subprocess.run(
            [sys.executable, __file__, "--child", name],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        row = json.loads(done.stdout.splitlines()[-1])
        shares = "yes" if row["shares"] else "no"
        print(
            f"| `{name}` | {row['parameters']:.2f} | {row['gflop']:.0f} | {row['train_gib']:.1f} | "
            f"{row['train_s']:.1f} | {row['test_s']:.1f} | {shares} |",
            flush=True,
        )
    print("\n| backbone | source | faithful | differs |\n|---|---|---|---|")
    for name in args.only:
        print(f"| `{name}` | " + " | ".join(SOURCES[name]) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
