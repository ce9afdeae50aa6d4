"""Named post-processing of predicted label maps: off by default, recorded where it was used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from nibabel.affines import voxel_sizes
from numpy.typing import ArrayLike
from scipy import ndimage

from pmixseg.data.scans.geometry import Spacing
from pmixseg.errors import InputError
from pmixseg.task import Task

Labels = UInt8[np.ndarray, "x y z"]

ET_MINIMUM_MM3 = 500.0
"""Smallest credible enhancing tumour; 500 voxels of the 1 mm BraTS grid."""


def postprocess(
    labels: Labels, steps: Sequence[str], task: Task, affine: Float[ArrayLike, "4 4"]
) -> Labels:
    """Apply steps by name, in order.

    Steps are names among :data:`STEPS`; the affine (voxel to mm) is for those with a volume.

    Example:
        >>> from pmixseg.task import BRATS
        >>> ring = np.ones((3, 3, 3), np.uint8)
        >>> ring[1, 1, 1] = 0
        >>> int(postprocess(ring, ["fill_holes"], BRATS, np.eye(4))[1, 1, 1])
        1
    """
    check_steps(steps, task)
    sizes = voxel_sizes(np.asarray(affine)).tolist()
    for name in steps:
        labels = STEPS[name](labels, task, (sizes[0], sizes[1], sizes[2]))
    return labels


def check_steps(steps: Sequence[str], task: Task) -> None:
    """Refuse steps, before anything long has run, that :func:`postprocess` would."""
    check_names(steps)
    if "et_below_500" in steps:
        _enhancing(task)


def check_names(steps: Sequence[str]) -> None:
    """Refuse names that are no step, whatever the task."""
    for name in [steps] if isinstance(steps, str) else steps:
        if name not in STEPS:
            raise InputError(f"post-processing '{name}' is unknown; use names of {list(STEPS)}.")
    if isinstance(steps, str):
        raise InputError(f"post-processing is '{steps}'; give a list of steps: ['{steps}'].")


def et_below_500(labels: Labels, task: Task, spacing: Spacing) -> Labels:
    """Call all enhancing tumour core when there is less than 500 mm³ of it.

    Class ET becomes the other class of the smallest region around it (for BraTS NCR, so TC and WT
    stay what they were). It turns the ET Dice of a case without enhancement from 0 to 1, and
    moves mean ET Dice by more than a point: compare only results that share it.

    Source: the rule of RFNet's and nnU-Net's BraTS evaluation.
    """
    enhancing, core = _enhancing(task)
    voxels = labels == enhancing
    if np.count_nonzero(voxels) * math.prod(spacing) >= ET_MINIMUM_MM3:
        return labels
    return np.where(voxels, np.uint8(core), labels)


def largest_component(labels: Labels, task: Task, spacing: Spacing) -> Labels:
    """Keep the largest 26-connected piece of the foreground; the rest becomes background.

    Of equally large pieces the first in array order stays. Wrong for multifocal disease.
    """
    pieces, count = ndimage.label(labels > 0, structure=np.ones((3, 3, 3)))
    if count < 2:
        return labels
    sizes = np.bincount(pieces.ravel())
    keep = 1 + int(sizes[1:].argmax())
    return np.where(pieces == keep, labels, np.uint8(0))


def fill_holes(labels: Labels, task: Task, spacing: Spacing) -> Labels:
    """Fill background that the foreground encloses, with the class that touches it most.

    Enclosed: no path of face-connected background voxels leads to the border of the array. Of
    classes that touch a hole equally often, the smaller index fills it.
    """
    boxes = ndimage.find_objects((labels > 0).astype(np.uint8))
    if not boxes:
        return labels
    box = boxes[0]
    around = np.pad(labels[box], 1)
    pieces, _ = ndimage.label(around == 0)
    filled = around.copy()
    outside = pieces[0, 0, 0]
    for number, where in enumerate(ndimage.find_objects(pieces), start=1):
        if number == outside:
            continue
        near = tuple(slice(s.start - 1, s.stop + 1) for s in where)
        hole = pieces[near] == number
        votes = np.zeros(task.num_classes, np.int64)
        for axis in range(3):
            for step in (-1, 1):
                # A hole never touches the padded box's border, so nothing wraps around.
                neighbour = np.roll(around[near], step, axis)[hole]
                votes += np.bincount(neighbour, minlength=task.num_classes)
        filled[near][hole] = 1 + int(votes[1:].argmax())
    result = labels.copy()
    result[box] = filled[1:-1, 1:-1, 1:-1]
    return result


STEPS: Mapping[str, Callable[[Labels, Task, Spacing], Labels]] = {
    "et_below_500": et_below_500,
    "largest_component": largest_component,
    "fill_holes": fill_holes,
}
"""Name -> pure function of (class indices, task, spacing in mm)."""


def _enhancing(task: Task) -> tuple[int, int]:
    """Return the class of ET, and the class that replaces it."""
    regions = {name: set(task.region_classes(name)) for name in task.regions}
    enhancing = regions.get("ET", set())
    around = sorted((r for r in regions.values() if r > enhancing), key=len)
    if len(enhancing) != 1 or not around:
        raise InputError(
            f"post-processing 'et_below_500' needs a region ET of one label inside a larger one, "
            f"but task '{task.name}' has {dict(task.regions)}; leave the step out."
        )
    return next(iter(enhancing)), min(around[0] - enhancing)
