"""Rotation about one axis, zoom and flips of a patch in a single trilinear interpolation.

Trilinear weights of a map that mixes two axes and scales the third are products: four weights in
the plane times two along the axis. So the interpolation splits exactly into a sum of two lines and
a weighted sum of four rows, both of which run at memory speed; a general grid costs ten times more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """One spatial change of a patch, about its centre.

    Args:
        axis: the axis that stays (0, 1, 2 of ``[D, H, W]``).
        degrees: angle in the plane of the other two, from the first towards the second.
        zoom: factor > 0 by which the content grows, along all axes.
        flips: axes whose direction is reversed, before turning.
    """

    axis: int = 0
    degrees: float = 0.0
    zoom: float = 1.0
    flips: tuple[bool, bool, bool] = (False, False, False)

    @property
    def resamples(self) -> bool:
        """Whether anything must be interpolated."""
        return self.degrees != 0.0 or self.zoom != 1.0

    def inverse(self, spacing: tuple[float, float, float]) -> Float[Tensor, "3 3"]:
        """Return the matrix from output to source offsets from the patch's centre; rigid in mm."""
        first, second = self.plane
        sign = [-1.0 if flipped else 1.0 for flipped in self.flips]
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        rows = [[0.0] * 3 for _ in range(3)]
        rows[self.axis][self.axis] = sign[self.axis] / self.zoom
        rows[first][first] = sign[first] * cos / self.zoom
        rows[first][second] = sign[first] * sin / self.zoom * spacing[second] / spacing[first]
        rows[second][first] = -sign[second] * sin / self.zoom * spacing[first] / spacing[second]
        rows[second][second] = sign[second] * cos / self.zoom
        return torch.tensor(rows, dtype=torch.float64)

    @property
    def plane(self) -> tuple[int, int]:
        """The two axes that turn."""
        first, second = (a for a in range(3) if a != self.axis)
        return first, second


def turn_patch(
    image: Float[Tensor, "m d h w"],
    label: Int64[Tensor, "d h w"],
    turn: Turn,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> None:
    """Turn a patch in place: the image trilinearly, the label by nearest neighbour, 0 from outside.

    Equals ``grid_sample(image, affine_grid(...), padding_mode="zeros", align_corners=True)``. Class
    indices are below 256. Flips alone are exact.
    """
    if not turn.resamples:
        flipped = [axis for axis in range(3) if turn.flips[axis]]
        if flipped:
            for volume in (*image, label):
                volume.copy_(volume.flip(flipped))
        return
    matrix = turn.inverse(spacing)
    first, second = turn.plane
    size = label.shape
    line = _line(size[turn.axis], matrix[turn.axis, turn.axis].item(), image.device)
    plane = _plane(
        (size[first], size[second]), matrix[[first, second]][:, [first, second]], image.device
    )
    # One modality at a time: its copies stay in the cache, and the allocator hands the same
    # memory out again instead of asking the system for more.
    for volume in image:
        volume.copy_(_interpolate(volume, turn.axis, line, plane))
    label.copy_(_pick(label.contiguous(), turn, line, plane).view(size))


@dataclass(frozen=True)
class _Taps:
    """The K voxels that each of N output positions reads."""

    index: Tensor
    """``[N, K]``, clipped to the source."""
    weight: Tensor
    """``[N, K]`` float32, 0 outside the source."""
    nearest: Tensor
    """``[N]``, clipped."""
    inside: Tensor
    """``[N]``, whether the nearest lies in the source."""


def _axis_taps(position: Tensor, size: int) -> _Taps:
    low = position.floor()
    index = torch.stack([low, low + 1], -1).long()
    weight = torch.stack([low + 1 - position, position - low], -1)
    nearest = (position + 0.5).floor().long()
    return _Taps(
        index.clamp(0, size - 1),
        weight * ((index >= 0) & (index < size)),
        nearest.clamp(0, size - 1),
        (nearest >= 0) & (nearest < size),
    )


def _line(size: int, factor: float, device: torch.device) -> _Taps:
    offset = torch.arange(size, dtype=torch.float64, device=device) - (size - 1) / 2
    taps = _axis_taps(offset * factor + (size - 1) / 2, size)
    return _Taps(taps.index, taps.weight.float(), taps.nearest, taps.inside)


def _plane(size: tuple[int, int], matrix: Tensor, device: torch.device) -> _Taps:
    (a, b), (c, d) = matrix.tolist()
    rows, columns = size
    # Voxels of the plane around its middle, turned by the matrix.
    y = torch.arange(rows, dtype=torch.float64, device=device)[:, None] - (rows - 1) / 2
    x = torch.arange(columns, dtype=torch.float64, device=device)[None] - (columns - 1) / 2
    in_y = _axis_taps((a * y + b * x).flatten() + (rows - 1) / 2, rows)
    in_x = _axis_taps((c * y + d * x).flatten() + (columns - 1) / 2, columns)
    # Every row that a point lies between, with every column.
    return _Taps(
        (in_y.index[:, :, None] * columns + in_x.index[:, None]).flatten(1),
        (in_y.weight[:, :, None] * in_x.weight[:, None]).flatten(1).float(),
        in_y.nearest * columns + in_x.nearest,
        in_y.inside & in_x.inside,
    )


def _interpolate(volume: Tensor, axis: int, line: _Taps, plane: _Taps) -> Tensor:
    # Rows must be contiguous for both sums: the axis goes to the front for the first and to the
    # back for the second. The copies in between cost less than gathering along the last axis.
    front = volume.movedim(axis, 0)
    rows = _sum_rows(front.flatten(1).contiguous(), line)
    back = rows.view(front.shape).movedim(0, -1)
    rows = _sum_rows(back.flatten(0, 1).contiguous(), plane)
    return rows.view(back.shape).movedim(-1, axis)


def _sum_rows(rows: Tensor, taps: _Taps) -> Tensor:
    """Return weighted sums of K rows each, by an embedding bag, which is tuned for it."""
    return F.embedding_bag(taps.index, rows, per_sample_weights=taps.weight, mode="sum")


def _pick(label: Tensor, turn: Turn, line: _Taps, plane: _Taps) -> Tensor:
    # One gather from the flat label as bytes, whose extra last voxel is the 0 that lies outside.
    outside = label.numel()
    first, second = turn.plane
    stride = label.stride()
    columns = label.shape[second]
    row, column = plane.nearest // columns, plane.nearest % columns
    in_plane = torch.where(plane.inside, row * stride[first] + column * stride[second], outside)
    on_line = torch.where(line.inside, line.nearest * stride[turn.axis], outside)
    shape = list(label.shape)
    shape[turn.axis] = 1
    index = in_plane.int().view(shape) + on_line.int().view(
        [-1 if axis == turn.axis else 1 for axis in range(3)]
    )
    padded = torch.zeros(outside + 1, dtype=torch.uint8, device=label.device)
    padded[:outside] = label.flatten()
    return padded.index_select(0, index.clamp_(max=outside).flatten())
