"""Early fusion: any ordinary segmentation network, such as those of MONAI, as a backbone.

The modalities are the input channels, a missing one is 0, and there is one latent, ``fused``.
Four networks are cut between encoder and decoder, so that their encoder's features are latents:

=============  ==================================================================================
network        levels
=============  ==================================================================================
``SegResNet``  output of every ``down_layers`` stage
``UNet``       output of every down layer, then the bottom layer (which has the last stride again)
``DynUNet``    output of ``input_block``, every ``downsamples`` block, ``bottleneck``; the deep
               supervision heads give ``ds1, …`` at their own resolution
``SwinUNETR``  the tensors that its decoder reads: ``encoder1`` … ``encoder4``, the fourth hidden
               state, ``encoder10``
=============  ==================================================================================

A network of one's own is cut the same way if it has ``channels``, ``strides``,
``encode(x) -> list`` and ``decode(list) -> logits``. Any other runs as a whole in ``decode``, and
its only latent is the masked input.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

import torch
from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.nets import DynUNet, SegResNet, SwinUNETR, UNet
from torch import Tensor, nn

from pmixseg.backbones.base import Backbone
from pmixseg.backbones.slots import check_input
from pmixseg.describe import build, find_class
from pmixseg.errors import InputError
from pmixseg.task import BRATS
from pmixseg.types import Image, Latents, Presence, SegOutput


class Decoded(NamedTuple):
    """What the decoder of a cut network returns."""

    logits: Tensor
    extras: dict[str, Tensor]
    """Auxiliary logits."""
    maps: list[Tensor]
    """Feature maps, finest last; empty where the network does not show them."""


class Cut(ABC):
    """A network cut into an encoder and a decoder. Holds the network, owns nothing.

    Attributes:
        channels: channels per level, finest first.
        strides: strides per level; of anisotropic strides the largest axis.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    @abstractmethod
    def encode(self, x: Tensor) -> list[Tensor]:
        """Return feature maps of ``[B, M, D, H, W]``, finest first."""

    @abstractmethod
    def decode(self, features: list[Tensor], training: bool) -> Decoded:
        """Return logits ``[B, C, D, H, W]``, in training auxiliary logits, and feature maps."""


class SegResNetCut(Cut):
    """:class:`monai.networks.nets.SegResNet` has ``encode`` and ``decode`` itself."""

    def __init__(self, network: SegResNet) -> None:
        self.network = network
        levels = range(len(network.blocks_down))
        self.channels = tuple(network.init_filters * 2**k for k in levels)
        self.strides = tuple(2**k for k in levels)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps of the network, finest first."""
        features: list[Tensor] = self.network.encode(x)[1]
        return features

    def decode(self, features: list[Tensor], training: bool) -> Decoded:
        """Return logits, auxiliary outputs and decoder maps from feature maps."""
        net, x, maps = self.network, features[-1], []
        if type(net).decode is not SegResNet.decode:
            return Decoded(net.decode(x, features[::-1]), {}, [])
        for up, layer, skip in zip(
            net.up_samples, net.up_layers, reversed(features[:-1]), strict=True
        ):
            x = layer(up(x) + skip)
            maps.append(x)
        return Decoded(net.conv_final(x) if net.use_conv_final else x, {}, maps)


class UNetCut(Cut):
    """:class:`monai.networks.nets.UNet` is nested: down, skip connection around the rest, up."""

    def __init__(self, network: UNet) -> None:
        self.downs: list[nn.Module] = []
        self.ups: list[nn.Module] = []
        block = network.model
        while (
            isinstance(block, nn.Sequential)
            and len(block) == 3
            and isinstance(block[1], SkipConnection)
        ):
            self.downs.append(block[0])
            self.ups.append(block[2])
            block = block[1].submodule
        self.bottom = block
        self.channels = tuple(network.channels)
        steps = [_largest(s) for s in network.strides[: len(self.downs)]]
        strides = tuple(accumulate(steps, mul))
        self.strides = (*strides, strides[-1])

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps of the network, finest first."""
        features = []
        for layer in (*self.downs, self.bottom):
            x = layer(x)
            features.append(x)
        return features

    def decode(self, features: list[Tensor], training: bool) -> Decoded:
        """Return logits, auxiliary outputs and decoder maps from feature maps."""
        x, maps = features[-1], []
        for up, skip in zip(reversed(self.ups), reversed(features[:-1]), strict=True):
            x = up(torch.cat([skip, x], 1))
            maps.append(x)
        # The last block already has one channel per class.
        return Decoded(x, {}, maps[:-1])


