"""Planes of a case as pictures: image, truth, prediction and where they disagree."""

from __future__ import annotations

import base64
import gzip
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from matplotlib.image import imsave
from numpy.typing import NDArray

from pmixseg.data.formats.colours import class_colours, red_green_blue
from pmixseg.evaluation.records.examples import Example
from pmixseg.evaluation.report.figures import drawing
from pmixseg.task import Combination, Task, format_combination

Plane = UInt8[np.ndarray, "d h"]
Picture = UInt8[np.ndarray, "rows columns 3"]

MISSED, INVENTED, CONFUSED = "#4aa3ff", "#ff5470", "#c58bff"
"""Truth without prediction; prediction without truth; both, of different classes."""

OPACITY = 0.62


@dataclass(frozen=True)
class Panel:
    """One picture (RGB, anterior up, the patient's right on the left) and two lines under it."""

    title: str
    note: str
    picture: Picture

    @property
    def data_uri(self) -> str:
        """The picture as a PNG in a ``data:`` address."""
        buffer = io.BytesIO()
        imsave(buffer, self.picture, format="png")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def upright(plane: Plane) -> Plane:
    """Return an axial plane ``[right, anterior]`` as rows and columns of a radiological picture."""
    return np.ascontiguousarray(plane[::-1, ::-1].T)


def plain(grey: Plane) -> Picture:
    """Show grey values as RGB."""
    return np.repeat(upright(grey)[..., None], 3, axis=2)


def labelled(grey: Plane, labels: Plane) -> Picture:
    """Show classes in colour over the image."""
    return _tint(plain(grey), upright(labels), class_colours(int(labels.max(initial=0))))


def disagreement(grey: Plane, truth: Plane, prediction: Plane) -> Picture:
    """Show missed, invented and confused voxels in colour over the image."""
    kind = np.zeros(truth.shape, np.uint8)
    kind[(truth > 0) & (prediction == 0)] = 1
    kind[(truth == 0) & (prediction > 0)] = 2
    kind[(truth > 0) & (prediction > 0) & (truth != prediction)] = 3
    return _tint(plain(grey), upright(kind), [MISSED, INVENTED, CONFUSED])


def shown_combinations(available: Sequence[Combination], task: Task) -> list[Combination]:
    """Return the largest combination and every single modality that was predicted from."""
    full = max(available, key=len)
    singles = [(m,) for m in task.modalities if (m,) in available]
    return list(dict.fromkeys([full, *singles]))


def panels(runs: Mapping[str, Example], task: Task) -> list[list[Panel]]:
    """Draw rows of pictures of one case: its modalities and truth; per run predictions and errors.

    Image and truth are those of the first run.
    """
    first = next(iter(runs.values()))
    truth = first.slice_truth
    top = [
        Panel(task.show(name), "" if grey.any() else "not acquired", plain(grey))
        for name, grey in zip(first.modalities, first.slice_image, strict=True)
    ]
    ground = dict(zip(first.modalities, first.slice_image, strict=True))
    if truth is not None:
        top.append(Panel("Truth", "", labelled(_backdrop(first.modalities, ground), truth)))
    rows = [top]
    for run, example in runs.items():
        predicted: list[Panel] = []
        wrong: list[Panel] = []
        for combination in shown_combinations(example.combinations, task):
            labels = example.slice_predictions[example.combinations.index(combination)]
            grey = _backdrop(combination, ground)
            name = combination_title(combination, task)
            predicted.append(Panel("Prediction", f"from {name}", labelled(grey, labels)))
            if truth is not None:
                wrong.append(Panel("Error", f"from {name}", disagreement(grey, truth, labels)))
        several = len(runs) > 1
        for row in (predicted, wrong):
            if row:
                rows.append(
                    [Panel(f"{p.title}, {run}" if several else p.title, p.note, p.picture)
                     for p in row]
                )  # fmt: skip
    return rows


def combination_title(combination: Combination, task: Task) -> str:
    """Name ``all four`` modalities ``all``; join others by +."""
    if len(combination) == task.num_modalities and len(combination) > 1:
        return "all"
    return " + ".join(task.show(m) for m in combination)


def case_figure(runs: Mapping[str, Example], task: Task) -> Figure:
    """Return the pictures of :func:`panels` as one figure."""
    rows = panels(runs, task)
    first = next(iter(runs.values()))
    across = max(len(row) for row in rows)
    height, width = rows[0][0].picture.shape[:2]
    aspect = first.slice_spacing[1] / first.slice_spacing[0]
    # One mosaic: a plot of its own for each of 25 pictures takes ten times as long to draw.
    gap = max(width // 25, 1)
    title = round(0.2 * width / aspect)
    steps = height + title, width + gap
    mosaic = np.zeros((steps[0] * len(rows), steps[1] * across - gap, 4), np.uint8)
    with drawing():
        size = 1.75 * across, 1.75 * across * aspect * mosaic.shape[0] / mosaic.shape[1]
        figure = Figure(figsize=(size[0], size[1] + 0.3))
        axes = figure.add_axes((0, 0, 1, size[1] / (size[1] + 0.3)))
        axes.axis("off")
        for i, row in enumerate(rows):
            for k, panel in enumerate(row):
                top, left = i * steps[0] + title, k * steps[1]
                mosaic[top : top + height, left : left + width, :3] = panel.picture
                mosaic[top : top + height, left : left + width, 3] = 255
                text = ", ".join(t for t in (panel.title, panel.note) if t)
                axes.text(left + width / 2, top - title * 0.2, text, ha="center", size=7.5)
        axes.imshow(mosaic, aspect="auto", interpolation="nearest")
        figure.text(0.005, 1 - 0.2 / (size[1] + 0.3), first.case, size=9, weight="bold")
    return figure


def viewer_case(runs: Mapping[str, Example]) -> dict[str, object]:
    """Return one case for the page's viewer: small volumes, compressed, in text."""
    first = next(iter(runs.values()))
    grey = first.image & np.uint8(0xFC)  # 64 grey levels look the same and take half the room
    return {
        "case": first.case,
        "shape": list(first.image.shape[1:]),
        "spacing": list(first.spacing),
        "modalities": list(first.modalities),
        "image": packed(grey),
        "truth": None if first.truth is None else packed(first.truth),
        "runs": [
            {
                "run": run,
                "combinations": [format_combination(c) for c in one.combinations],
                "predictions": packed(one.predictions),
            }
            for run, one in runs.items()
            if one.predictions.shape[1:] == first.image.shape[1:]
        ],
    }


def packed(array: NDArray[np.uint8]) -> str:
    """Pack bytes in C order, by gzip and base64."""
    raw = gzip.compress(np.ascontiguousarray(array).tobytes(), compresslevel=6, mtime=0)
    return base64.b64encode(raw).decode()


def _backdrop(combination: Sequence[str], ground: Mapping[str, Plane]) -> Plane:
    """Return the first modality of the combination that has voxels there."""
    planes = [ground[m] for m in combination if m in ground]
    return next((p for p in planes if p.any()), planes[0])


def _tint(picture: Picture, kinds: Plane, colours: Sequence[str]) -> Picture:
    """Blend colour k over voxels of kind k."""
    blended = picture.astype(np.float32)
    for kind, colour in enumerate(colours, start=1):
        rgb = np.array(red_green_blue(colour), np.float32)
        inside = kinds == kind
        blended[inside] = (1 - OPACITY) * blended[inside] + OPACITY * rgb
    return blended.round().astype(np.uint8)
