"""Small copies of a case and its predictions, for pictures: ``<run>/slices/<case>.npz``.

=====================  =====================================================================
array                  meaning
=====================  =====================================================================
``format``             1
``modalities``         ``str[M]``
``combinations``       ``str[K]``, names joined by ``+``
``spacing``            ``float32[3]``, mm of the volumes below
``image``              ``uint8[M, d, h, w]``; 0 is background, 255 the 99.5th percentile
``truth``              ``uint8[d, h, w]`` class indices; empty if the case has no label
``predictions``        ``uint8[K, d, h, w]`` class indices
``slice_spacing``      ``float32[2]``, mm of the planes below
``slice_image``        ``uint8[M, d, h]``: one axial plane at full resolution
``slice_truth``        ``uint8[d, h]``; empty if the case has no label
``slice_predictions``  ``uint8[K, d, h]``
=====================  =====================================================================

Axes run right, anterior, superior (RAS). The plane is the one with most labelled voxels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from pmixseg.errors import InputError, explained
from pmixseg.files import inside, whole
from pmixseg.task import Combination, format_combination

FORMAT = 1
FOLDER = "slices"
"""Where a run keeps its examples."""

MAX_SIDE = 96
"""Longest side of the small volumes, in voxels."""


@dataclass(frozen=True)
class Example:
    """A case small enough to embed in a page. Fields are the arrays of the file, see above."""

    case: str
    modalities: tuple[str, ...]
    combinations: tuple[Combination, ...]
    spacing: tuple[float, float, float]
    image: UInt8[np.ndarray, "m d h w"]
    truth: UInt8[np.ndarray, "d h w"] | None
    predictions: UInt8[np.ndarray, "k d h w"]
    slice_spacing: tuple[float, float]
    slice_image: UInt8[np.ndarray, "m d h"]
    slice_truth: UInt8[np.ndarray, "d h"] | None
    slice_predictions: UInt8[np.ndarray, "k d h"]

    @classmethod
    def from_volumes(
        cls,
        case: str,
        modalities: Sequence[str],
        image: Float[np.ndarray, "m d h w"],
        truth: UInt8[np.ndarray, "d h w"] | None,
        predictions: Mapping[Combination, UInt8[np.ndarray, "d h w"]],
        spacing: Sequence[float],
        max_side: int = MAX_SIDE,
    ) -> Example:
        """Shrink volumes by a whole factor and cut the plane with most tumour.

        The image is RAS with background 0, its ``spacing`` in mm; truth and the predictions, of
        which there is at least one, lie on its grid. The longest side of the small volumes has
        ``max_side`` voxels.
        """
        labels = [p for p in (truth, *predictions.values()) if p is not None]
        if not predictions or any(p.shape != image.shape[1:] for p in labels):
            raise InputError(
                f"case '{case}': pictures need at least one prediction, and truth and predictions "
                f"of the image's shape {image.shape[1:]}."
            )
        grey = np.stack([_grey(channel) for channel in image])
        stack = np.stack([np.asarray(p, np.uint8) for p in predictions.values()])
        # The plane with most tumour: of the truth where there is one.
        counted = stack if truth is None or not truth.any() else truth[None]
        plane = int((counted > 0).sum((0, 1, 2)).argmax())
        if not counted.any():
            plane = image.shape[3] // 2
        # A whole factor, the same along all axes that are long enough.
        shrink = max(-(-max(image.shape[1:]) // max_side), 1)
        factors = [min(shrink, side) for side in image.shape[1:]]
        small = None if truth is None else _thin(truth[None], factors)[0].astype(np.uint8)
        mm = tuple(float(s) for s in spacing)
        return cls(
            case=case,
            modalities=tuple(modalities),
            combinations=tuple(predictions),
            spacing=(mm[0] * factors[0], mm[1] * factors[1], mm[2] * factors[2]),
            image=_block_means(grey, factors),
            truth=small,
            predictions=_thin(stack, factors),
            slice_spacing=(mm[0], mm[1]),
            slice_image=grey[..., plane],
            slice_truth=None if truth is None else truth[..., plane].astype(np.uint8),
            slice_predictions=stack[..., plane],
        )

    def save(self, run: Path) -> Path:
        """Write ``slices/<case>.npz`` into a run folder; a reader never sees half a file."""
        path = inside(run / FOLDER, f"{self.case}.npz", "case")
        arrays: dict[str, Any] = {"format": FORMAT, **vars(self)}
        del arrays["case"]
        arrays["combinations"] = [format_combination(c) for c in self.combinations]
        for name in ("spacing", "slice_spacing"):
            arrays[name] = np.array(arrays[name], np.float32)
        for name in ("truth", "slice_truth"):
            arrays[name] = np.zeros(0, np.uint8) if arrays[name] is None else arrays[name]
        with whole(path) as part:
            np.savez_compressed(part, **arrays)
        return path

    def _check_shapes(self) -> None:
        """Raise ``ValueError`` where arrays do not belong together."""
        if (len(self.spacing), len(self.slice_spacing)) != (3, 2):
            raise ValueError("its spacings are not of three axes and two")
        counts = len(self.modalities), len(self.combinations)
        for truth, *stacks in (
            (self.truth, self.image, self.predictions),
            (self.slice_truth, self.slice_image, self.slice_predictions),
        ):
            grid = stacks[0].shape[1:]
            arrays = [*stacks, *([] if truth is None else [truth])]
            shapes = [(n, *grid) for n in counts] + [grid]
            if (
                any(a.dtype != np.uint8 for a in arrays)
                or [a.shape for a in arrays] != shapes[: len(arrays)]
            ):
                raise ValueError("its arrays do not belong together")

    @classmethod
    def load(cls, path: Path) -> Example:
        """Read one file."""
        with explained(f"{path}: is not an example of a run", "test again"):
            with np.load(path, allow_pickle=False) as raw:
                arrays: dict[str, Any] = {name: raw[name] for name in raw.files}
            if int(arrays["format"]) != FORMAT:
                raise InputError(
                    f"{path}: format {arrays['format']} is not known to this version of pmixseg; "
                    "upgrade it or test again."
                )
            arrays["case"] = path.stem
            for name in ("modalities", "spacing", "slice_spacing"):
                arrays[name] = tuple(arrays[name].tolist())
            arrays["combinations"] = tuple(tuple(c.split("+")) for c in arrays["combinations"])
            for name in ("truth", "slice_truth"):
                arrays[name] = arrays[name] if arrays[name].size else None
            read = cls(**{field.name: arrays[field.name] for field in fields(cls)})
            read._check_shapes()
            return read


def examples_of(run: Path) -> dict[str, Path]:
    """Map the id of each case to the file of its example in a run folder."""
    return {path.stem: path for path in sorted((run / FOLDER).glob("[!.]*.npz"))}


def _grey(channel: Float[np.ndarray, "d h w"]) -> UInt8[np.ndarray, "d h w"]:
    """Return grey values: background 0, the 0.5th to 99.5th percentile of the rest on 1 to 255."""
    channel = np.asarray(channel, np.float32)
    inside = channel != 0
    if not inside.any():
        return np.zeros(channel.shape, np.uint8)
    low, high = np.percentile(channel[inside], [0.5, 99.5])
    scaled = (channel - low) / max(float(high - low), 1e-6)
    grey: UInt8[np.ndarray, "d h w"] = np.where(inside, 1 + 254 * scaled.clip(0, 1), 0).astype(
        np.uint8
    )
    return grey


def _block_means(
    volumes: UInt8[np.ndarray, "m d h w"], factors: Sequence[int]
) -> UInt8[np.ndarray, "m d h w"]:
    sides = [n // f for n, f in zip(volumes.shape[1:], factors, strict=True)]
    cut = volumes[(slice(None), *(slice(n * f) for n, f in zip(sides, factors, strict=True)))]
    split = [length for pair in zip(sides, factors, strict=True) for length in pair]
    means: UInt8[np.ndarray, "m d h w"] = (
        cut.reshape(len(volumes), *split).mean((2, 4, 6)).round().astype(np.uint8)
    )
    return means


def _thin(
    labels: UInt8[np.ndarray, "k d h w"], factors: Sequence[int]
) -> UInt8[np.ndarray, "k d h w"]:
    """Return the voxel in the middle of each block."""
    sides = [n // f for n, f in zip(labels.shape[1:], factors, strict=True)]
    middles = (slice(f // 2, n * f, f) for n, f in zip(sides, factors, strict=True))
    return np.ascontiguousarray(labels[(slice(None), *middles)])
