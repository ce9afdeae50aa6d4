"""How long a real case takes to prepare and a patch takes to read, against what bounds them.

    OMP_NUM_THREADS=1 python experiments/benchmarks/store.py ../shared/data/brats2021

The variants take turns within every repetition, so that a busy machine slows all of them alike.
Reported are medians over cases and repetitions, and ratios of medians, of wall and of CPU time.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from isal import igzip, isal_zlib

from pmixseg.data.cohorts.layouts import Case, find_cases
from pmixseg.data.store.arrays import copy_box
from pmixseg.data.store.store import Store, StoredCase, prepare
from pmixseg.task import BRATS

PATCH = 80


def room(packed: bytes) -> int:
    """Length of the content, which ends a gzip file; one byte more spares a second buffer."""
    return int.from_bytes(packed[-4:], "little") + 1


GUNZIP: dict[str, Callable[[bytes], bytes]] = {
    "isal": lambda packed: isal_zlib.decompress(packed, 31, room(packed)),
    "igzip": igzip.decompress,
    "zlib": lambda packed: zlib.decompress(packed, 31, room(packed)),
}


def fastest_gunzip(case: Case) -> str:
    packed = next(iter(case.images.values())).read_bytes()
    clocks: Clocks = defaultdict(list)
    for _ in range(15):
        for name, gunzip in GUNZIP.items():
            clocks[name].append(timed(gunzip, packed))
    best = {name: min(cpu for _, cpu in runs) for name, runs in clocks.items()}
    print("decompressing one file:", ", ".join(f"{n} {1e3 * t:.1f} ms" for n, t in best.items()))
    return min(best, key=best.get)


def floor(case: Case, out: Path, sizes: Iterable[int], gunzip: Callable[[bytes], bytes]) -> None:
    """Decompress the case's files and write as many bytes as its store has."""
    for path in [*case.images.values(), case.label]:
        gunzip(path.read_bytes())
    for number, size in enumerate(sizes):
        (out / f"{number}.bin").write_bytes(memoryview(ZEROS)[:size])


ZEROS = bytearray(64 << 20)


def plain(case: Case, out: Path) -> None:
    """The same work as most preprocessing scripts do it."""
    stacks, masks = [], []
    for name in BRATS.modalities:
        data = nib.as_closest_canonical(nib.load(case.images[name])).get_fdata()
        brain = data != 0
        z = np.zeros_like(data)
        z[brain] = (data[brain] - data[brain].mean()) / data[brain].std()
        stacks.append(z)
        masks.append(brain)
    where = np.nonzero(np.any(masks, axis=0))
    lo = [w.min() // 8 * 8 for w in where]
    hi = [min(-(-(w.max() + 1) // 8) * 8, n) for w, n in zip(where, data.shape, strict=True)]
    box = tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))
    np.save(out / "image.npy", np.stack([z[box] for z in stacks]).astype(np.float16))
    label = nib.as_closest_canonical(nib.load(case.label)).get_fdata()[box]
    classes = np.zeros(label.shape, np.uint8)
    for index, name in enumerate(BRATS.labels):
        classes[label == case.codes[name]] = index + 1
    np.save(out / "label.npy", classes)


Clocks = dict[str, list[tuple[float, float]]]
"""Variant -> (wall, CPU) seconds of every run."""


def timed(
    work: Callable[..., object], *arguments: object, **settings: object
) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work(*arguments, **settings)
    return time.perf_counter() - wall, time.process_time() - cpu


def medians(title: str, clocks: Clocks) -> dict[str, tuple[float, float]]:
    middles = {
        name: (statistics.median(w for w, _ in runs), statistics.median(c for _, c in runs))
        for name, runs in clocks.items()
    }
    for name, (wall, cpu) in middles.items():
        print(f"{title}: {name} {1e3 * wall:.1f} ms wall, {1e3 * cpu:.1f} ms CPU")
    return middles


def show_ratio(what: str, a: tuple[float, float], b: tuple[float, float]) -> None:
    print(f"{what}: {a[0] / b[0]:.2f} (of CPU time {a[1] / b[1]:.2f})")


def preparing(cases: list[Case], folder: Path, repeats: int) -> None:
    gunzip = GUNZIP[fastest_gunzip(cases[0])]
    clocks: Clocks = defaultdict(list)
    for _ in range(repeats):
        for case in cases:
            out = Path(tempfile.mkdtemp(dir=folder))
            ours = out / "store"
            clocks["prepare"].append(timed(prepare, [case], ours, BRATS, progress=False))
            meta = json.loads((ours / "cases" / case.case_id / "meta.json").read_text())
            clocks["floor"].append(
                timed(floor, case, out, [f["bytes"] for f in meta["files"].values()], gunzip)
            )
            clocks["nibabel + numpy"].append(timed(plain, case, out))
            stored = Store.open(ours).read(case.case_id)
            difference = np.abs(np.load(out / "image.npy") - stored.image.astype(np.float32)).max()
            assert difference < 0.01 and (np.load(out / "label.npy") == stored.label).all()
            shutil.rmtree(out)
    middles = medians("per case", clocks)
    show_ratio("prepare / floor (at most 3)", middles["prepare"], middles["floor"])
    show_ratio(
        "nibabel + numpy / prepare (at least 2)", middles["nibabel + numpy"], middles["prepare"]
    )


def reading(stored: StoredCase, repeats: int) -> None:
    random = np.random.default_rng(0)
    free = np.array(stored.image.shape[1:]) - PATCH
    clocks: Clocks = defaultdict(list)

    def read_patch() -> np.ndarray:
        a, b, c = (slice(s, s + PATCH) for s in random.integers(0, free + 1))
        return copy_box(stored.image[:, a, b, c])

    for _ in range(repeats):
        clocks["patch"].append(timed(read_patch))
        clocks["whole array"].append(timed(np.load, stored.folder / "image.npy"))
    middles = medians(f"read from {stored.image.shape} {stored.image.dtype}", clocks)
    show_ratio("patch / whole array (at most 0.25)", middles["patch"], middles["whole array"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = find_cases(args.root, BRATS)
    print(f"{len(cases)} cases, {args.repeats} repetitions, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Reading first: once larger arrays have come and gone, glibc hands the whole array's block
        # out again without returning it to the system, which no loader of many cases can count on.
        for dtype in ("float16", "float32"):
            prepare(cases[:1], folder / dtype, BRATS, dtype=dtype, progress=False)
            reading(Store.open(folder / dtype).read(cases[0].case_id), 20 * args.repeats)
        preparing(cases, folder, args.repeats)


if __name__ == "__main__":
    main()
