"""Backbones: plain ``nn.Module`` networks under the contract of :mod:`pmixseg.backbones.base`."""

from pmixseg.backbones.april2025 import April2025Network
from pmixseg.backbones.base import Backbone
from pmixseg.backbones.demoseg import DeMoSeg
from pmixseg.backbones.mmformer import MMFormer
from pmixseg.backbones.monai import EarlyFusion
from pmixseg.backbones.rfnet import RFNet
from pmixseg.backbones.shaspec import ShaSpec
from pmixseg.backbones.uhved import UHVED
from pmixseg.backbones.unet import MultiEncoderUNet

__all__ = [
    "UHVED",
    "April2025Network",
    "Backbone",
    "DeMoSeg",
    "EarlyFusion",
    "MMFormer",
    "MultiEncoderUNet",
    "RFNet",
    "ShaSpec",
]
