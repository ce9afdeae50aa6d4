"""Models with random weights, and their checkpoints."""

from pathlib import Path

import torch

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.modules import StudentModule
from pmixseg.modules.payload import payload_of
from pmixseg.modules.preparation import Preparation
from pmixseg.task import BRATS


def tiny_student(window=32, spacing=None, **arguments) -> StudentModule:
    """A small network with random weights whose answer is not all one class."""
    torch.manual_seed(5)
    net = MultiEncoderUNet(modalities=BRATS.modalities, num_classes=4, width=4, levels=3)
    module = StudentModule(backbone=net, **arguments)
    module.preparation = Preparation(
        spacing=spacing, normalisation="zscore-own-mask", patch=(window,) * 3
    )
    return module.eval()


def save(module, path) -> Path:
    torch.save({"state_dict": module.state_dict(), "pmixseg": payload_of(module)}, path)
    return path
