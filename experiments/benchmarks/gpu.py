"""Every figure of a GPU in one run; without one, the number of operations that a GPU would start.

    python experiments/benchmarks/gpu.py [--official PATH] [--rows ceilings steps fit test …]
    python experiments/benchmarks/gpu.py --rehearse

PATH is a checkout of github.com/dyh127/RFNet. Seconds are medians between CUDA events, memory is
torch's peak. Ratios hold within a run; the first line names the card. ``--rehearse`` runs every row
once on tiny volumes, on whatever device there is: it shows that they run, and its times mean
nothing. Compiling takes most of the time: with ``--lock FILE``, several of these commands (each
with rows or ``--networks`` of its own) compile at the same time and take turns at measuring.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import operations
import small_trainings
import torch
from backbones import COMBINATIONS, official_loop, published
from card import (
    NETWORKS,
    Bench,
    Clock,
    DriverCalls,
    Durations,
    phantom_store,
    trainer_of,
)
from torch import Tensor, nn

from pmixseg import BraTSDataModule, PmixAlignment, StudentModule
from pmixseg.data.augment import Augmentation
from pmixseg.data.splits import Fractions, WholeCohort
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.evaluation.prediction.windows import iterate_combinations
from pmixseg.losses.rfnet import RFNetCriterion
from pmixseg.losses.segmentation import DiceCE
from pmixseg.modules.training.compilation import arrange

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CRITERIA = {"RFNet": RFNetCriterion, "MultiEncoderUNet": DiceCE}
PARTS = {
    "training_step": "Strategy].*training_step",
    "backward": "Strategy].*backward",
    "clipping": "LightningModule].*configure_gradient_clipping",
    "optimizer": "LightningModule].*optimizer_step",
    "augmentation": "LightningDataModule].*on_after_batch_transfer",
    "transfer": "Strategy].*batch_to_device",
    "loader": "train_dataloader_next",
}
"""Where the host's time of a step goes -> name in Lightning's profiler."""


def ceilings(bench: Bench) -> None:
    """What the card can do: a matrix product, a convolution in both layouts."""
    n = 256 if bench.rehearse else 8192
    for precision, dtype in TYPES.items():
        a, b = (bench.random(n, n).to(dtype) for _ in range(2))
        seconds = bench.seconds(lambda a=a, b=b: a @ b)
        bench.row(f"matrix product {n}, {precision}", tflops=2 * n**3 / seconds / 1e12)
    for precision, dtype in TYPES.items():
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            conv = nn.Conv3d(64, 64, 3, padding=1).to(bench.device, dtype).to(memory_format=layout)
            x = bench.random(2, 64, *[bench.side] * 3).to(dtype).contiguous(memory_format=layout)
            with torch.no_grad():
                seconds = bench.seconds(lambda conv=conv, x=x: conv(x))
            rate = 2 * 2 * 64 * 64 * 27 * bench.side**3 / seconds / 1e12
            last = "channels last" if layout is torch.channels_last_3d else "contiguous"
            bench.row(f"convolution 64-64, {precision}, {last}", s=seconds, tflops=rate)
            bench.ceiling = max(bench.ceiling, rate)


def _published_loss(parts: Any, truth: Tensor) -> Tensor:
    """The published recipe's weighted cross-entropy and Dice on every output."""

    def one(output: Tensor) -> Tensor:
        weight = 1 - truth.sum((0, 2, 3, 4)) / truth.sum()
        log = output.clamp(0.005, 1).log()
        entropy = -(weight[:, None, None, None] * truth * log).sum(1).mean()
        shared = 2 * (output * truth).sum((0, 2, 3, 4))
        both = output.sum((0, 2, 3, 4)) + truth.sum((0, 2, 3, 4)) + 1e-7
        return entropy + 1 - (shared / both).mean()

    total: Tensor = sum(one(part.float()) for part in parts)
    return total


