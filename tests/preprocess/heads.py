"""Phantom brains with a skull around them, moved by known amounts onto other voxels."""

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

SCALP = {"bright": 1.6, "mid": 0.8}
"""Fat of the scalp against the mean of the brain."""


def add_skull(brain: sitk.Image, scalp: str = "bright") -> sitk.Image:
    """Put cerebrospinal fluid, bone and scalp around a brain whose background is 0."""
    values = sitk.GetArrayFromImage(brain)
    size = brain.GetSpacing()[0]
    outside = ndimage.distance_transform_edt(values == 0) * size
    level = values[values > 0].mean()
    head = values.copy()
    head[(outside > 0) & (outside <= 3)] = 0.3 * level
    head[(outside > 3) & (outside <= 8)] = 0.05 * level
    head[(outside > 8) & (outside <= 14)] = SCALP[scalp] * level
    noise = np.random.default_rng(0).normal(0, 0.02 * level, values.shape)
    image = sitk.GetImageFromArray((head + np.abs(noise)).astype(np.float32))
    image.CopyInformation(brain)
    return image


def move(image: sitk.Image, degrees, shift, spacing) -> tuple[sitk.Image, sitk.Transform]:
    """Image a head that lies elsewhere in the scanner.

    Returns:
        The scan, and the true transform: points of the anatomy -> points of the scan.
    """
    middle = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])
    true = sitk.Euler3DTransform()
    true.SetCenter(middle)
    true.SetRotation(*np.radians(degrees).tolist())
    true.SetTranslation(np.asarray(shift, float).tolist())
    extent = np.asarray(image.GetSize()) * np.asarray(image.GetSpacing())
    shape = [round(e / s) for e, s in zip(extent, spacing, strict=True)]
    scan = sitk.Resample(
        image,
        shape,
        true.GetInverse(),
        sitk.sitkLinear,
        image.GetOrigin(),
        spacing,
        image.GetDirection(),
        0.0,
        sitk.sitkFloat32,
    )
    return scan, true