class DynUNetCut(Cut):
    """:class:`monai.networks.nets.DynUNet`, the nnU-Net of MONAI."""

    def __init__(self, network: DynUNet) -> None:
        self.network = network
        self.channels = tuple(network.filters)
        self.strides = tuple(accumulate((_largest(s) for s in network.strides), mul))
        if self.strides[0] != 1:
            raise InputError(
                f"DynUNet's first stride is {network.strides[0]}, so it would not segment at full "
                "resolution; set it to 1."
            )

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps of the network, finest first."""
        net, features = self.network, []
        for layer in (net.input_block, *net.downsamples, net.bottleneck):
            x = layer(x)
            features.append(x)
        return features

    def decode(self, features: list[Tensor], training: bool) -> Decoded:
        """Return logits, auxiliary outputs and decoder maps from feature maps."""
        net, x, extras, maps = self.network, features[-1], {}, []
        heads = net.deep_supervision_heads if training and net.deep_supervision else []
        for level in reversed(range(len(features) - 1)):
            # upsamples run from the bottom up, heads from the finest but one down.
            x = net.upsamples[len(features) - 2 - level](x, features[level])
            maps.append(x)
            if 1 <= level <= len(heads):
                extras[f"ds{level}"] = heads[level - 1](x)
        return Decoded(net.output_block(x), extras, maps)


class SwinUNETRCut(Cut):
    """:class:`monai.networks.nets.SwinUNETR`."""

    def __init__(self, network: SwinUNETR) -> None:
        self.network = network
        first = network.encoder1.layer.conv1.out_channels
        self.channels = (first, first, 2 * first, 4 * first, 8 * first, 16 * first)
        self.strides = (1, *(network.patch_size * 2**k for k in range(5)))

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps of the network, finest first."""
        net = self.network
        hidden = net.swinViT(x, net.normalize)
        skips = [net.encoder2(hidden[0]), net.encoder3(hidden[1]), net.encoder4(hidden[2])]
        return [net.encoder1(x), *skips, hidden[3], net.encoder10(hidden[4])]

    def decode(self, features: list[Tensor], training: bool) -> Decoded:
        """Return logits, auxiliary outputs and decoder maps from feature maps."""
        net, x, maps = self.network, features[-1], []
        ups = (net.decoder5, net.decoder4, net.decoder3, net.decoder2, net.decoder1)
        for up, skip in zip(ups, reversed(features[:-1]), strict=True):
            x = up(x, skip)
            maps.append(x)
        return Decoded(net.out(x), {}, maps)


class OwnCut(Cut):
    """A network that has ``channels``, ``strides``, ``encode`` and ``decode`` itself."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.channels, self.strides = tuple(network.channels), tuple(network.strides)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps of the network, finest first."""
        return list(self.network.encode(x))

    def decode(self, features: list[Tensor], training: bool) -> Decoded:
        """Return logits, auxiliary outputs and decoder maps from feature maps."""
        return _outputs(self.network.decode(features))


