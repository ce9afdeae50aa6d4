r"""The losses of the authors' public snippets, unchanged, for comparison with the default.

The repository of the papers holds no complete training code, but two snippets. What they compute
is reproduced here from their description in formulas (docs/method/snippets.md), faults included;
none of this is recommended:

===============================  ==================================  ===============================
\                                July 2025 (one encoder each)        repaired default
===============================  ==================================  ===============================
level                            the finest                          any; the two coarsest
anchor in training               all modalities, hidden ones too     target: acquired; fill: shown
anchor at test                   shown modalities                    the same as in training
slots at test                    each times its own softmax weight   as in training
terms                            all acquired, shown or not          shown
gradient to w                    from alignment and segmentation     from segmentation only
gradient to the anchor           yes                                 no
distance                         Σ MSE / 8: shrinking meets it       relative to the variance
===============================  ==================================  ===============================

The snippet of April 2025 treats the M channels of one fused latent as modalities, although the
convolutions before it mix them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pmixseg.describe import COUNT, NOT_NEGATIVE, Described, Ranges
from pmixseg.errors import InputError
from pmixseg.losses.anchors import Anchor, MixtureAnchor
from pmixseg.slot_sums import choose_slots, hide
from pmixseg.types import Latents, Presence, Scalar, full_precision

INITIAL_DEVIATION = 0.1
"""Standard deviation of the normal distribution that both snippets' weights start from."""


class July2025Anchor(MixtureAnchor):
    """Mix latents by one learned w for all levels, started at random: ``official-2025-07``."""

    def __init__(self) -> None:
        super().__init__("learned", shared=True)

    def _bind(self, modalities: tuple[str, ...], levels: int) -> None:
        super()._bind(modalities, levels)
        nn.init.normal_(self.scores, std=INITIAL_DEVIATION)


class OfficialAlignment(nn.Module, Described, ABC):
    """Compute the whole alignment loss of a public snippet.

    Attributes:
        levels: that are aligned modality by modality.
        fused: it takes one fused latent apart, of early fusion, and has weights of its own.
    """

    __call__: Callable[..., Scalar]  # of forward, with its type
    levels: tuple[int, ...] = ()
    fused: bool = False

    @abstractmethod
    def forward(
        self, latents: Latents, anchor: Anchor | None, present: Presence, acquired: Presence
    ) -> Scalar:
        """Return the loss; arguments as in :meth:`pmixseg.losses.AlignmentLoss.forward`."""


class July2025Alignment(OfficialAlignment):
    r"""Compute the alignment loss of the snippet of July 2025: ``official-2025-07``.

    .. math:: L = \frac{1}{2M} \sum_m \operatorname{mean} (f_m - P)^2, \qquad
              P = \sum_m w_m f_m

    at the finest level, over *all* acquired modalities, whether shown or not; nothing is
    detached, so gradients reach w and the latents on both sides. With M = 4 the factor is their
    1/8. Where a sample lacks a modality, which the snippet does not foresee, w is renormalised
    and the modality has no term.

    Source: docs/method/snippets.md.
    """

    levels = (0,)

    def forward(
        self, latents: Latents, anchor: Anchor | None, present: Presence, acquired: Presence
    ) -> Scalar:
        """Return the loss of the snippet of July 2025 for one batch."""
        assert anchor is not None  # only a fused loss comes without
        raw = latents.features[0]
        subset = latents.usable[0] & acquired.to(raw.device)
        with torch.autocast(raw.device.type, enabled=False):
            features = hide(full_precision(raw), subset)
            mixed = anchor(features, subset, 0)[:, None]
            errors = (features - mixed).square().mean((2, 3, 4, 5))
            return torch.where(subset, errors, 0.0).sum(1).mean() / (2 * subset.shape[1])


def fill_july_2025(
    latents: Latents, present: Presence, anchor: MixtureAnchor, training: bool
) -> Latents:
    r"""Return what the decoder reads under ``official-2025-07``.

    Training: a shown slot keeps :math:`f_m`; a hidden one becomes :math:`\sum_j w_j f_j` over
    everything encoded, itself included. Test: shown slots become :math:`w_m f_m`, hidden ones
    :math:`w_m P` with P over the shown modalities; :math:`w_m` is *not* renormalised there. Only
    the finest level is filled. Raw latents come in, in training with the hidden modalities encoded;
    of those that go out the finest level is usable throughout, and other levels show ``present``.
    The anchor is bound to the network.
    """
    hidden = latents.restrict(present)
    raw, shown = latents.features[0], hidden.usable[0]
    mixed = anchor(raw, latents.usable[0] if training else shown, 0)[:, None]
    filled = choose_slots(shown, raw, mixed)
    if not training:
        weights = anchor.weights(torch.ones_like(shown), 0).to(raw.dtype)
        filled = filled * weights[:, :, None, None, None, None]
    return hidden.with_features(
        [filled, *latents.features[1:]], [torch.ones_like(shown), *hidden.usable[1:]]
    )


class April2025Alignment(OfficialAlignment):
    r"""Compute the early-fusion alignment loss of April 2025: ``official-2025-04``.

    .. math:: L = \frac{1}{M} \sum_c \operatorname{mean} (z_c - P)^2, \qquad
              P = \sum_c \frac{a_c}{\sum_j a_j} \operatorname{sg}[z_c]

    over the M channels z of one fused latent. The weights are raw numbers over their sum: they
    may be negative, and explode where the sum is near 0, as in the snippet.

    Args:
        modalities: number of modalities M, which is the number of channels of the latent.
        level: level of the latent.

    Source: docs/method/snippets.md.
    """

    fused = True
    ranges = Ranges(modalities=COUNT, level=NOT_NEGATIVE)

    def __init__(self, modalities: int = 4, level: int = 0) -> None:
        super().__init__()
        self.level = level
        self.scores = nn.Parameter(torch.randn(modalities) * INITIAL_DEVIATION)

    def forward(
        self,
        latents: Latents,
        anchor: Anchor | None = None,
        present: Presence | None = None,
        acquired: Presence | None = None,
    ) -> Scalar:
        """Return the loss of the fused latent; the other arguments are ignored.

        Raises:
            InputError: more than one slot, or not one channel per modality.
        """
        features: Tensor = latents.features[self.level]
        slots, channels = features.shape[1:3]
        if slots != 1 or channels != self.scores.numel():
            raise InputError(
                f"official-2025-04 aligns the {self.scores.numel()} channels of one fused latent, "
                f"but level {self.level} has {slots} slots of {channels} channels; use EarlyFusion "
                "with a network whose first latent has one channel per modality."
            )
        with torch.autocast(features.device.type, enabled=False):
            z = full_precision(features[:, 0])
            weights = (self.scores / self.scores.sum()).to(z.dtype)
            mixed = torch.einsum("c,bcdhw->bdhw", weights, z.detach())
            return (z - mixed[:, None]).square().mean()
