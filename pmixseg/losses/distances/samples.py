"""Distances between sets of voxel vectors: ``mmd`` and ``sliced_wasserstein``.

They compare distributions, not voxels at the same place. Within one sample at most ``points``
brain voxels are drawn without replacement (see ``points.py``); samples do not depend on each other.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Bool
from torch import Tensor

from pmixseg.describe import COUNT, Ranges
from pmixseg.losses.anchors import Anchor, NormalAnchor
from pmixseg.losses.distances.contract import (
    Detach,
    Distance,
    LevelLatents,
    PerSlot,
    point_and_target,
)
from pmixseg.losses.distances.points import brain_points, normal_numbers, take

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Multiples of the median squared distance."""


class SampledDistance(Distance):
    """Distance between the voxel vectors of a latent and those of the anchor.

    A normal anchor is drawn from: standard normal vectors, the same in every step. At most
    ``points`` voxels of a sample are compared; the seed is that of places, directions and normal
    vectors.
    """

    ranges = Ranges(points=COUNT)

    def __init__(self, points: int = 512, seed: int = 0) -> None:
        super().__init__()
        self.points, self.seed = points, seed

    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """Return the distance per sample and modality, ``[B, M]``."""
        features, target = point_and_target(latents, anchor, detach)
        seed = self.seed * 1000 + latents.level
        places, inside = brain_points(latents.brain, self.points, seed)
        x, y = take(features, places).mT, take(target, places).mT
        if isinstance(anchor, NormalAnchor):
            y = normal_numbers(tuple(y.shape[2:]), seed + 500, like=y).expand_as(y)
        return self.between(x, y, inside, seed)

    @abstractmethod
    def between(self, x: Tensor, y: Tensor, inside: Bool[Tensor, "b n"], seed: int) -> PerSlot:
        """Measure ``[B, M]``, of sets ``[B, M, N, C]`` from ``[B, 1, N, C]``, seeded by level."""


class MMD(SampledDistance):
    r"""Compute the squared maximum mean discrepancy with RBF kernels: ``mmd``.

    .. math:: D = \operatorname{mean} k(x, x') + \operatorname{mean} k(y, y')
                  - 2 \operatorname{mean} k(x, y), \qquad
              k = \tfrac15 \sum_s \exp\left(- \frac{\|x - y\|^2}{s \cdot \mathrm{med}}\right)

    over all pairs (so D ≥ 0, and 0 for equal sets), with med the median squared distance between
    x and y, detached, and s ∈ {¼, ½, 1, 2, 4}.

    Args:
        points: largest number of voxels of a sample that are compared; time and memory grow with
            its square (measured: 256 cost 3 % of a training step, 512 cost 7 %).
        seed: of places and normal vectors.

    Source: Gretton et al., A Kernel Two-Sample Test (JMLR 2012).
    """

    name = "mmd"

    def __init__(self, points: int = 256, seed: int = 0) -> None:
        super().__init__(points, seed)

    def between(self, x: Tensor, y: Tensor, inside: Bool[Tensor, "b n"], seed: int) -> PerSlot:
        """Return the distance between two sets of vectors."""
        weight = inside.to(x) / inside.sum(1, keepdim=True).clamp_min(1)
        pairs = weight[:, None, :, None] * weight[:, None, None]  # [B, 1, N, N], summing to 1
        # Distances do not change with the origin, and lose fewer digits near it.
        origin = (y * weight[:, None, :, None]).sum(2, keepdim=True).detach()
        x, y = x - origin, y - origin
        cross = _squared_distances(x, y)
        median = _median(cross.detach(), pairs > 0).clamp_min(torch.finfo(x.dtype).tiny * 1e8)
        kernels = (
            _kernel(_squared_distances(x, x), median, pairs),
            _kernel(_squared_distances(y, y), median, pairs),
        )
        return kernels[0] + kernels[1] - 2 * _kernel(cross, median, pairs)


def _median(values: Tensor, counts: Tensor) -> Tensor:
    """Return the lower median of each matrix over the pairs that count; 0 where none does."""
    chosen = torch.where(counts, values, torch.nan).flatten(2)
    return chosen.nanmedian(2).values.nan_to_num()[..., None, None]


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    squares = x.square().sum(3)[..., :, None] + y.square().sum(3)[..., None, :]
    return (squares - 2 * x @ y.mT).clamp_min(0)


def _kernel(squared: Tensor, median: Tensor, pairs: Tensor) -> Tensor:
    # The kernels of five bandwidths are powers of one: e^(-d/4), then squared four times.
    kernel = (-squared / (median * BANDWIDTHS[-1])).exp()
    total = kernel
    for _ in BANDWIDTHS[1:]:
        kernel = kernel.square()
        total = total + kernel
    return (total * pairs).sum((2, 3)) / len(BANDWIDTHS)


class SlicedWasserstein(SampledDistance):
    r"""Compute the squared sliced 2-Wasserstein distance: ``sliced_wasserstein``.

    .. math:: D = \operatorname{mean}_{k, i} \left( \operatorname{sort}(X \theta_k)_i
                  - \operatorname{sort}(Y \theta_k)_i \right)^2

    with directions :math:`\theta_k` uniform on the sphere, drawn once from the seed.

    Args:
        projections: number of directions; at least the number of channels, so that they span.
        points: largest number of voxels of a sample that are compared.
        seed: of directions and places.

    Source: Bonneel et al., Sliced and Radon Wasserstein Barycenters (JMIV 2015).
    """

    name = "sliced_wasserstein"

    ranges = Ranges(projections=COUNT)

    def __init__(self, projections: int = 128, points: int = 512, seed: int = 0) -> None:
        super().__init__(points, seed)
        self.projections = projections

    def between(self, x: Tensor, y: Tensor, inside: Bool[Tensor, "b n"], seed: int) -> PerSlot:
        """Return the distance between two sets of vectors."""
        directions = normal_numbers((x.shape[3], self.projections), seed + 250, like=x)
        directions = directions / directions.norm(dim=0)
        last = torch.finfo(x.dtype).max / 4
        sorted_sets = []
        for vectors in (x, y):
            # What does not count comes last in both sets, where the difference is 0.
            projected = torch.where(inside[:, None, :, None], vectors @ directions, last)
            sorted_sets.append(projected.sort(2).values)
        difference = sorted_sets[0] - sorted_sets[1]
        number = inside.sum(1).clamp_min(1)[:, None]
        distance: Tensor = difference.square().mean(3).sum(2) / number
        return distance