class Uncut(Cut):
    """A network that cannot be cut: the latent is its input, all of it is the decoder."""

    def __init__(self, network: nn.Module, modalities: int) -> None:
        self.network = network
        self.channels, self.strides = (modalities,), (1,)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps of the network, finest first."""
        return [x]

    def decode(self, features: list[Tensor], training: bool) -> Decoded:
        """Return logits, auxiliary outputs and decoder maps from feature maps."""
        return _outputs(self.network(features[0]))


CUTS: tuple[tuple[type[nn.Module], type[Cut]], ...] = (
    (SegResNet, SegResNetCut),
    (UNet, UNetCut),
    (DynUNet, DynUNetCut),
    (SwinUNETR, SwinUNETRCut),
)


def cut(network: nn.Module, modalities: int) -> Cut:
    """Say how a network is cut: see the table of this module.

    A subclass that overrides ``forward`` computes something else than the class whose parts are
    known, so it is not cut.
    """
    for known, how in CUTS:
        if type(network).forward is known.forward:
            made: Cut = how(network)  # type: ignore[call-arg]  # every cut of the table takes its network
            return made
    if all(hasattr(network, name) for name in ("channels", "strides", "encode", "decode")):
        return OwnCut(network)
    return Uncut(network, modalities)


class EarlyFusion(Backbone):
    """Segment with any network that reads all modalities as channels; a missing one is 0.

    The classic baseline ("modality dropout" when trained on random combinations). Its latents
    have one slot, ``fused``, so a modality cannot be hidden after encoding: ``shares_encoding`` is
    False and every combination is encoded anew.

    Args:
        network: ``{"class_path": ..., "init_args": {...}}`` or an instance that maps
            ``[B, M, D, H, W]`` to logits, or to a list of logits, finest first (the others become
            ``ds1, …``). ``in_channels``, ``out_channels`` and ``spatial_dims`` may be left out of
            a description. An instance cannot be written to a checkpoint.
        modalities: names of the input channels.
        num_classes: softmax classes, background included.

    Raises:
        InputError: the description names no network, or the network has other channels.

    Example:
        >>> net = EarlyFusion(
        ...     {"class_path": "monai.networks.nets.SegResNet", "init_args": {"init_filters": 8}}
        ... )
        >>> net.slots, net.channels, net.strides
        (('fused',), (8, 16, 32, 64), (1, 2, 4, 8))
    """

    shares_encoding = False

    def __init__(
        self,
        network: dict[str, Any] | nn.Module,
        modalities: Sequence[str] = BRATS.modalities,
        num_classes: int = BRATS.num_classes,
    ) -> None:
        arguments: dict[str, Any] = {}
        if isinstance(network, nn.Module):
            made = network
        else:
            made = _build_network(network, len(modalities), num_classes)
            arguments = network.get("init_args") or {}
        for name, channels in (("in_channels", len(modalities)), ("out_channels", num_classes)):
            has = arguments.get(name, getattr(made, name, channels))
            if has != channels:
                raise InputError(
                    f"EarlyFusion: {type(made).__name__} has {name} {has}, but the task needs "
                    f"{channels}; correct it or leave it out."
                )
        halves = cut(made, len(modalities))
        super().__init__(modalities, num_classes, halves.channels, halves.strides)
        self.network = made
        self.halves = halves

    @property
    def slots(self) -> tuple[str, ...]:
        """Name the only slot: ``("fused",)``."""
        return ("fused",)

    def encode(self, image: Image, present: Presence) -> Latents:
        """Encode the image with absent modalities set to 0."""
        check_input(image, present, self.modalities, self.strides)
        seen = torch.where(present[:, :, None, None, None], image, 0.0)
        features = [f[:, None] for f in self.halves.encode(seen)]
        return Latents(features, self.slots, [present.any(1, keepdim=True)] * len(features))

    def decode(self, latents: Latents) -> SegOutput:
        """Return the logits that the decoder makes of the latents.

        Raises:
            InputError: the network does not return ``num_classes`` channels.
        """
        # Some modality is always present, and with it the only slot: no need to mask a copy.
        features = [f[:, 0] for f in latents.features]
        logits, extras, maps = self.halves.decode(features, self.training)
        if logits.ndim != 5 or logits.shape[1] != self.num_classes:
            raise InputError(
                f"EarlyFusion: {type(self.network).__name__} returns {list(logits.shape)}, but "
                f"logits are [B, {self.num_classes}, D, H, W]; correct its output channels."
            )
        return SegOutput(logits, latents, extras if self.training else {}, maps)


def _build_network(description: Mapping[str, Any], modalities: int, num_classes: int) -> nn.Module:
    cls = find_class(str(description.get("class_path")))
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        raise InputError(
            f"EarlyFusion: network '{description.get('class_path')}' is not a torch.nn.Module; "
            "name a network's class in class_path."
        )
    takes = inspect.signature(cls).parameters
    usual = {"spatial_dims": 3, "in_channels": modalities, "out_channels": num_classes}
    network: nn.Module = build(description, **{k: v for k, v in usual.items() if k in takes})
    return network


def _largest(step: int | Sequence[int]) -> int:
    return step if isinstance(step, int) else max(step)


def _outputs(result: Any) -> Decoded:
    """Return logits and deep supervision from what a network returned."""
    if isinstance(result, Tensor):
        return Decoded(result, {}, [])
    # A tuple holds logits and something else, such as the loss of SegResNetVAE.
    deep = result[1:] if isinstance(result, list) else ()
    return Decoded(result[0], {f"ds{k}": extra for k, extra in enumerate(deep, 1)}, [])
