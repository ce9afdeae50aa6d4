"""Picture of the phantom for the README: one case per row, one sequence per column.

python experiments/phantom/montage.py --out docs/assets/montage.png
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from numpy.typing import NDArray
from PIL import Image

from pmixseg.data.phantom.cohort import PhantomSettings, make_case
from pmixseg.task import BRATS

WINDOW = (slice(44, 196), slice(26, 222))
"""The part of a slice that holds brain, in voxels of 1 mm."""

COLOURS = {"NCR": "#d62728", "ED": "#2ca02c", "ET": "#ffdd33"}


def most_telling_slice(label: NDArray[np.uint8]) -> int:
    """The axial slice with most tumour, the core counting double."""
    area = (label > 0).sum(axis=(0, 1)) + ((label == 1) | (label == 3)).sum(axis=(0, 1))
    return int(area.argmax())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("montage.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, nargs="+", default=[3, 7, 15, 1])
    args = parser.parse_args()

    settings = PhantomSettings(spacing=1.0)
    columns = [*BRATS.modalities, "label"]
    figure, axes = plt.subplots(
        len(args.cases),
        len(columns),
        figsize=(1.5 * len(columns), 1.95 * len(args.cases)),
        facecolor="black",
        squeeze=False,
    )
    overlay = ListedColormap([COLOURS[name] for name in BRATS.labels])
    for row, index in zip(axes, args.cases, strict=True):
        case = make_case(args.seed, index, settings)
        z = most_telling_slice(case.label)
        for axis, column in zip(row, columns, strict=True):
            axis.axis("off")
            volume = case.images["t1" if column == "label" else column]
            top = np.percentile(volume[volume > 0], 99.7)
            axis.imshow(volume[*WINDOW, z].T, cmap="gray", vmin=0, vmax=top)
            if column == "label":
                label = case.label[*WINDOW, z].T
                shown = np.ma.masked_equal(label, 0)
                axis.imshow(shown, cmap=overlay, vmin=1, vmax=3, alpha=0.65, interpolation="none")
        row[0].text(3, 10, case.grade, color="white", fontsize=7)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(BRATS.show(column), color="white", fontsize=8, pad=3)
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.97, wspace=0.02, hspace=0.02)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=90, facecolor="black")
    # 96 colours are enough for grey values and three labels, and a third of the bytes.
    picture = Image.open(drawn).convert("RGB").quantize(96, dither=Image.Dither.NONE)
    picture.save(args.out, optimize=True)
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
