"""Rigid and affine registration by mutual information (SimpleITK).

A transform maps points of the *fixed* image to points of the *moving* image, in mm and LPS, as ITK
defines it: resampling asks for each voxel of the fixed grid where its value comes from.

Source: Mattes et al., PET-CT image registration in the chest using free-form deformations, IEEE TMI
2003 (the metric); Viola and Wells 1997 (mutual information).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np

from pmixseg.errors import InputError
from pmixseg.preprocess.itk import sitk

BINS = 48
COARSE_MM = 8.0
"""Voxel size at which starting positions are compared."""

LEVELS_MM = (6.0, 3.0, 1.5)
"""Voxel sizes of the levels of a registration, coarse to fine."""

SAMPLES = 60_000
"""Voxels of the fixed image that the metric looks at, at most, on a regular raster."""

SEED = 20_409_193
"""The same scans always give the same transform."""

TURNS = (-0.35, 0.0, 0.35)
"""Rotations about the left-right axis, in rad, that a start into an atlas tries: nodding heads."""

DROPS = (-30.0, 0.0, 30.0)
"""Shifts along the body axis in mm that it tries: a scan with a neck has its centre lower."""

SCALES = (0.8, 0.88, 0.96)
"""Sizes against the template that it tries, from below: from above the skull is taken for brain."""

TRIED = 4
"""How many of these starts are refined, before the best is chosen."""


def register(fixed: sitk.Image, moving: sitk.Image, what: str = "two scans") -> sitk.Transform:
    """Register two scans of one head rigidly, of any contrasts: points of fixed to those of moving.

    The start is the better of two: the scanner's coordinates, and the volumes' centres of mass laid
    upon each other. ``what`` names them in a message.
    """
    with _registering(what):
        start = _best(fixed, moving, _default_starts(fixed, moving), None, COARSE_MM)
        transform = sitk.Euler3DTransform(start)
        for size in LEVELS_MM:
            transform = _refined(_shrunk(fixed, size), _shrunk(moving, size), transform, None)
    return transform


def place_in_atlas(
    template: sitk.Image, brain: sitk.Image, scan: sitk.Image, what: str = "a scan and its atlas"
) -> tuple[sitk.Transform, sitk.Transform]:
    """Register a head, skull and neck included, to a template without skull.

    The head's size is found as well (seven parameters, then twelve), from several poses and sizes:
    a template that is larger than the brain would else settle on the skull. The metric looks at the
    template's brain alone, and the scan's brightest voxels, which are fat, are capped. The template
    is a scalar volume with background 0.

    Returns:
        Points of the template -> points of the scan: a rigid transform, which keeps the head's
        size, for resampling; and an affine one, which fits the brains to each other.
    """
    with _registering(what):
        capped = _without_fat(scan)
        pairs = {size: (_shrunk(template, size), _shrunk(capped, size)) for size in LEVELS_MM[:2]}
        first, second = LEVELS_MM[:2]
        starts = _atlas_starts(template, scan)
        scores = [_score(*pairs[first], start, brain) for start in starts]
        tried = [starts[i] for i in np.argsort(scores)[:TRIED]]
        refined = [_refined(*pairs[first], start, brain) for start in tried]
        similar = _best(template, capped, refined, brain, first)
        similar = _refined(*pairs[second], similar, brain)
        affine = sitk.AffineTransform(3)
        affine.SetMatrix(similar.GetMatrix())
        affine.SetCenter(similar.GetCenter())
        affine.SetTranslation(similar.GetTranslation())
        for size in pairs:
            affine = _refined(*pairs[size], affine, brain)
    return _without_scale(similar), affine


def resampled(
    moving: sitk.Image, grid: sitk.Image, transform: sitk.Transform, *, labels: bool = False
) -> sitk.Image:
    """Return ``moving`` on the voxels of ``grid``: linear, or the nearest voxel for labels."""
    how = sitk.sitkNearestNeighbor if labels else sitk.sitkLinear
    return sitk.Resample(moving, grid, transform, how, 0.0, moving.GetPixelID())


def _default_starts(fixed: sitk.Image, moving: sitk.Image) -> list[sitk.Transform]:
    scanner = sitk.Euler3DTransform()
    scanner.SetCenter(_centre(fixed))
    centred = sitk.CenteredTransformInitializer(
        fixed, moving, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    return [scanner, sitk.Euler3DTransform(centred)]


def _atlas_starts(fixed: sitk.Image, moving: sitk.Image) -> list[sitk.Transform]:
    """Return poses and sizes of a head in an atlas: nodded, shifted along the body axis, scaled."""
    centre = _default_starts(fixed, moving)[1]
    x, y, z = centre.GetTranslation()
    starts = []
    for turn, drop, scale in product(TURNS, DROPS, SCALES):
        start = sitk.Similarity3DTransform()
        start.SetCenter(centre.GetCenter())
        start.SetRotation((1.0, 0.0, 0.0), turn)
        start.SetScale(scale)
        start.SetTranslation((x, y, z + drop))
        starts.append(start)
    return starts


def _without_scale(similar: Any) -> Any:
    """Return the rigid transform with the same turn, and the same image of the centre."""
    rigid = sitk.Euler3DTransform()
    rigid.SetCenter(similar.GetCenter())
    turn = np.asarray(similar.GetMatrix()) / similar.GetScale()
    rigid.SetMatrix(turn.tolist(), 1e-5)
    rigid.SetTranslation(similar.GetTranslation())
    return rigid


def _without_fat(scan: sitk.Image) -> sitk.Image:
    values = sitk.GetArrayViewFromImage(scan)
    bright = values[values > values.mean()]  # the head, without air
    return sitk.Clamp(scan, sitk.sitkFloat32, float(values.min()), float(np.percentile(bright, 90)))


def _centre(image: sitk.Image) -> tuple[float, ...]:
    middle = [(n - 1) / 2 for n in image.GetSize()]
    centre: tuple[float, ...] = image.TransformContinuousIndexToPhysicalPoint(middle)
    return centre


def _best(
    fixed: sitk.Image,
    moving: sitk.Image,
    candidates: Sequence[sitk.Transform],
    mask: sitk.Image | None,
    size: float,
) -> Any:
    """Return the transform with the most mutual information at voxels of ``size`` mm."""
    pair = _shrunk(fixed, size), _shrunk(moving, size)
    scores = [_score(*pair, candidate, mask) for candidate in candidates]
    if not np.isfinite(min(scores)):
        raise RuntimeError("they do not overlap")
    return candidates[int(np.argmin(scores))]


@contextmanager
def _registering(what: str) -> Iterator[None]:
    """Tell what fails in one sentence; use one thread, for several add up in changing order."""
    process = sitk.ProcessObject  # what a method's own SetNumberOfThreads says, the metric ignores
    threads = process.GetGlobalDefaultNumberOfThreads()
    process.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["no overlap"])[-1]
        reason = re.sub(r"^ITK ERROR: \S+: |\.$", "", reason)  # the filter, and its address
        raise InputError(
            f"{what} cannot be registered ({reason}); check that both show one and the same head."
        ) from error
    finally:
        process.SetGlobalDefaultNumberOfThreads(threads)


def _method(transform: sitk.Transform, mask: sitk.Image | None, voxels: int) -> Any:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetInitialTransform(transform, inPlace=True)
    if mask is not None:
        method.SetMetricFixedMask(mask)
    if voxels > SAMPLES:
        method.SetMetricSamplingStrategy(method.REGULAR)
        # ITK moves the points of the raster at random within a voxel, by default by the clock.
        method.SetMetricSamplingPercentage(SAMPLES / voxels, SEED)
    return method


def _score(
    fixed: sitk.Image, moving: sitk.Image, start: sitk.Transform, mask: sitk.Image | None
) -> float:
    method = _method(type(start)(start), mask, 0)
    try:
        return float(method.MetricEvaluate(fixed, moving))
    except RuntimeError:  # the volumes do not overlap there
        return float("inf")


def _refined(
    fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform, mask: sitk.Image | None
) -> sitk.Transform:
    method = _method(transform, mask, fixed.GetNumberOfPixels())
    size = min(fixed.GetSpacing())
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=size, minStep=0.002, numberOfIterations=200, relaxationFactor=0.6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.Execute(fixed, moving)
    return transform


def _shrunk(image: sitk.Image, size: float) -> sitk.Image:
    """Smooth and resample to voxels of at least ``size`` mm."""
    spacing = np.asarray(image.GetSpacing())
    factor = np.maximum(size / spacing, 1.0)
    if (factor < 1.3).all():
        return image
    sigma = np.where(factor > 1, 0.4 * factor * spacing, 0.01)
    smooth = sitk.SmoothingRecursiveGaussian(image, sigma.tolist())
    shape = [max(round(n / f), 4) for n, f in zip(image.GetSize(), factor, strict=True)]
    voxel = [s * n / m for s, n, m in zip(spacing, image.GetSize(), shape, strict=True)]
    place = image.GetOrigin(), voxel, image.GetDirection()
    how = sitk.Transform(), sitk.sitkLinear
    return sitk.Resample(smooth, shape, *how, *place, 0.0, sitk.sitkFloat32)
