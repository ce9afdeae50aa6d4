"""Does a bounded number of open maps make reading slower? Both ways in turn, in one process.

A store keeps at most 480 arrays mapped, since every map holds a file open. With more cases than
these belong to, nearly every patch maps its case anew. The same patches are read from a store that
keeps all its maps. Processor time of one thread; a ratio near 1 means that mapping costs nothing.

    python experiments/benchmarks/open_maps.py [--cases 400] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.patches import PatchDataset
from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
from pmixseg.data.store.store import Store, prepare
from pmixseg.data.store.stored import MAX_MAPS, OpenMaps, seal, unseal
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


def seconds(patches: PatchDataset, epoch: int, count: int) -> float:
    """Processor time of one pass over all cases, one patch each."""
    start = time.process_time()
    for index in range(count):
        patches[epoch, index]
    return time.process_time() - start


def main() -> None:
    """Print milliseconds per patch, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--spacing", type=float, default=2.0, help="of the phantom, in mm")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "phantom", Path(folder) / "store"
        write_cohort(root, 1, settings=PhantomSettings(spacing=args.spacing))
        prepare(find_cases(root, BRATS), out, BRATS, progress=False)
        copied(out, args.cases)
        bounded, endless = Store.open(out), Store.open(out)
        endless._maps = OpenMaps(10**9)  # what is compared with
        ways = {
            name: PatchDataset(store, store.cases, (64, 64, 64))
            for name, store in (("bounded", bounded), ("all open", endless))
        }
        for patches in ways.values():
            seconds(patches, 0, args.cases)  # opens every case once
        clocks: dict[str, list[float]] = {name: [] for name in ways}
        for epoch in range(1, args.rounds + 1):
            for name, patches in ways.items():
                clocks[name].append(1000 * seconds(patches, epoch, args.cases) / args.cases)
    best = {name: min(times) for name, times in clocks.items()}
    console = Console()
    console.print(f"{args.cases} cases, {MAX_MAPS} maps at a time, patches of 64 x 64 x 64")
    for name, value in best.items():
        console.print(f"{name:9s} {value:.2f} ms per patch (median {np.median(clocks[name]):.2f})")
    console.print(f"ratio {best['bounded'] / best['all open']:.3f}")


if __name__ == "__main__":
    main()