def _labelled(bench: Bench, samples: int) -> dict[str, Tensor]:
    """A random batch, all modalities shown."""
    shape = [bench.side] * 3
    shown = torch.ones(samples, 4, dtype=torch.bool, device=bench.device)
    label = torch.randint(0, 4, (samples, *shape), device=bench.device)
    image = bench.random(samples, 4, *shape)
    return {"image": image, "label": label, "present": shown, "acquired": shown}


def _published_step(bench: Bench, batch: dict[str, Tensor], precision: str) -> float:
    """Seconds of a step of the published RFNet."""
    network: Any = published(str(bench.official)).to(bench.device).train()
    network.is_training = True
    truth = nn.functional.one_hot(batch["label"], 4).permute(0, 4, 1, 2, 3).float()

    def step() -> None:
        network.zero_grad(set_to_none=True)
        with bench.autocast(precision):
            fused, separate, regions = network(batch["image"], batch["present"])
        _published_loss((fused, *separate, *regions), truth).backward()

    seconds = bench.seconds(step)
    name = f"step of the published RFNet, {precision}, batch {len(truth)}"
    bench.row(name, s=seconds, gib=bench.memory(step))
    return seconds


def _own_step(
    bench: Bench, name: str, batch: dict[str, Tensor], precision: str, work: float | None
) -> tuple[float, float]:
    """Measure a step of a network of ours, compiled where its work is known already.

    Returns:
        Its floating-point operations, and its seconds.
    """
    network, criterion, image = bench.network(name).train(), CRITERIA[name](), batch["image"]

    def losses() -> Tensor:
        return criterion(network.decode(network.encode(image, batch["present"])), batch, 30)  # type: ignore[arg-type]  # what criteria read

    run: Callable[[], Tensor] = losses
    if work is not None:
        arrange(network, torch.channels_last_3d)
        image = image.contiguous(memory_format=torch.channels_last_3d)
        how: Any = {"backend": "eager"} if bench.rehearse else {"mode": "reduce-overhead"}
        run = torch.compile(losses, fullgraph=True, dynamic=False, **how)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        if bench.cuda:
            torch.compiler.cudagraph_mark_step_begin()
        with bench.autocast(precision):
            loss = run()
        loss.backward()

    compiled = work is not None
    flops = bench.work(step) if work is None else work
    start = time.perf_counter()
    # With the first step: what a replayed graph needs is allocated there.
    memory = bench.memory(step)
    values = {"first_s": time.perf_counter() - start} if compiled else {}
    seconds = bench.seconds(step)
    values |= {"s": seconds, "gib": memory, "tflops": flops / seconds / 1e12}
    if bench.ceiling:
        values["of_ceiling"] = values["tflops"] / bench.ceiling
    title = f"step of {name}, {precision}, batch {len(image)}"
    bench.row(f"{title}, {'compiled, channels last' if compiled else 'uncompiled'}", **values)
    return flops, seconds


def steps(bench: Bench) -> None:
    """Forward, loss, backward: the published RFNet, and ours uncompiled and compiled."""
    for samples in (1,) if bench.rehearse else bench.batches:
        batch, reference = _labelled(bench, samples), 0.0
        if bench.official and "RFNet" in bench.networks:
            reference, _ = [_published_step(bench, batch, precision) for precision in TYPES]
        for name in bench.networks:
            _own_step(bench, name, batch, "fp32", None)
            work, uncompiled = _own_step(bench, name, batch, "bf16", None)
            compiled = _own_step(bench, name, batch, "bf16", work)[1]
            if reference and name == "RFNet":
                ratios = {"uncompiled": reference / uncompiled, "compiled": reference / compiled}
                bench.row(
                    f"the published fp32 step against ours in bf16, batch {samples}", **ratios
                )


def fit(bench: Bench) -> None:
    """``pmixseg fit`` with fill, alignment and augmentation, and where the time of a step goes."""
    rows = [("MultiEncoderUNet", "bf16-mixed", False), ("RFNet", "16-mixed", False)]
    if not bench.rehearse:  # a minute of the compiler each
        rows += [("MultiEncoderUNet", "bf16-mixed", True), ("MultiEncoderUNet", "16-mixed", True)]
    with phantom_store(bench) as store:
        for name, precision, compiled in rows:
            if name in bench.networks:
                _fit(bench, store, name, precision, compiled)


