"""How many operations one training step starts, with the layers that a GPU takes.

    python experiments/benchmarks/operations.py [--only RFNet …] [--side 32] [--top 12]

A GPU waits for the host, which needs some 10 to 50 microseconds to start an operation, so where
volumes are small their number is the time of a step. Counted by a dispatch mode: everything that
reaches a kernel or makes a view, in the forward pass, the loss and the backward pass.
"""

from __future__ import annotations

import argparse
import collections
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pmixseg.backbones import (
    UHVED,
    Backbone,
    EarlyFusion,
    MMFormer,
    MultiEncoderUNet,
    RFNet,
    ShaSpec,
)
from pmixseg.execution import as_on_gpu
from pmixseg.losses.rfnet import RFNetCriterion
from pmixseg.losses.segmentation import Criterion, DiceCE
from pmixseg.losses.shaspec import ShaSpecCriterion
from pmixseg.losses.uhved import UHVEDCriterion

SEGRESNET = {"class_path": "monai.networks.nets.SegResNet", "init_args": {"init_filters": 16}}
STEPS: dict[str, tuple[Callable[[], Backbone], Callable[[], Criterion]]] = {
    "RFNet": (RFNet, RFNetCriterion),
    "MultiEncoderUNet": (MultiEncoderUNet, DiceCE),
    "MMFormer": (lambda: MMFormer(patch_size=32), RFNetCriterion),
    "UHVED": (UHVED, UHVEDCriterion),
    "ShaSpec": (ShaSpec, ShaSpecCriterion),
    "EarlyFusion(SegResNet)": (lambda: EarlyFusion(SEGRESNET), DiceCE),
}
"""Network and criterion of every row."""
VIEWS = ("view", "unbind", "detach", "t", "transpose", "permute", "expand", "select", "slice")
VIEWS += (
    "split",
    "unsqueeze",
    "squeeze",
    "as_strided",
    "alias",
    "_unsafe_view",
    "split_with_sizes",
)
"""Operations that start no kernel; the host spends time on them all the same."""


class Counter(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count, and compute."""
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def kernels(self) -> int:
        """Operations that are no views."""
        return sum(n for name, n in self.calls.items() if name not in VIEWS)


def one_batch(side: int, samples: int) -> dict[str, Tensor]:
    """A random batch of four modalities, all of them shown."""
    torch.manual_seed(0)
    shown = torch.ones(samples, 4, dtype=torch.bool)
    return {
        "image": torch.randn(samples, 4, side, side, side),
        "label": torch.randint(0, 4, (samples, side, side, side)),
        "present": shown,
        "acquired": shown,
    }


def count_step(name: str, side: int = 32, samples: int = 1) -> Counter:
    """Operations of forward pass, loss and backward pass."""
    make_network, make_criterion = STEPS[name]
    network, criterion = make_network().train(), make_criterion()
    batch = one_batch(side, samples)
    with as_on_gpu(), Counter() as counter:
        output = network(batch["image"], batch["present"])
        criterion(output, batch, 0).backward()  # type: ignore[no-untyped-call]  # untyped in torch
    return counter


def main() -> int:
    """Print the counts as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--top", type=int, default=0, help="names of the commonest operations")
    given = parser.parse_args()
    print("| training step, batch 1 | operations | without views |")
    print("|---|---|---|")
    for name in given.only:
        counter = count_step(name, given.side)
        print(f"| `{name}` | {counter.calls.total()} | {counter.kernels} |", flush=True)
        for operation, number in counter.calls.most_common(given.top):
            print(f"|   {operation} | {number} | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
