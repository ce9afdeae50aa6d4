"""U-HVED: a variational encoder per modality, fused by a product of Gaussians.

Dorent, Joutard, Modat, Ourselin, Vercauteren: Hetero-Modal Variational Encoder-Decoder for Joint
Modality Completion and Segmentation (MICCAI 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmixseg.backbones.base import Backbone
from pmixseg.backbones.layers.blocks import initialise
from pmixseg.backbones.layers.grouped import Groupable
from pmixseg.backbones.layers.lean import LeanConv3d
from pmixseg.backbones.layers.norm import norm_act
from pmixseg.backbones.slots import EncodedLatents, check_input, encode_slots, join_levels
from pmixseg.describe import COUNT, Ranges
from pmixseg.errors import InputError
from pmixseg.gaussians import gaussian_kl
from pmixseg.slot_sums import hide
from pmixseg.task import BRATS
from pmixseg.types import Image, Latents, Presence, SegOutput

SLOPE = 0.01
"""Negative slope of every LeakyReLU."""
LIMIT = 10.0
"""Log-variances are clamped to ± this (the published code: ± 50, where float32 KL overflows)."""
LEVELS = 4


class Block(nn.Module):
    """Twice instance norm, LeakyReLU, convolution 3x3x3."""

    def __init__(self, inside: int, middle: int, outside: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            LeanConv3d(i, o, padding="zeros") for i, o in ((inside, middle), (middle, outside))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``[b, C, D, H, W]``."""
        for conv in self.convs:
            x = conv(norm_act(x, SLOPE))
        return x


class Encoder(Groupable):
    """Encoder of one modality; half of a level's channels are means, half log-variances."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.first = LeanConv3d(1, widths[0], 1)
        insides = [widths[0], *widths[:-1]]
        self.blocks = nn.ModuleList(Block(i, w, w) for i, w in zip(insides, widths, strict=True))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Encode ``[b, 1, D, H, W]``, finest level first; levels are max-pooled in between."""
        x = F.leaky_relu(self.first(x), SLOPE)
        features = []
        for level, block in enumerate(self.blocks):
            x = block(F.max_pool3d(x, 2) if level else x)
            features.append(x)
        return features


