"""RFNet of this package against the published code: testing 15 combinations, and a training step.

    python experiments/benchmarks/backbones.py test --official PATH --case CASE [--crop 80 80 120]
    python experiments/benchmarks/backbones.py train --official PATH
    python experiments/benchmarks/backbones.py options [--network unet]
    python experiments/benchmarks/backbones.py layers --threads 1 --side 48 [--network unet]

PATH is a checkout of github.com/dyh127/RFNet; CASE a folder with one BraTS case. Both sides have
the same random weights, carried over by this package's importer, the same windows and as many
threads.
"""

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measuring import (
    KINDS,
    TORCH_KINDS,
    autocast,
    gflop,
    matmul_gflops,
    round_of,
    timed,
    torch_layers,
)
from torch import Tensor, nn

from pmixseg.backbones import MultiEncoderUNet, RFNet
from pmixseg.cli.allocator import keep_freed_memory
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.scans.canonical import canonicalise
from pmixseg.evaluation.prediction.windows import iterate_combinations
from pmixseg.inference.published_weights import import_official
from pmixseg.losses.rfnet import RFNetCriterion
from pmixseg.losses.segmentation import DiceCE
from pmixseg.task import BRATS
from pmixseg.types import Latents

SIDE = 80
COMBINATIONS = [[bool(k >> m & 1) for m in range(4)] for k in range(1, 16)]


def published(path: str) -> nn.Module:
    """The published network with random weights and non-zero biases."""
    sys.path.insert(0, path)
    import models  # type: ignore[import-not-found]  # the checkout's

    if not hasattr(models, "Model"):  # the benchmark models.py, which lies beside this file
        sys.exit(f"--official {path}: give a checkout of github.com/dyh127/RFNet")
    torch.manual_seed(0)
    network: nn.Module = models.Model(num_cls=4)
    return network