def _fit(bench: Bench, store: Path, name: str, precision: str, compiled: bool) -> None:
    """One row of :func:`fit`."""
    number, recorded = (2, 1) if bench.rehearse else (60, 5)
    first = number // 2  # before, it warms up and compiles
    data = BraTSDataModule(
        store,
        patch_size=bench.side,
        batch_size=2,
        num_workers=0 if bench.rehearse else 8,
        patches_per_case=number + recorded,
        split=Fractions(1.0, 0.0, 0.0),
    )
    module = StudentModule(
        backbone=bench.network(name), criterion=CRITERIA[name](), compile=compiled
    )
    profiler, clock, calls = Durations(), Clock(first, number, bench), DriverCalls(number)
    trainer = trainer_of(
        bench,
        store.parent,
        precision,
        max_steps=number + recorded,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        profiler=profiler,
        # nmse, as all fits of the tables: the default, case_nce, starts 212 operations more.
        callbacks=[PmixAlignment(weight=0.1, distance="nmse"), clock, calls],
    )
    trainer.fit(module, data)
    times, parts = profiler.recorded_durations, {}
    for part, pattern in PARTS.items():
        names = [name for name in times if re.search(pattern, name)]
        parts[part] = sum(statistics.median(times[name][first:number]) for name in names)
    parts["optimizer"] -= sum(parts[k] for k in ("training_step", "backward", "clipping"))
    parts["transfer"] -= parts["augmentation"]
    title = f"fit of {name}, {precision}, compile: {str(compiled).lower()}"
    bench.row(title, s=clock.seconds, **parts)
    if calls.milliseconds:
        bench.row(f"{title}: ms a step in calls of the driver (calls)", **calls.milliseconds)


def _published_loop(bench: Bench, image: Tensor, flags: Tensor) -> float:
    """Seconds of the published test for 15 masks, scaled up from two."""
    network: Any = published(str(bench.official)).to(bench.device).eval()
    network.is_training = False
    two = flags[[14, 4]]
    return bench.seconds(lambda: official_loop(network, image, two), 2, 1) * 15 / 2


@torch.no_grad()
def test(bench: Bench) -> None:
    """15 combinations of one case, and how much of a test's time the card works."""
    size = (24, 16, 16) if bench.rehearse else (144, 176, 152)
    image, flags = bench.random(4, *size), torch.tensor(COMBINATIONS, device=bench.device)
    side, sizes = (bench.side,) * 3, (1, "auto")
    for precision in TYPES:
        with bench.autocast(precision):
            reference = 0.0
            if bench.official and not bench.rehearse:
                reference = _published_loop(bench, image, flags)
                bench.row(f"15 combinations, published loop, {precision}, scaled", s=reference)
            for name in bench.networks:
                network = bench.network(name).eval()
                for batch_size in sizes:
                    predict: Callable[[], Tensor] = functools.partial(
                        lambda *args, **named: next(iterate_combinations(*args, **named))[1],
                        network,
                        image,
                        flags,
                        patch=side,
                        batch_size=batch_size,
                    )
                    values = bench.seconds_and_memory(predict, 2, 1)
                    if reference and name == "RFNet":
                        values["x_published"] = reference / values["s"]
                    title = f"15 combinations, {name}, {precision}, batch_size {batch_size}"
                    bench.row(title, **values)
    for name in bench.networks:
        _cohort(bench, name)


