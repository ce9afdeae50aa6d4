"""How many operations one training step starts, with the layers that a GPU takes.

    python experiments/benchmarks/operations.py [--only RFNet …] [--side 32] [--top 12]

A GPU waits for the host, which needs some 10 to 50 microseconds to start an operation, so where
volumes are small their number is the time of a step. Counted by a dispatch mode: everything that
reaches a kernel or makes a view, in the forward pass, the loss and the backward pass. Where the
loss is one compiled graph, calls of Python functions around it are left: they are counted, too.
"""

from __future__ import annotations

import argparse
import collections
import functools
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from card import Bench, phantom_store, trainer_of
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
from pmixseg.callbacks import PmixAlignment
from pmixseg.data.augment import Augmentation
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.patches import PatchDataset
from pmixseg.data.splits import Fractions
from pmixseg.evaluation.prediction.windows import iterate_combinations
from pmixseg.execution import as_on_gpu
from pmixseg.losses.rfnet import RFNetCriterion
from pmixseg.losses.segmentation import Criterion, DiceCE
from pmixseg.losses.shaspec import ShaSpecCriterion
from pmixseg.losses.term import TermWeight
from pmixseg.losses.uhved import UHVEDCriterion
from pmixseg.modules import StudentModule

SEGRESNET = {"class_path": "monai.networks.nets.SegResNet", "init_args": {"init_filters": 16}}
STEPS: dict[str, tuple[Callable[[], Backbone], Callable[[], Criterion]]] = {
    "RFNet": (RFNet, RFNetCriterion),
    "MultiEncoderUNet": (MultiEncoderUNet, DiceCE),
    "MMFormer": (lambda: MMFormer(patch_size=32), RFNetCriterion),
    "UHVED": (UHVED, UHVEDCriterion),
    "ShaSpec": (ShaSpec, ShaSpecCriterion),
    "DeMoSeg": (DeMoSeg, DiceCE),
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
    """Counts operations by name.

    Args:
        least: values that a result must have to be counted.
    """

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.least = least
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count, and compute."""
        made = func(*args, **(kwargs or {}))
        if not self.least or (isinstance(made, Tensor) and made.numel() >= self.least):
            self.calls[func.overloadpacket.__name__] += 1
        return made

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


def aligned_module() -> StudentModule:
    """What ``pmixseg fit`` trains by default, with alignment."""
    torch.manual_seed(0)
    module = StudentModule()
    term = PmixAlignment(weight=0.1, distance="nmse").build_term(module)
    module.add_term("align", term, TermWeight(0.1))
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # no trainer listens
    return module.train()


def count_fit(side: int = 32) -> dict[str, int]:
    """Operations of the parts of a step of ``pmixseg fit`` with fill and alignment, no views."""
    module, batch = aligned_module(), one_batch(side, 2)
    batch |= {"key": torch.tensor([1, 2]), "case_id": ["a", "b"]}  # type: ignore[dict-item]  # names are no tensors
    counts = {}
    with as_on_gpu():
        optimizer = module.configure_optimizers()
        with Counter() as counter:
            loss = module.training_step(batch, 0)
        counts["training_step"] = counter.kernels
        with Counter() as counter:
            loss.backward()
        counts["backward"] = counter.kernels
        with Counter() as counter:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0, foreach=True)
        counts["clipping"] = counter.kernels
        optimizer.step()  # the first one makes its state
        with Counter() as counter:
            optimizer.step()
        counts["optimizer"] = counter.kernels
    return counts


class HostCalls(Callback):
    """Counts calls of Python functions from the end of one step to the end of the next.

    Args:
        step: after which it begins.
    """

    def __init__(self, step: int) -> None:
        self.step, self.calls, self.counts = step, 0, False

    def without(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, with what it calls left out."""

        @functools.wraps(function)
        def paused(*args: Any, **kwargs: Any) -> Any:
            sys.setprofile(None)
            made = function(*args, **kwargs)
            sys.setprofile(self._see if self.counts else None)
            return made

        return paused

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out what a compiled step does not do in Python."""
        for name in ("losses", "backward"):
            setattr(pl_module, name, self.without(getattr(pl_module, name)))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Begin, or end."""
        self.counts = trainer.global_step == self.step
        sys.setprofile(self._see if self.counts else None)

    def _see(self, frame: object, event: str, argument: object) -> None:
        self.calls += event == "call"


def count_host(*levels: int) -> list[tuple[int, int]]:
    """Calls of Python functions in a step of ``pmixseg fit``, besides its loss and its loader.

    Args:
        levels: of each MultiEncoderUNet, filled, aligned and clipped, as in :func:`count_fit`.

    Returns:
        For each the calls, and how many tensors are trained.
    """
    bench, counted = Bench(torch.device("cpu"), rehearse=True), []
    settings: dict[str, Any] = {"gradient_clip_val": 1.0, "limit_val_batches": 0, "max_steps": 4}
    with phantom_store(bench) as store, as_on_gpu():
        for number in levels:
            counter = HostCalls(2)
            module = StudentModule(backbone=MultiEncoderUNet(width=2, levels=number))
            terms = [PmixAlignment(weight=0.1, distance="nmse"), counter]
            split = Fractions(1.0, 0.0, 0.0)
            data = BraTSDataModule(store, patch_size=16, patches_per_case=4, split=split)
            trainer = trainer_of(bench, store.parent, "32-true", callbacks=terms, **settings)
            read = counter.without(PatchDataset.__getitem__)  # by workers, elsewhere
            with mock.patch.object(PatchDataset, "__getitem__", read):
                trainer.fit(module, data)
            counted.append((counter.calls, len(list(module.parameters()))))
    return counted


def count_augmentation(side: int = 32, samples: int = 2) -> int:
    """Operations on volumes of augmenting a batch in which everything is drawn."""
    batch = one_batch(side, samples)
    batch["key"] = torch.arange(samples)
    augment = Augmentation(resample=1.0, gamma_probability=1.0, noise_probability=1.0)
    with as_on_gpu(), Counter(least=side**3) as counter:
        augment(batch)
    return counter.kernels


def count_passes(windows: int) -> int:
    """Passes of the decoder for 15 combinations of a case with so many windows."""
    network = MultiEncoderUNet(width=4, levels=2).eval()
    passes = []
    decode = network.decode
    network.decode = lambda latents: (passes.append(1), decode(latents))[1]  # type: ignore[method-assign]  # counted
    flags = torch.tensor([[bool(k >> m & 1) for m in range(4)] for k in range(1, 16)])
    image = torch.randn(4, 8, 8, 4 * (windows + 1))
    with as_on_gpu():
        next(iterate_combinations(network, image, flags, patch=(8, 8, 8), batch_size="auto"))
    return len(passes)


def main(words: list[str] | None = None) -> int:
    """Print the counts as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--top", type=int, default=0, help="names of the commonest operations")
    args = parser.parse_args(words)
    print("| training step, batch 1 | operations | without views |")
    print("|---|---|---|")
    for name in args.only:
        counter = count_step(name, args.side)
        print(f"| `{name}` | {counter.calls.total()} | {counter.kernels} |", flush=True)
        for operation, number in counter.calls.most_common(args.top):
            print(f"|   {operation} | {number} | |")
    print("\n| a step of `fit`, batch 2, filled and aligned | without views |\n|---|---|")
    for part, number in count_fit(args.side).items():
        print(f"| {part} | {number} |", flush=True)
    ((calls, tensors),) = count_host(4)
    print(f"| Python functions called around the loss of {tensors} tensors | {calls} |", flush=True)
    for samples in (2, 8):
        number = count_augmentation(args.side, samples)
        print(f"| augmentation of {samples} patches, everything drawn | {number} |")
    print("\n| 15 combinations of a case | passes of the decoder |\n|---|---|")
    for windows in (1, 8, 36):
        print(f"| {windows} windows | {count_passes(windows)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
