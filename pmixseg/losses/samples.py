"""Distances between sets of voxel vectors: ``mmd`` and ``sliced_wasserstein``.

They compare distributions, not voxels at the same place. Within one sample at most ``points``
voxels are drawn without replacement, at places that depend on the seed and the level only: the
patches move over the brain, the places need not. So a step is reproducible, and samples do not
depend on each other.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from pmixseg.losses.anchors import Anchor, NormalAnchor
from pmixseg.losses.distances import Detach, Distance, LevelLatents, PerSlot, point_and_target

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Multiples of the median squared distance."""


class SampledDistance(Distance):
    """Distance between the voxel vectors of a latent and those of the anchor.

    A normal anchor is drawn from: standard normal vectors, the same in every step.

    Args:
        points: largest number of voxels of a sample that are compared.
        seed: of places, directions and normal vectors.
    """

    def __init__(self, points: int = 512, seed: int = 0) -> None:
        super().__init__()
        self.points, self.seed = points, seed

    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """See the class."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + latents.level)
        features, target = point_and_target(latents, anchor, detach)
        features, target = features.flatten(3), target.flatten(3)
        voxels = features.shape[3]
        if voxels > self.points:
            places = torch.randperm(voxels, generator=generator)[: self.points].to(features.device)
            features, target = features[..., places], target[..., places]
        if isinstance(anchor, NormalAnchor):
            normal = torch.randn(target.shape[2:], generator=generator)
            target = normal.to(target).expand_as(target)
        return self.between(features.mT, target.mT, generator)

    @abstractmethod
    def between(self, x: Tensor, y: Tensor, generator: torch.Generator) -> PerSlot:
        """Distance of sets.

        Args:
            x: ``[B, M, N, C]``.
            y: ``[B, 1, N, C]``.
            generator: seeded, on the CPU.

        Returns:
            ``[B, M]``.
        """


class MMD(SampledDistance):
    r"""Squared maximum mean discrepancy with a multi-bandwidth RBF kernel: ``mmd``.

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

    def __init__(self, points: int = 256, seed: int = 0) -> None:
        super().__init__(points, seed)

    def between(self, x: Tensor, y: Tensor, generator: torch.Generator) -> PerSlot:
        """See the class."""
        # Distances do not change with the origin, and lose fewer digits near it.
        origin = y.mean(2, keepdim=True).detach()
        x, y = x - origin, y - origin
        cross = _squared_distances(x, y)
        median = cross.detach().flatten(2).median(2).values[..., None, None]
        median = median.clamp_min(torch.finfo(x.dtype).tiny * 1e8)
        kernels = (
            _kernel(_squared_distances(x, x), median),
            _kernel(_squared_distances(y, y), median),
        )
        return kernels[0] + kernels[1] - 2 * _kernel(cross, median)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    squares = x.square().sum(3)[..., :, None] + y.square().sum(3)[..., None, :]
    return (squares - 2 * x @ y.mT).clamp_min(0)


def _kernel(squared: Tensor, median: Tensor) -> Tensor:
    # The kernels of five bandwidths are powers of one: e^(-d/4), then squared four times.
    kernel = (-squared / (median * BANDWIDTHS[-1])).exp()
    total = kernel
    for _ in BANDWIDTHS[1:]:
        kernel = kernel.square()
        total = total + kernel
    return total.mean((2, 3)) / len(BANDWIDTHS)


class SlicedWasserstein(SampledDistance):
    r"""Squared sliced 2-Wasserstein distance: ``sliced_wasserstein``.

    .. math:: D = \operatorname{mean}_{k, i} \left( \operatorname{sort}(X \theta_k)_i
                  - \operatorname{sort}(Y \theta_k)_i \right)^2

    with directions :math:`\theta_k` uniform on the sphere, drawn once from the seed.

    Args:
        projections: number of directions; at least the number of channels, so that they span.
        points: largest number of voxels of a sample that are compared.
        seed: of directions and places.

    Source: Bonneel et al., Sliced and Radon Wasserstein Barycenters (JMIV 2015).
    """

    def __init__(self, projections: int = 128, points: int = 512, seed: int = 0) -> None:
        super().__init__(points, seed)
        self.projections = projections

    def between(self, x: Tensor, y: Tensor, generator: torch.Generator) -> PerSlot:
        """See the class."""
        directions = torch.randn(
            x.shape[3], self.projections, generator=generator, dtype=torch.float64
        )
        directions = (directions / directions.norm(dim=0)).to(x)
        difference = (x @ directions).sort(2).values - (y @ directions).sort(2).values
        distance: Tensor = difference.square().mean((2, 3))
        return distance
