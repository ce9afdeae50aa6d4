"""Scans of one patient on different grids, brought to the grid of one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from nibabel.spatialimages import SpatialImage

from pmixseg.data.formats.nifti import ScanReader, Source
from pmixseg.data.scans.geometry import Geometry
from pmixseg.data.scans.volumes import Place, same_grid
from pmixseg.errors import InputError


@dataclass
class CommonGrid:
    """Scans on one grid.

    Args:
        images: the scans; those that lay on the grid as they were given.
        reference: grid, orientation and axis order of the reference scan, if its header can be
            read.
        notes: what was resampled, one phrase each.
        digests: modality -> SHA-256 of the file, of those that were resampled.
    """

    images: dict[str, Source]
    reference: Geometry | None = None
    notes: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)


def on_one_grid(
    images: Mapping[str, Source],
    *,
    reference: str | None = None,
    strict: bool = False,
    where: str = "case",
) -> CommonGrid:
    """Resample scans whose grid is not the reference's; only headers are read where all agree.

    Positions come from the affines: scans must have been registered to each other, though not
    resampled. Values are interpolated linearly between non-zero voxels only, so that the brain
    gets no dark rim and the background stays 0: x' = L(x) / L(x ≠ 0) where L(x ≠ 0) ≥ 1/2.

    Args:
        images: modality -> scan, in task order. A damaged file passes; who reads it will say so.
        reference: modality whose grid is used; by default the one with the smallest voxels (the
            first of equals).
        strict: refuse to resample.
        where: how messages name the case.

    Raises:
        InputError: the reference is not among the scans, or they lie on different grids and
            ``strict`` is set.
    """
    if reference is not None and reference not in images:
        raise InputError(
            f"{where}: the reference '{reference}' is not among the given scans {list(images)}; "
            "name one of these."
        )
    reader = ScanReader(where)
    places = {m: place for m, source in images.items() if (place := _place_of(reader, source, m))}
    if len(places) < len(images):
        return CommonGrid(dict(images))
    grids = {name: place.geometry for name, place in places.items()}
    # Rounded: header noise such as 0.99999994 mm makes no scan the finest.
    chosen = reference or min(grids, key=lambda n: round(math.prod(grids[n].source_spacing), 3))
    common = CommonGrid(dict(images), grids[chosen])
    for name, place in places.items():
        try:
            same_grid(places[chosen], place, where)
        except InputError as error:
            if place.oriented != places[chosen].oriented:
                raise  # where it lies is not known, so it cannot be resampled
            if strict:
                raise InputError(
                    f"{error} Without strict (--strict) it would be resampled."
                ) from error
            common.images[name] = _resampled(reader, images[name], name, grids[chosen], chosen)
            common.notes.append(f"{name} was resampled from its own grid to that of {chosen}")
    common.digests = reader.digests
    return common


def _place_of(reader: ScanReader, source: Source, name: str) -> Place | None:
    """Return where a scan lies by its header; ``None`` if that says nothing usable."""
    frame = reader.frame(source)
    if frame is None:
        return None
    try:
        geometry = Geometry.of(frame.shape, frame.affine, unit=frame.unit)
    except ValueError:
        return None
    return Place(geometry, name, frame.oriented)


def _resampled(
    reader: ScanReader, source: Source, name: str, target: Geometry, chosen: str
) -> SpatialImage:
    scan = reader.read(source, name)
    values = scan.values().astype(np.float32)
    inside = np.nan_to_num(values) != 0
    if not inside.any():
        raise InputError(
            f"{reader.where}: {scan.name} is 0 everywhere; leave the file out or replace it."
        )
    # Interpolated over the voxels of the head alone, so that its border is not dimmed.
    place = (target.source_shape, target.affine)
    summed, weight = (
        np.asarray(
            resample_from_to(nib.Nifti1Image(v.astype(np.float32), scan.affine), place, 1).dataobj
        )
        for v in (values, inside)
    )
    made = np.where(weight >= 0.5, summed / np.maximum(weight, 0.5), 0).astype(np.float32)
    if not made.any():
        size = "x".join(map(str, target.source_shape))
        raise InputError(
            f"{reader.where}: nothing of {scan.name} lies on the grid of {chosen}, {size} voxels; "
            "leave one of them out, or name another scan as the reference."
        )
    return nib.Nifti1Image(made, target.affine)
