"""One picture of a result: three planes of every scan, contours, volumes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray

from pmixseg.data.formats.colours import class_colours
from pmixseg.data.formats.nifti import ScanReader, Source
from pmixseg.data.scans.boxes import Box, bounds
from pmixseg.data.scans.geometry import Geometry
from pmixseg.evaluation.prediction.segmentation import NOTICE
from pmixseg.evaluation.report.figures import drawing
from pmixseg.task import Task

PLANES = ("sagittal", "coronal", "axial")
"""Names of the planes, by the canonical axis that they cut: right, front, up."""

_PAPER, _INK = "#101012", "#e8e8ea"
_WIDTH, _TITLE = 9.0, 1.1
"""Inches: of the picture, and of the lines above the scans."""
_MARGIN = 4
"""Voxels around the head."""
_BRIGHTEST = 99.5
"""Percentile of a scan's voxels above 0 that is shown white."""


def scans_on_grid(
    images: Mapping[str, Source], shape: tuple[int, ...], affine: ArrayLike, where: str
) -> dict[str, NDArray[np.float32]]:
    """Read the scans that lie on a result's grid; others cannot be drawn under it."""
    scans = {}
    for modality, source in images.items():
        scan = ScanReader(where).read(source, modality)
        if scan.data.shape == shape and np.allclose(scan.affine, affine, atol=1e-3):
            scans[modality] = np.asarray(scan.values(), np.float32)
    return scans


def overview(
    scans: Mapping[str, NDArray[np.float32]],
    classes: NDArray[np.uint8],
    affine: ArrayLike,
    task: Task,
    *,
    name: str,
    volumes: Mapping[str, float],
) -> Figure:
    """Draw a result over its scans.

    Each row is a scan. The planes cut where most of the tumour is, or through the middle of the
    head where nothing was segmented. The patient's right is on the left.

    Args:
        scans: modality -> ``[x, y, z]`` on the grid of the result.
        classes: ``[x, y, z]`` class indices.
        affine: 4 x 4, voxels to mm.
        task: names of labels, regions and modalities.
        name: of the case.
        volumes: region -> ml.
    """
    x, y, z = classes.shape
    geometry = Geometry.of((x, y, z), affine)
    labels = geometry.canonical_view(classes)
    views = {m: geometry.canonical_view(scan) for m, scan in scans.items()}
    head = _head([*views.values(), labels])
    labels, views = labels[head], {m: view[head] for m, view in views.items()}
    cuts = _cuts(labels, next(iter(views.values()), labels))
    right, front, up = np.asarray(labels.shape) * geometry.source_spacing
    widths = [front, right, right]
    rows = max(len(views), 1)
    height = rows * (_WIDTH * max(front, up) / sum(widths) + 0.25) + _TITLE
    colours = class_colours(len(task.labels))
    with drawing():
        figure = Figure(figsize=(_WIDTH, height), facecolor=_PAPER)
        grid = figure.add_gridspec(
            rows, 3, left=0.01, right=0.99, bottom=0.01, wspace=0.02, hspace=0.08,
            top=1 - _TITLE / height, width_ratios=widths,
        )  # fmt: skip
        for row, (modality, scan) in enumerate(views.items()):
            white = np.percentile(scan[scan > 0], _BRIGHTEST) if (scan > 0).any() else 1.0
            for axis in range(3):
                axes = figure.add_subplot(grid[row, axis])
                axes.set_axis_off()
                plane, drawn = (_upright(np.take(v, cuts[axis], axis)) for v in (scan, labels))
                across, along = (a for a in range(3) if a != axis)
                aspect = geometry.source_spacing[along] / geometry.source_spacing[across]
                axes.imshow(plane, cmap="gray", vmin=0, vmax=white, aspect=aspect)
                # Neighbours share contours: the first label, as a rule the core, lies on top.
                for number, colour in reversed([*enumerate(colours, 1)]):
                    if (drawn == number).any():
                        axes.contour(drawn == number, [0.5], colors=[colour], linewidths=0.9)
                axes.set_title(f"{task.show(modality)}, {PLANES[axis]}", color=_INK, fontsize=8)
        sizes = "   ".join(f"{task.show(region)} {ml:.1f} ml" for region, ml in volumes.items())
        for down, text, size in (
            (0.1, name, 12),
            (0.36, sizes or "no volume", 10),
            (0.6, NOTICE, 7),
        ):
            figure.text(0.01, 1 - down / height, text, color=_INK, size=size, va="top")
        lines = [
            Line2D([], [], color=c, label=task.show(n))
            for n, c in zip(task.labels, colours, strict=True)
        ]
        figure.legend(
            handles=lines, loc="upper right", ncols=len(lines), frameon=False, labelcolor=_INK
        )
    return figure


def _head(views: list[NDArray[np.generic]]) -> tuple[slice, ...]:
    """Return the box of all voxels that are not 0, with a margin."""
    boxes = [box for view in views if (box := bounds(view)) is not None]
    if not boxes:
        return (slice(None),) * 3
    whole = reduce(Box.union, boxes)
    sides = zip(whole.lo, whole.hi, strict=True)
    return tuple(slice(max(lo - _MARGIN, 0), hi + _MARGIN) for lo, hi in sides)


def _cuts(labels: NDArray[np.uint8], scan: NDArray[np.generic]) -> list[int]:
    """Say where to cut each axis: the plane with most tumour, or the middle of what is not 0."""
    cuts = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        tumour = np.count_nonzero(labels, axis=others)
        if tumour.any():
            most = np.flatnonzero(tumour == tumour.max())
            cuts.append(int(most[len(most) // 2]))
        else:
            filled = np.flatnonzero(np.any(scan != 0, axis=others))
            cuts.append(int(filled.mean()) if filled.size else labels.shape[axis] // 2)
    return cuts


def _upright(plane: NDArray[np.generic]) -> NDArray[np.generic]:
    """Turn a plane for display: up is up or to the front, the patient's right on the left."""
    return plane[::-1, ::-1].T