def imported(network: nn.Module) -> nn.Module:
    """This package's network with the same weights, by way of a checkpoint file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "official.pth"
        state = {f"module.{name}": value for name, value in network.state_dict().items()}
        torch.save({"epoch": 0, "state_dict": state}, file)
        return import_official("rfnet", file).module.backbone


# ---------------------------------------------------------------- testing


def read_case(folder: Path, crop: list[int]) -> Tensor:
    """The middle of a case, ``[4, *crop]``, normalised as everywhere in this package."""
    case = find_cases(folder, BRATS)[0]
    image = torch.from_numpy(canonicalise(case.images, None, BRATS, dtype="float32").image)
    for axis, side in enumerate(crop, 1):
        side = min(side, image.shape[axis])
        image = image.narrow(axis, (image.shape[axis] - side) // 2, side)
    return image.contiguous()


def official_loop(network: nn.Module, image: Tensor, flags: Tensor) -> Tensor:
    """The published test: for each mask, each window in turn, softmax added, divided by counts."""
    starts = [[*range(0, n - SIDE, SIDE // 2), n - SIDE] for n in image.shape[1:]]
    sums = image.new_zeros(len(flags), 4, *image.shape[1:])
    counts = torch.zeros_like(image[0])
    windows = [
        tuple(slice(k, k + SIDE) for k in (h, w, z))
        for h in starts[0]
        for w in starts[1]
        for z in starts[2]
    ]
    for row, total in zip(flags, sums, strict=True):
        for window in windows:
            part = network(image[(None, slice(None), *window)], row[None])
            total[(slice(None), *window)] += part[0].float()
    for window in windows:
        counts[window] += 1
    return sums / counts


def _later_decode(net: Any, latents: Latents) -> float:
    net.decode(latents)  # fills the cache of terms
    return gflop(lambda: net.decode(latents))


@torch.no_grad()
def test(args: argparse.Namespace) -> None:
    """Time both loops over the same crop, and compare what they predict."""
    image = read_case(args.case, args.crop)
    flags = torch.tensor(COMBINATIONS)
    theirs = published(args.official).eval()
    ours = imported(theirs).eval()

    cpu = args.threads == 1  # on one thread, waiting for other jobs need not count

    def predict(precision: str) -> tuple[float, Tensor]:
        with autocast(precision):
            return timed(
                lambda: next(
                    iterate_combinations(
                        ours, image, flags, patch=(SIDE,) * 3, overlap=0.5, blend="uniform"
                    )
                )[1],
                cpu,
            )

    shown, half = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[True, True, False, False]])
    window = image[None, :, :SIDE, :SIDE, :SIDE]
    latents = ours.encode(window, shown)
    work = {
        "official": 15 * gflop(lambda: theirs(window, half)),
        "pmixseg": gflop(lambda: ours.decode(ours.encode(window, shown)))
        + 14 * _later_decode(ours, latents.restrict(half)),
    }
    windows = 1
    for side in image.shape[1:]:
        windows *= len([*range(0, side - SIDE, SIDE // 2), side - SIDE])
    sides = "x".join(map(str, image.shape[1:]))
    clock = "CPU" if cpu else "wall"
    print(f"{sides} voxels, {windows} windows x 15, {args.threads} threads, {clock} seconds")
    yard = {
        p: matmul_gflops(d, cpu) for p, d in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    print(f"matrix product: {yard['fp32']:.0f} GFLOP/s fp32, {yard['bf16']:.0f} bf16", flush=True)

    some = flags[torch.linspace(0, 14, args.combinations).long()]

    def official(allocator: str) -> tuple[float, Tensor]:
        """Seconds for 15 combinations, by those that were run, and their probabilities."""
        with autocast(args.theirs):
            seconds, probabilities = timed(lambda: official_loop(theirs, image, some), cpu)
        seconds *= 15 / args.combinations
        rate = windows * work["official"] / seconds
        print(
            f"official {args.theirs}, {allocator}: {seconds:.1f} s, {rate:.0f} GFLOP/s", flush=True
        )
        return seconds, probabilities

    plain, theirs_p = official("malloc as it comes")
    kept = keep_freed_memory()  # as every command of this package does
    also = official("freed memory kept")[0] if kept else plain
    for precision in ("fp32", "bf16"):
        seconds, every = predict(precision)
        ours_p = every[torch.linspace(0, 14, args.combinations).long()]
        equal = (ours_p.argmax(1) == theirs_p.argmax(1)).float().mean()
        print(
            f"pmixseg {precision}: {seconds:.1f} s, {plain / seconds:.2f} x, with the same malloc "
            f"{also / seconds:.2f} x, {windows * work['pmixseg'] / seconds:.0f} GFLOP/s; "
            f"{100 * equal:.4f} % equal voxels, "
            f"largest difference {(ours_p - theirs_p).abs().max():.1e}",
            flush=True,
        )


# ---------------------------------------------------------------- training


def training_step(args: argparse.Namespace) -> Callable[[], None]:
    """Forward, loss and backward of one random patch; everything acquired, everything shown."""
    torch.manual_seed(0)
    side = args.side
    image = torch.randn(1, 4, side, side, side)
    label = torch.randint(0, 4, (1, side, side, side))
    shown = torch.ones(1, 4, dtype=torch.bool)
    if args.network == "official":
        network = published(args.official)
        network.is_training = True  # type: ignore[assignment]  # a plain attribute there
        from utils import criterions  # type: ignore[import-not-found]  # the checkout's

        truth = nn.functional.one_hot(label, 4).permute(0, 4, 1, 2, 3).float()

        def step() -> None:
            network.zero_grad()
            with autocast(args.precision):
                fused, separate, maps = network(image, shown)
            parts = [p.float() for p in (fused, *separate, *maps)]
            loss = sum(
                criterions.softmax_weighted_loss(p, truth, num_cls=4)
                + criterions.dice_loss(p, truth, num_cls=4)
                for p in parts
            )
            loss.backward()

        return step

    net, image = own_network(args)
    criterion = RFNetCriterion() if args.network == "rfnet" else DiceCE()

    def own_step() -> None:
        net.zero_grad()
        with autocast(args.precision):
            output = net.decode(net.encode(image, shown))
        criterion(output, {"label": label}, 0).backward()

    return own_step


def own_network(args: argparse.Namespace) -> tuple[Any, Tensor]:
    """This package's network in training mode, and a random patch in its layout."""
    torch.manual_seed(0)
    image = torch.randn(1, 4, *(args.side,) * 3)
    make = RFNet if args.network == "rfnet" else MultiEncoderUNet
    net: Any = make(recompute=bool(args.recompute)).train()
    if args.layers == "compiled":
        net.encode = torch.compile(net.encode, dynamic=False)
        net.decode = torch.compile(net.decode, dynamic=False)
    if args.layers == "channels_last":
        net = net.to(memory_format=torch.channels_last_3d)
        image = image.contiguous(memory_format=torch.channels_last_3d)
    return net, image


def child(args: argparse.Namespace) -> None:
    """Measure in this process, which nothing else has grown."""
    if args.keep:
        keep_freed_memory()
    with torch_layers() if args.layers in TORCH_KINDS else contextlib.nullcontext():
        step = training_step(args)
        first, _ = timed(step)
        cpu = time.process_time()
        walls = [timed(step)[0] for _ in range(args.repeats)]
        cpu = (time.process_time() - cpu) / args.repeats
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"first_s": first, "wall_s": min(walls), "cpu_s": cpu, "peak_gib": peak}))


