"""Check that one scan shows a brain without skull, on a background of 0, slice by slice.

Heuristics with thresholds that were chosen on the seven BraTS 2021 cases of the tests and damaged
copies of them. They find gross mistakes and prove nothing: what passes may still be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from pmixseg.data.scans.boxes import bounds

MAX_BRAIN_ML = 2200.0
"""Largest credible volume of non-zero voxels. Brains with their CSF have 1000 to 1900 ml; a head
cut off below the nose has 3000 and more, and a noisy background the whole field of view."""

MAX_FILL = 0.88
"""Largest credible share of non-zero voxels in their own bounding box. Whole brains fill 0.43 to
0.48 of it, the fullest 5 mm slab of one 0.81, a scan with noise around the head about 1."""

MIN_VALUES = 16
"""Fewest different intensities of a scan; the seven cases have 1000 and more."""

MAX_SHARE = 0.5
"""Largest share of a scan's voxels in its five commonest intensities (the seven cases: 0.02).

A label map that was resampled has many values, but most voxels still hold one of its labels."""

SAMPLE = 20_000
"""At most about twice as many voxels are looked at to count intensities."""

JUDGED_ML = 200.0
"""A smaller box of non-zero voxels with a margin of zeros may be full: it is no whole brain."""

NEARLY_0 = 1e-3
"""Share of a scan's high values below which a voxel is nearly 0."""

MAX_NEARLY_0 = 0.2
"""Largest share of nearly-zero voxels among the non-zero ones."""

MAX_NEGATIVE = 0.9
"""Largest credible share of negative voxels among the non-zero ones; z-scores have about half."""

LEAST_ALIKE, JUDGED_PAIRS = 0.2, 1000
"""Least correlation of neighbouring blocks, along the best axis, and fewest pairs of blocks that
are judged. 64 real cases have 0.60 and more, resampled to 6 mm 0.39; noise in their brains at most
0.01. Noise that was smoothed is not told."""

DIRECTIONS = ("left-right", "back-front", "down-up")

MAX_RESEMBLANCE, MAX_TWICE = 3.3, 0.2
"""A slice is odd if those beside it resemble each other this many times as much as it: of 64 real
cases at most 1.02, resampled to 1.5 to 5 mm 2.3; of slices of noise or without signal, at 1 and
2 mm, at least 4.8. And the share of slices that may be there twice: of real scans, 1 of 73."""

MAX_LEAPS, LEAP = 5e-4, 0.75
"""Largest share of neighbours that differ by most of a scan's range, where this is that of 8 or 16
bits: of 64 real cases at most 8e-5, but for one with a rim of ones that has another range; where
the brightest hundredth began again at 0, at least 1.4e-3. Times the cube of what voxels are longer
than 2 mm: of phantoms at 4, 5 and 6 mm, which leap more, at most 1.8e-3, 3.3e-3 and 4.5e-3."""

LEAST_MIRRORED, LEAST_DEPTH, LEAST_TILT = 0.97, 0.95, 0.09
"""A brain is like its mirror image left-right, and longest from back to front. Of 64 real cases the
first is at least 1.08 times as true as of another axis, so at most 0.93 where axes are exchanged;
the length is at least 1.08 times the others. Of their lowest sixth the centre lies behind the
middle, by 0.10 of the length more than that of their highest sixth lies off it."""

THIN_MM, LEAST_LINES = 6.0, 200
"""Distance of the lines that slices are compared on, and the least number of these."""


def turned(brain: npt.NDArray[np.bool_], sides: tuple[float, ...]) -> list[str]:
    """Remark on a brain that lies along other axes than its header says, or the other way round.

    Programs count the axes of an array from either end, and save an array without its header.

    ``brain`` is ``[D, H, W]``; ``sides`` are those of its box, in mm.
    """
    box = bounds(brain)
    if box is None:
        return []
    part = brain[box.slices]
    mirrored = [np.count_nonzero(part & np.flip(part, axis)) for axis in range(3)]
    like, longest = int(np.argmax(mirrored)), int(np.argmax(sides))
    sixth, depth = part.shape[2] // 6 or 1, part.shape[1]
    low, high = (
        (float(np.nonzero(end)[1].mean()) + 0.5) / depth - 0.5
        for end in (part[..., :sixth], part[..., -sixth:])
    )
    shape = ""
    if mirrored[0] < LEAST_MIRRORED * mirrored[like]:
        shape = f"like its mirror image {DIRECTIONS[like]} rather than {DIRECTIONS[0]}"
    elif sides[1] < LEAST_DEPTH * sides[longest]:
        shape = f"longer {DIRECTIONS[longest]} than {DIRECTIONS[1]}"
    elif abs(abs(low) - abs(high)) > LEAST_TILT:  # cerebellum and stem lie at the end that is off
        wrong = {"upside down": abs(high) > abs(low), "back to front": max(low, high, key=abs) > 0}
        shape = " and ".join(way for way in wrong if wrong[way])
    return [
        f"its brain is {shape}, as if the axes of its files were not those that their headers say; "
        "look at it in a viewer"
    ] * bool(shape)


