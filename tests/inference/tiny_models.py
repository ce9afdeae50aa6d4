"""Models with random weights, and their checkpoints."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from pmixseg.backbones import Backbone, MultiEncoderUNet
from pmixseg.modules import StudentModule
from pmixseg.modules.preparation import Preparation
from pmixseg.task import BRATS
from pmixseg.types import Latents, SegOutput


class Glance(Backbone):
    """One strided convolution per modality, one norm over the window: real volumes in a second."""

    def __init__(self, modalities=BRATS.modalities, num_classes=4, width=3):
        super().__init__(modalities, num_classes, [width], [4])
        torch.manual_seed(5)  # the same weights, whatever was drawn before
        self.strided = nn.ModuleList(nn.Conv3d(1, width, 5, 4, padding=2) for _ in modalities)
        self.norm = nn.InstanceNorm3d(width, affine=True)
        self.head = nn.Conv3d(width, num_classes, 1)

    def encode(self, image, present):
        features = [conv(image[:, m : m + 1]) for m, conv in enumerate(self.strided)]
        return Latents([torch.stack(features, 1)], self.modalities, [present])

    def decode(self, latents):
        logits = self.head(self.norm(latents.masked(0).sum(1)).relu())
        return SegOutput(functional.interpolate(logits, scale_factor=4, mode="trilinear"), latents)


def tiny_student(window=32, spacing=None, backbone=None, **arguments) -> StudentModule:
    """A small network with random weights whose answer is not all one class."""
    torch.manual_seed(5)
    net = backbone or MultiEncoderUNet(BRATS.modalities, 4, width=4, levels=3)
    module = StudentModule(backbone=net, **arguments)
    module.preparation = Preparation(
        spacing=spacing, normalisation="zscore-own-mask", patch=(window,) * 3
    )
    return module.eval()


def save(module, path) -> Path:
    torch.save({"state_dict": module.state_dict(), "pmixseg": module.payload().to_dict()}, path)
    return path
