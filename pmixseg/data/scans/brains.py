"""Check that one scan shows a brain without skull, on a background of 0.

Heuristics with thresholds that were chosen on the seven BraTS 2021 cases of the tests and damaged
copies of them. They find gross mistakes and prove nothing: what passes may still be wrong.
"""

from __future__ import annotations

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


def not_a_brain(
    scan: npt.NDArray[np.generic], zooms: tuple[float, ...], name: str, whole: bool | None = None
) -> str | None:
    """Suspect a skull, a background that is not 0, inverted intensities, or a label map.

    Args:
        scan: ``[D, H, W]`` intensities, or their tight box.
        zooms: voxel size in mm.
        name: how the phrase names it.
        whole: the non-zero voxels reach all faces of the volume, of which ``scan`` is their tight
            box; by default, ``scan`` is the volume.
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
