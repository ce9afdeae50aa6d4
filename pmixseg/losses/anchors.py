r"""Anchors P_mix: what latents are aligned to, and what fills a missing slot.

An anchor plays two roles. As *alignment target* (training only) it is taken over the acquired
modalities and may see what the network is not shown; as *fill* (training and test alike) it is
taken over the modalities that are shown. The caller says which by ``subset``.

Notation: :math:`f_m` is the latent of modality m, S the subset, :math:`w'` the weights
renormalised over S.

Sources: Liu et al., Mind the Gap (arXiv 2409.19366) and MedMAP (arXiv 2408.09465) for the normal,
single-modality and mixture anchors; Dorent et al., U-HVED (MICCAI 2019) for the product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pmixseg.describe import NOT_NEGATIVE, Described, Ranges
from pmixseg.errors import InputError
from pmixseg.slot_sums import hide, weighted_sum
from pmixseg.types import AnchorMap, Features, Presence, Weights


class Anchor(nn.Module, Described, ABC):
    """Give all modalities one common distribution per level: P_mix.

    An anchor is made without knowing the modalities; :meth:`bind` tells it, once, and creates
    its parameters.

    Attributes:
        can_fill: the anchor over the shown modalities can stand in for a missing latent.
        learned: it has parameters, which only the segmentation loss may train: the alignment
            loss calls it with ``detach_weights=True``.
        modalities: names of the slots; empty before :meth:`bind`.
        levels: number of levels; 0 before :meth:`bind`.
    """

    __call__: Callable[..., AnchorMap]  # of forward, with its type
    can_fill: bool = True

    def __init__(self) -> None:
        super().__init__()
        self.modalities: tuple[str, ...] = ()
        self.levels = 0

    def bind(self, modalities: Sequence[str], levels: int) -> None:
        """Set the anchor's slots, and create its parameters.

        Args:
            modalities: names of the M slots, in order.
            levels: number of levels of the backbone.

        Raises:
            InputError: bound before to other modalities or levels.
        """
        if self.modalities:
            if (tuple(modalities), levels) != (self.modalities, self.levels):
                raise InputError(
                    f"{type(self).__name__} already belongs to a network with modalities "
                    f"{list(self.modalities)} and {self.levels} levels, and cannot also serve "
                    f"{list(modalities)} with {levels}; make an anchor of its own."
                )
            return
        self._bind(tuple(modalities), levels)
        self.modalities, self.levels = tuple(modalities), levels

    def _bind(self, modalities: tuple[str, ...], levels: int) -> None:
        """Check the names and create parameters, where an anchor has some; called once."""

    @property
    def learned(self) -> bool:
        """Whether the anchor has parameters to train."""
        return False

    @abstractmethod
    def forward(
        self, features: Features, subset: Presence, level: int, detach_weights: bool = False
    ) -> AnchorMap:
        """Return the anchor of every sample, or its mean where the anchor is a density.

        Args:
            features: latents of one level ``[B, M, C, D, H, W]``; slots outside ``subset`` may
                hold anything, NaN included, and receive no gradient.
            subset: modalities that the anchor is made of, ``[B, M]``. A row without any gives
                0, never NaN.
            level: which level, 0 the finest.
            detach_weights: stop the gradient of the anchor's own parameters.

        Returns:
            ``[B, C, D, H, W]`` in the dtype of ``features``.
        """

    @abstractmethod
    def gaussian(
        self,
        mean: Features,
        log_variance: Features,
        subset: Presence,
        level: int,
        detach_weights: bool = False,
    ) -> tuple[AnchorMap, AnchorMap]:
        """Return the anchor as a diagonal Gaussian, from Gaussian latents (distance ``kl``).

        Args:
            mean: μ_m per voxel and channel, ``[B, M, C, D, H, W]``.
            log_variance: log σ_m², of the same shape.
            subset: as in :meth:`forward`; a row without any modality gives N(0, I).
            level: which level.
            detach_weights: stop the gradient of the anchor's own parameters.

        Returns:
            Mean and log-variance, ``[B, C, D, H, W]`` each.
        """


class NormalAnchor(Anchor):
    """Anchor latents at the standard normal N(0, I): P^N_mix of the papers.

    As a point it is its mean, 0, so ``mse`` to it is ½ mean(f²). It knows nothing about the
    patient and cannot fill a slot.
    """

    can_fill = False

    def forward(
        self, features: Features, subset: Presence, level: int, detach_weights: bool = False
    ) -> AnchorMap:
        """Return zeros, the mean of N(0, I)."""
        return torch.zeros_like(features[:, 0])

    def gaussian(
        self,
        mean: Features,
        log_variance: Features,
        subset: Presence,
        level: int,
        detach_weights: bool = False,
    ) -> tuple[AnchorMap, AnchorMap]:
        """Return mean 0 and log-variance 0."""
        zeros = torch.zeros_like(mean[:, 0])
        return zeros, zeros


class WeightedAnchor(Anchor):
    r"""Anchor latents at a weighted mean of them: :math:`P = \sum_{m \in S} w'_m f_m`."""

    @abstractmethod
    def weights(self, subset: Presence, level: int, detach: bool = False) -> Weights:
        """Return weights w' per sample, 0 outside ``subset``, of sum 1; an empty row is all 0.

        Args:
            subset: ``[B, M]``.
            level: which level.
            detach: stop the gradient of the anchor's own parameters.
        """

    def forward(
        self, features: Features, subset: Presence, level: int, detach_weights: bool = False
    ) -> AnchorMap:
        """Return the weighted mean over ``subset``; see :meth:`Anchor.forward`."""
        weights = self.weights(subset.to(features.device), level, detach_weights)
        return weighted_sum(features, weights.to(features.dtype), subset)

    def gaussian(
        self,
        mean: Features,
        log_variance: Features,
        subset: Presence,
        level: int,
        detach_weights: bool = False,
    ) -> tuple[AnchorMap, AnchorMap]:
        r"""Return the moments of the mixture :math:`\sum_m w'_m N(\mu_m, \sigma_m^2)`.

        .. math:: \mu_P = \sum w' \mu, \qquad
                  \sigma_P^2 = \sum w' (\sigma^2 + \mu^2) - \mu_P^2
                             = \sum w' (\sigma^2 + (\mu - \mu_P)^2)

        The second form is computed: it cannot be negative.
        """
        weights = self.weights(subset.to(mean.device), level, detach_weights).to(mean.dtype)
        mean, log_variance = hide(mean, subset), hide(log_variance, subset)
        centre = weighted_sum(mean, weights, subset)
        spread = log_variance.exp() + (mean - centre[:, None]).square()
        variance = weighted_sum(spread, weights, subset)
        empty = ~subset.any(1).to(mean.device)[:, None, None, None, None]
        return centre, torch.where(empty, 1.0, variance).log()


class ModalityAnchor(WeightedAnchor):
    """Anchor latents at one modality's own: P^k_mix of the papers.

    Where modality k is not in the subset, the anchor is the mean of the subset.

    Args:
        modality: name of k.
    """

    def __init__(self, modality: str) -> None:
        super().__init__()
        self.modality = modality

    def _bind(self, modalities: tuple[str, ...], levels: int) -> None:
        if self.modality not in modalities:
            raise InputError(
                f"ModalityAnchor: '{self.modality}' is not among the network's modalities "
                f"{list(modalities)}; name one of these."
            )

    def weights(self, subset: Presence, level: int, detach: bool = False) -> Weights:
        """Return one-hot where k is in the subset, else uniform."""
        k = self.modalities.index(self.modality)
        chosen = torch.zeros_like(subset)
        chosen[:, k] = True
        return _uniform(torch.where(subset[:, k : k + 1], chosen, subset))


class MixtureAnchor(WeightedAnchor):
    """Anchor latents at a mixture of them, with weights w = softmax(a): P*_mix of the papers.

    The parameters start at 0, where w is uniform. With equal terms the alignment loss is
    stationary there (docs/method/anchors.md), so it is given sg[w]; w learns from the segmentation
    loss through the fill.

    Args:
        weights: ``"learned"``, ``"uniform"``, or one fixed number ≥ 0 per modality (divided by
            their sum). Where all modalities of a subset have the fixed weight 0, they count
            equally.
        shared: one w for all levels, instead of one per level.

    Raises:
        InputError: an unknown word, a negative or non-finite number, or no positive one.

    Example:
        >>> anchor = MixtureAnchor([1, 3, 4])
        >>> anchor.bind(("flair", "t1", "t2"), levels=1)
        >>> anchor.weights(torch.tensor([[True, True, False]]), 0).tolist()
        [[0.25, 0.75, 0.0]]
    """

    fixed: Tensor
    ranges = Ranges(weights=NOT_NEGATIVE)

    def __init__(
        self,
        weights: Literal["learned", "uniform"] | Sequence[float] = "learned",
        shared: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(weights, str) and not any(weights):
            raise InputError(f"MixtureAnchor: weights is {weights}; give one number above 0.")
        self.kind = weights
        self.shared = shared

    def _bind(self, modalities: tuple[str, ...], levels: int) -> None:
        if self.kind == "learned":
            # Flat, so that optimizers that spare vectors from weight decay spare it as well:
            # decay would pull w back to uniform.
            rows = 1 if self.shared else levels
            self.scores = nn.Parameter(torch.zeros(rows * len(modalities)))
            return
        numbers = [1.0] * len(modalities) if self.kind == "uniform" else [*map(float, self.kind)]
        if len(numbers) != len(modalities):
            raise InputError(
                f"MixtureAnchor: {len(numbers)} weights were given for the {len(modalities)} "
                f"modalities {list(modalities)}; give one each."
            )
        self.register_buffer("fixed", torch.tensor(numbers), persistent=False)

    @property
    def learned(self) -> bool:
        """Whether w is trained."""
        return self.kind == "learned"

    def weights(self, subset: Presence, level: int, detach: bool = False) -> Weights:
        """Return the softmax over the subset, or the fixed numbers over their sum there."""
        if self.learned:
            scores = self.scores.view(-1, len(self.modalities))[0 if self.shared else level]
            if detach:
                scores = scores.detach()
            # An all -inf row would be NaN, forward and backward; an empty row gets zeros instead.
            hidden = ~subset & subset.any(1, keepdim=True)
            return scores.expand(subset.shape).masked_fill(hidden, -torch.inf).softmax(1) * subset
        numbers = self.fixed * subset
        total = numbers.sum(1, keepdim=True)
        return torch.where(total > 0, numbers / total.clamp_min(1e-30), _uniform(subset))


class ProductAnchor(Anchor):
    r"""Anchor latents at a product of Gaussians, one per modality and N(0, I), as U-HVED.

    .. math:: \sigma_P^{-2} = 1 + \sum_{m \in S} \sigma_m^{-2}, \qquad
              \mu_P = \sigma_P^2 \sum_{m \in S} \mu_m / \sigma_m^2

    It exists between Gaussian latents only (distance ``kl``), so it fills no slot of a
    deterministic encoder.
    """

    can_fill = False

    def forward(
        self, features: Features, subset: Presence, level: int, detach_weights: bool = False
    ) -> AnchorMap:
        """Refuse: points have no precision to weigh them by."""
        raise InputError(
            "ProductAnchor weighs latents by their precision, which only the distance 'kl' "
            "estimates; use the distance kl (--align.distance), or another anchor."
        )

    def gaussian(
        self,
        mean: Features,
        log_variance: Features,
        subset: Presence,
        level: int,
        detach_weights: bool = False,
    ) -> tuple[AnchorMap, AnchorMap]:
        """Return the product's mean and log-variance; see the class."""
        precision = hide(-log_variance, subset, -torch.inf).exp()
        total = 1 + precision.sum(1)
        return (precision * hide(mean, subset)).sum(1) / total, -total.log()


def _uniform(subset: Presence) -> Weights:
    """Return 1/|S| in the subset, 0 outside."""
    return subset / subset.sum(1, keepdim=True).clamp_min(1)