def _cohort(bench: Bench, name: str) -> None:
    """``pmixseg test`` of a few phantoms: seconds, and the share in which the card works.

    The network is trained a little first: distances between the surfaces of noise take minutes. A
    test of one case goes before, so that the first kernels are not part of the time.
    """
    with phantom_store(bench) as store:
        settings = EvaluationSettings(window=None, examples=0)
        module = StudentModule(
            backbone=bench.network(name), criterion=CRITERIA[name](), evaluation=settings
        )
        module.force = True  # tests the cases of its training: only the time counts
        patch = (48, 48, 32) if bench.rehearse else bench.side
        number, limit = (1, 1) if bench.rehearse else (200, 4)
        precision, whole = "bf16-mixed", Fractions(1.0, 0.0, 0.0)
        training = BraTSDataModule(store, patch_size=patch, patches_per_case=number, split=whole)
        trainer_of(bench, store.parent, precision, max_steps=number, limit_val_batches=0).fit(
            module, training
        )
        data = BraTSDataModule(store, patch_size=patch, split=WholeCohort())
        torch.backends.cudnn.benchmark = False  # as in `pmixseg test`: batches differ in size
        trainer_of(bench, store.parent, precision, limit_test_batches=1).test(
            module, data, verbose=False
        )
        trainer = trainer_of(bench, store.parent, precision, limit_test_batches=limit)
        with bench.turn():
            start = time.perf_counter()
            with bench.busy() as share:
                trainer.test(module, data, verbose=False)
            seconds = time.perf_counter() - start
        bench.row(f"test of a cohort, {name}, bf16", s=seconds, **share)


def loader(bench: Bench) -> None:
    """Reading and augmenting a batch of two patches."""
    with phantom_store(bench) as store:
        for workers in (0,) if bench.rehearse else (0, 8):
            data = BraTSDataModule(
                store,
                patch_size=bench.side,
                num_workers=workers,
                patches_per_case=8 if bench.rehearse else 60,
                split=Fractions(1.0, 0.0, 0.0),
            )
            data.setup("fit")
            batches = iter(data.train_dataloader())
            batch, start = next(batches), time.perf_counter()
            read = sum(1 for _ in batches)
            seconds = (time.perf_counter() - start) / read
            bench.row(f"reading a batch, {workers} workers", s=seconds)
    keys = batch["key"]
    there = {k: v.to(bench.device) for k, v in batch.items() if isinstance(v, Tensor)}
    augment = Augmentation()
    bench.row("augmenting a batch", s=bench.seconds(lambda: augment(dict(there), keys)))


def several(bench: Bench) -> None:
    """Small trainings (four patches of 64³) in processes of their own, all at once."""
    numbers, ways, seconds = (1, 9), [*small_trainings.WAYS, *small_trainings.FITS], 5.0
    if bench.rehearse:
        numbers, ways, seconds = (2,), ["uncompiled", "fit"], 0.1
    with phantom_store(bench) as store:
        for way in ways:
            for number in numbers:
                several_at_once(bench, way, number, seconds, store)


def several_at_once(bench: Bench, way: str, number: int, seconds: float, store: Path) -> None:
    """One row of :func:`several`."""
    turn = bench.turn()
    rate = small_trainings.rate(bench.device.type, way, number, seconds, turn, str(store))
    bench.row(f"{number} small trainings at once, {way}", steps_per_s=rate)


ROWS = {
    "ceilings": ceilings,
    "steps": steps,
    "fit": fit,
    "test": test,
    "loader": loader,
    "several": several,
}


def main(words: list[str] | None = None) -> int:
    """Measure on a card, or count on a CPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--official", help="checkout of github.com/dyh127/RFNet")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--lock", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(words)
    cuda = torch.cuda.is_available()
    if not cuda and not args.rehearse:
        print("No card here: operations that one would start.\n")
        return operations.main([])
    torch.backends.cudnn.benchmark = True
    bench = Bench(
        torch.device("cuda" if cuda else "cpu"),
        args.official,
        args.rehearse,
        args.lock,
        tuple(args.networks),
        tuple(args.batches),
    )
    card = torch.cuda.get_device_name() if cuda else "no card"
    print(f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}\n\n| work | |\n|---|---|")
    failed = 0
    for name in args.rows:
        try:
            ROWS[name](bench)
        except Exception as error:  # the other rows are worth their time all the same
            failed += 1
            print(f"| {name} failed | {type(error).__name__}: {error} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