def measure(args: argparse.Namespace, **chosen: Any) -> dict[str, float]:
    """One row: a process of its own."""
    options = {
        "--official": args.official,
        "--threads": args.threads,
        "--repeats": args.repeats,
        "--side": args.side,
        **{f"--{name}": value for name, value in chosen.items()},
    }
    flags = [str(word) for pair in options.items() for word in pair if pair[1] is not None]
    done = subprocess.run(
        [sys.executable, __file__, "child", *flags], capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        raise SystemExit(done.returncode)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    said = ", ".join(f"{name} {value}" for name, value in chosen.items())
    print(f"{said}: " + ", ".join(f"{name} {value:.2f}" for name, value in row.items()), flush=True)
    return row


def train(args: argparse.Namespace) -> None:
    """One step of each, in turn, each in a process of its own."""
    for precision in ("fp32", "bf16"):
        ours = measure(args, network="rfnet", precision=precision, keep=1)
        theirs = measure(args, network="official", precision=precision)
        same = measure(args, network="official", precision=precision, keep=1)
        print(
            f"{precision}: {theirs['cpu_s'] / ours['cpu_s']:.2f} x in CPU time, "
            f"{same['cpu_s'] / ours['cpu_s']:.2f} x with the same malloc; peak memory "
            f"{ours['peak_gib'] / theirs['peak_gib']:.2f} of the official"
        )


# ---------------------------------------------------------------- options


def options(args: argparse.Namespace) -> None:
    """Every option alone, for one network, in both precisions."""
    for precision in ("fp32", "bf16"):
        for layers in KINDS:
            measure(args, network=args.network, precision=precision, layers=layers)
        measure(args, network=args.network, precision=precision, recompute=1)


def layers(args: argparse.Namespace) -> None:
    """Every kind of layers in turn in one process: a training step, testing 15 combinations.

    Processor seconds; the ratio is the median over rounds against the lean layers of that round.
    The first call, its compilation and child processes included, is apart.
    """
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # a pool of processes would be neither waited for nor counted
    inductor.force_disable_caches = True
    kinds = ["lean", *args.kinds]
    for precision, part in product(args.precisions, (training_step, testing)):
        torch.compiler.reset()
        calls, first = {}, {}
        for kind in kinds:
            chosen = {**vars(args), "precision": precision, "layers": kind}
            calls[kind] = part(argparse.Namespace(**chosen))
            first[kind] = round_of(calls, kind)
        rounds = [{k: round_of(calls, k) for k in kinds} for _ in range(args.repeats)]
        for kind in kinds:
            ratio = statistics.median(seconds[kind] / seconds["lean"] for seconds in rounds)
            cpu = statistics.median(seconds[kind] for seconds in rounds)
            print(
                f"{args.network} {part.__name__} {precision} {kind}: {cpu:.2f} CPU s, "
                f"{ratio:.2f} of lean; first call {first[kind]:.1f} CPU s",
                flush=True,
            )


def testing(args: argparse.Namespace) -> Callable[[], None]:
    """Every combination of one random window."""
    net, image = own_network(args)
    net.eval()
    flags, patch = torch.tensor(COMBINATIONS), (args.side,) * 3

    @torch.no_grad()
    def every_combination() -> None:
        with autocast(args.precision):
            next(iterate_combinations(net, image[0], flags, patch=patch, overlap=0.0))

    return every_combination


PARTS = {
    "test": test,
    "train": train,
    "options": options,
    "layers": layers,
    "child": child,
}


def main() -> int:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--official", help="checkout of github.com/dyh127/RFNet")
    parser.add_argument("--case", type=Path, help="folder of one BraTS case")
    parser.add_argument("--crop", type=int, nargs=3, default=[80, 80, 120])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--side", type=int, default=SIDE, help="training patch")
    parser.add_argument(
        "--combinations", type=int, default=15, help="of the official loop; its time is scaled up"
    )
    parser.add_argument("--theirs", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--network", choices=("rfnet", "official", "unet"), default="rfnet")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--layers", choices=KINDS, default="lean")
    parser.add_argument(
        "--kinds", nargs="*", choices=KINDS[1:], default=KINDS[1:], help="of layers"
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16")
    )
    parser.add_argument("--recompute", type=int, default=0)
    parser.add_argument("--keep", type=int, default=0, help="freed memory, as the commands do")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    PARTS[args.part](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
