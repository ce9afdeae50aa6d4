"""Does reading a large store with few open files cost anything? Both ways in turn, in one process.

The package maps a store's arrays and closes their files, so that any number of cases is read with
1,024 open files. numpy's own maps, which hold a file open each, read the same patches; all of them
are kept open, which takes two files a case. Processor time of one thread and page faults; a ratio
near 1 means that few open files cost nothing.

    python experiments/benchmarks/open_maps.py [--cases 2000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import functools
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.patches import PatchDataset
from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
from pmixseg.data.store.store import Store, prepare
from pmixseg.data.store.stored import seal, unseal
from pmixseg.task import BRATS


def copied(store: Path, count: int) -> None:
    """Give one prepared case ``count`` names; the voxels are links."""
    (first,) = (store / "cases").iterdir()
    meta = unseal(first / "meta.json")
    assert meta is not None
    for index in range(count - 1):
        folder = store / "cases" / f"copy_{index:05}"
        folder.mkdir()
        for name in meta["files"]:
            os.link(first / name, folder / name)
        (folder / "meta.json").write_text(seal({**meta, "case_id": folder.name}))


@functools.cache
def numpy_map(path: Path, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Map an array by numpy, and keep it so: what is compared with."""
    return np.asarray(np.load(path, mmap_mode="r"))


def cost(patches: PatchDataset, epoch: int, count: int) -> tuple[float, float]:
    """Milliseconds of processor time and page faults per patch, over one patch of every case."""
    start, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for index in range(count):
        patches[epoch, index]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return 1000 * (time.process_time() - start) / count, faults / count


def open_files() -> int:
    """How many files this process holds open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def main() -> None:
    """Print milliseconds, page faults and open files of both ways, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--spacing", type=float, default=2.0, help="of the phantom, in mm")
    args = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 2 * args.cases + 200), most))
    console = Console()
    console.print(f"{args.cases} cases, patches of 64 x 64 x 64, per patch:")
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "phantom", Path(folder) / "store"
        write_cohort(root, 1, settings=PhantomSettings(spacing=args.spacing))
        prepare(find_cases(root, BRATS), out, BRATS, progress=False)
        copied(out, args.cases)
        ours, numpys = Store.open(out), Store.open(out)
        numpys._maps = numpy_map
        ways = {
            name: PatchDataset(store, store.cases, (64, 64, 64))
            for name, store in (("pmixseg", ours), ("numpy, all files open", numpys))
        }
        cost(PatchDataset(Store.open(out), ours.cases[:1], (64, 64, 64)), 0, 100)  # fills the heap
        files = {}
        for name, patches in ways.items():
            before = open_files()
            first, faults = cost(patches, 0, args.cases)
            files[name] = open_files() - before
            console.print(f"{name:21s} {first:.2f} ms, {faults:.0f} page faults: first pass")
        costs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for epoch in range(1, args.rounds + 1):
            for name, patches in ways.items():
                costs[name].append(cost(patches, epoch, args.cases))
    best = {name: min(each) for name, each in costs.items()}
    for name, (clock, faults) in best.items():
        console.print(
            f"{name:21s} {clock:.2f} ms, {faults:.0f} page faults, {files[name]} open files"
        )
    console.print(f"ratio {best['pmixseg'][0] / best['numpy, all files open'][0]:.3f}")


if __name__ == "__main__":
    main()
