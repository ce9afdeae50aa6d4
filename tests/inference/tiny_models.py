"""A small network of every kind, models with random weights, and their checkpoints."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from pmixseg.backbones import (
    UHVED,
    Backbone,
    DeMoSeg,
    EarlyFusion,
    MMFormer,
    MultiEncoderUNet,
    RFNet,
    ShaSpec,
)
from pmixseg.losses import DiceCE
from pmixseg.losses.rfnet import RFNetCriterion
from pmixseg.losses.shaspec import ShaSpecCriterion
from pmixseg.losses.uhved import UHVEDCriterion
from pmixseg.modules import StudentModule
from pmixseg.modules.preparation import Preparation
from pmixseg.task import BRATS
from pmixseg.types import Latents, SegOutput

MMFORMER = {"width": 4, "patch_size": 32, "embedding": 8, "heads": 2, "hidden": 8, "dropout": 0.0}
SEGRESNET = {"init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]}
UNET = {"channels": [3, 4, 6], "strides": [1, 2], "num_res_units": 1}
SWIN = {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
DYNUNET = {
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2],
    "filters": [3, 4, 6],
}


def early(name, **arguments):
    """A network of MONAI behind early fusion."""
    return EarlyFusion({"class_path": f"monai.networks.nets.{name}", "init_args": arguments})


BACKBONES = {
    "unet": (lambda: MultiEncoderUNet(width=4, levels=2), DiceCE, 16),
    "rfnet": (lambda: RFNet(width=4), RFNetCriterion, 16),
    "mmformer": (lambda: MMFormer(**MMFORMER), RFNetCriterion, 32),
    "uhved": (lambda: UHVED(width=4), UHVEDCriterion, 16),
    "shaspec": (lambda: ShaSpec(width=4, levels=2), ShaSpecCriterion, 16),
    "demoseg": (lambda: DeMoSeg(width=4, levels=3), DiceCE, 16),
    "early": (lambda: early("SegResNet", init_filters=8), DiceCE, 16),
}
"""Name -> how it is made, its criterion, and the side of a patch."""


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