class Decoder(nn.Module):
    """Decoder of codes: trilinear upsampling, concatenation with the finer code, block."""

    def __init__(self, codes: Sequence[int], outside: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(below + code, 2 * code, code) for code, below in pairwise(codes)
        )
        self.last = LeanConv3d(codes[0], outside, 1)

    def forward(self, codes: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode one code per level, finest first.

        The result ``[b, outside, D, H, W]`` comes with the feature maps of the blocks, finest last.
        """
        maps: list[Tensor] = []
        x = codes[-1]
        for level in reversed(range(len(codes) - 1)):
            size = list(codes[level].shape[2:])
            larger = F.interpolate(x, size, mode="trilinear", align_corners=False)
            x = self.blocks[level](torch.cat([larger, codes[level]], 1))
            maps.append(x)
        return self.last(x), maps


def product_of_gaussians(latents: Latents, level: int) -> tuple[Tensor, Tensor]:
    r"""Return a level's posterior: product of the present modalities' Gaussians and N(0, I).

    .. math:: \sigma^{-2} = 1 + \sum_{m \in A} \sigma_m^{-2}, \qquad
              \mu = \sigma^2 \sum_{m \in A} \mu_m / \sigma_m^2

    Returns:
        Mean and log-variance, float32 or float64 ``[B, C, D, H, W]``; with no modality the
        prior's.

    Raises:
        ValueError: the latents have no variances.
    """
    if latents.log_variance is None:
        raise ValueError("these latents have no log_variance; encode them with a UHVED.")
    flags = latents.usable[level]
    exact = torch.promote_types(latents.features[level].dtype, torch.float32)
    precision = hide((-latents.log_variance[level].to(exact)).exp(), flags)
    means = hide(latents.features[level].to(exact), flags)
    total = 1 + precision.sum(1)
    return (precision * means).sum(1) / total, -total.log()


Gaussian = tuple[Tensor, Tensor]
"""Mean and log-variance."""


def _divergence(latents: EncodedLatents, shown: Sequence[Gaussian]) -> Tensor:
    everything = replace(latents, usable=[latents.encoded] * len(latents))
    parts = []
    for level, posterior in enumerate(shown):
        prior = (torch.zeros_like(posterior[0]), torch.zeros_like(posterior[1]))
        full = product_of_gaussians(everything, level)
        away = gaussian_kl(*full, *posterior) + gaussian_kl(*posterior, *prior)
        parts.append(away.flatten(1).mean(1))
    return torch.stack(parts).sum(0)


class UHVED(Backbone):
    """Segment with U-HVED, for any modalities, classes and patches.

    Source: Dorent et al., U-HVED (MICCAI 2019).

    Four levels at strides 1, 2, 4, 8. A level's latent is a Gaussian per modality
    (``latents.features`` are means, ``latents.log_variance`` clamped to ±10); the code of a
    combination is :func:`product_of_gaussians`, sampled in training, its mean in eval mode. So a
    missing slot needs no fill. Trained by :class:`~pmixseg.losses.uhved.UHVEDCriterion`; in
    training, ``extras`` hold

    * ``reconstruction`` ``[B, M, D, H, W]``: every modality rebuilt from the same code, and
      ``reconstruction_slots`` ``[B, M]``: which of them were encoded, so that there is a target;
    * ``divergence`` ``[B]``: Σ over levels of KL(q_encoded ‖ q_shown) + KL(q_shown ‖ N(0, I)), the
      mean over voxels and channels.

    Args:
        modalities: names of the input channels.
        num_classes: softmax classes, background included.
        width: channels of the finest encoder level, even; a code has half of its level's channels.
            8 in the paper.
        reconstruct: build and train the decoders that rebuild each modality.

    Raises:
        InputError: an odd ``width``.

    As the published (NiftyNet) code: blocks, widths 8 to 64, max pooling, codes, product with the
    prior as one expert, a decoder for each output. Different: convolutions have biases, instance
    norm has no parameters, log-variances are clamped at ±10.
    """

    fillable = False

    ranges = Ranges(width=COUNT)

    def __init__(
        self,
        modalities: Sequence[str] = BRATS.modalities,
        num_classes: int = BRATS.num_classes,
        width: int = 8,
        reconstruct: bool = True,
    ) -> None:
        if width < 2 or width % 2:
            raise InputError(f"UHVED: width is {width}; give an even number, half is the code's.")
        widths = [width * 2**k for k in range(LEVELS)]
        codes = [w // 2 for w in widths]
        super().__init__(modalities, num_classes, codes, [2**k for k in range(LEVELS)])
        self.encoders = nn.ModuleList(Encoder(widths) for _ in self.modalities)
        self.decoder = Decoder(codes, num_classes)
        # The published loss compares a combination's posterior with that of everything.
        self.needs_acquired = reconstruct
        rebuilt = self.modalities if reconstruct else ()
        self.image_decoders = nn.ModuleList(Decoder(codes, 1) for _ in rebuilt)
        initialise(self, SLOPE)

    def encode(self, image: Image, present: Presence) -> Latents:
        """Return the latents of the shown modalities, one per modality and level."""
        check_input(image, present, self.modalities, self.strides)
        pieces = encode_slots(self.encoders, image, present)
        joined = join_levels(pieces, present, LEVELS)
        halves = [level.chunk(2, 2) for level in joined]
        return EncodedLatents(
            [mean for mean, _ in halves],
            self.modalities,
            [present] * LEVELS,
            log_variance=[variance.clamp(-LIMIT, LIMIT) for _, variance in halves],
            encoded=present,
        )

    def decode(self, latents: Latents) -> SegOutput:
        """Return the logits that the decoder makes of the latents."""
        posteriors = [product_of_gaussians(latents, level) for level in range(len(latents))]
        codes = [self._code(*posterior) for posterior in posteriors]
        extras: dict[str, Tensor] = {}
        if self.training and isinstance(latents, EncodedLatents) and len(self.image_decoders):
            rebuilt = [decoder(codes)[0][:, 0] for decoder in self.image_decoders]
            extras["reconstruction"] = torch.stack(rebuilt, 1)
            extras["reconstruction_slots"] = latents.encoded
            extras["divergence"] = _divergence(latents, posteriors)
        logits, maps = self.decoder(codes)
        return SegOutput(logits, latents, extras, maps)

    def _code(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        if not self.training:
            return mean
        return mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