def odd_slices(
    scores: npt.NDArray[np.generic], zooms: tuple[float, ...], spread: float, name: str
) -> Iterator[str]:
    """Remark on slices that resemble no neighbour or are there twice, and on wrapped intensities.

    Scores are z-scores ``[D, H, W]`` with background 0, ``spread`` is the deviation of the
    intensities.
    """
    thin = [2 * max(0, round((THIN_MM / z - 1) / 2)) + 1 for z in zooms]  # odd: meets all slices
    sample = scores[tuple(slice(None, None, n) for n in thin)].astype(np.float32)
    extent = spread * float(np.ptp(sample))
    # The range of 8 or 16 bits, where the scan fills one: only there can numbers begin again at 0.
    span = next((n for n in (256, 65536) if 0.93 * n < extent < 1.01 * n), 0)
    leaps = pairs = 0
    for axis, direction in enumerate(DIRECTIONS):
        lines = tuple(slice(None, None, 1 if a == axis else n) for a, n in enumerate(thin))
        rows = np.moveaxis(scores[lines], axis, 0).reshape(scores.shape[axis], -1).astype("f4")
        if rows.shape[1] < LEAST_LINES:
            continue
        # The cosine of each slice with the next one, and with the next but one.
        energy = np.einsum("ij,ij->i", rows, rows)
        near, far = (
            np.einsum("ij,ij->i", rows[n:], rows[:-n])
            / np.sqrt(np.maximum(energy[n:] * energy[:-n], 1e-9))
            for n in (1, 2)
        )
        large = energy > 0.2 * np.quantile(energy, 0.9)
        beside = np.maximum(np.maximum(near[:-1], near[1:]), 0.05)
        if ((far > MAX_RESEMBLANCE * beside) & large[:-2] & large[2:]).any():
            yield (
                f"{name} has slices {direction} that resemble no neighbour, as of noise or empty; "
                "replace the scan"
            )
        share = float((near > 1 - 1e-6).sum()) / max(int((energy > 0).sum()), 1)
        if share > MAX_TWICE:
            yield (
                f"{name} shows {share:.0%} of its slices {direction} twice, less than its voxel "
                "size says; replace the scan"
            )
        if span:
            both = (rows[1:] != 0) & (rows[:-1] != 0)
            pairs += int(np.count_nonzero(both))
            steps = np.abs(np.diff(rows, axis=0)) * spread
            leaps += int(np.count_nonzero(both & (steps > LEAP * span)))
    if leaps > MAX_LEAPS * max(1.0, *(z / 2 for z in zooms)) ** 3 * max(pairs, 1):
        yield (
            f"{name} leaps between neighbouring voxels by its whole range of {span:,} numbers, as "
            "where too large ones begin again at 0; export it again"
        )


def noisy(scans: Mapping[str, npt.NDArray[np.int16]]) -> list[str]:
    """Suspect scans of noise, in which a block tells nothing about the one beside it.

    Args:
        scans: sequence -> bins of the means of blocks, 0 outside the brain.
    """
    phrases = []
    for name, codes in scans.items():
        alike = []
        for axis in range(3):
            here, there = np.delete(codes, -1, axis), np.delete(codes, 0, axis)
            both = (here > 0) & (there > 0)
            if np.count_nonzero(both) > JUDGED_PAIRS:
                alike.append(np.corrcoef(here[both], there[both])[0, 1])
        if alike and max(alike) < LEAST_ALIKE:
            phrases.append(f"{name} is noise, for its voxels tell nothing about those beside them")
    return phrases


def not_a_brain(
    scan: npt.NDArray[np.generic], zooms: tuple[float, ...], name: str, whole: bool | None = None
) -> str | None:
    """Suspect a skull, a background that is not 0, inverted intensities, or a label map.

    ``scan`` holds intensities ``[D, H, W]``; where they are the tight box of the non-zero voxels,
    ``whole`` says whether these reach all faces of the volume.
    """
    inner, voxel = float(scan.size), float(np.prod(zooms)) / 1000
    if whole is None:
        box = bounds(scan)
        if box is None:
            return None
        inner, whole = float(np.prod(box.shape)), box.shape == scan.shape
    flat = scan.ravel(order="K")  # as it lies in memory: no copy of a whole file's array
    count = np.count_nonzero(flat)
    if count * voxel > MAX_BRAIN_ML:
        return f"{name} has {count * voxel:.0f} ml of non-zero voxels, more than a brain"
    filled = count > MAX_FILL * inner
    if filled and (inner * voxel > JUDGED_ML or whole):
        share = count / inner
        return f"{name} is non-zero in {share:.0%} of the box around it, so its background is not 0"
    inside = flat[:: max(1, flat.size // (2 * SAMPLE))]
    inside = inside[inside != 0]
    # In float32: numpy 2.4.6 sorts float16 wrongly here and there, and then counts one value twice.
    drawn = np.sort(inside[:: max(1, len(inside) // SAMPLE)].astype(np.float32))
    negative = float((drawn < 0).mean())
    if negative > MAX_NEGATIVE:
        return f"{name} is below 0 in {negative:.0%} of its non-zero voxels, as no MR signal is"
    sizes = np.abs(drawn)
    small = float((sizes < NEARLY_0 * np.quantile(sizes, 0.99)).mean())
    if small > MAX_NEARLY_0:
        return (
            f"{name} is nearly 0 in {small:.0%} of its non-zero voxels, so its background is not 0"
        )
    new = np.flatnonzero(drawn[1:] != drawn[:-1]) + 1  # np.unique would sort again
    counts = np.diff(new, prepend=0, append=len(drawn))
    if len(counts) < MIN_VALUES:
        return f"{name} has {len(counts)} different values only, as a label map has"
    share = np.sort(counts)[-5:].sum() / counts.sum()
    if share > MAX_SHARE:
        return f"{name} has one of five values in {share:.0%} of its voxels, as a label map has"
    return None
