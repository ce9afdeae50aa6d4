"""Backbones: plain ``nn.Module`` networks under the contract of :mod:`pmixseg.backbones.base`."""

from pmixseg.backbones.base import Backbone
from pmixseg.backbones.mmformer import MMFormer
from pmixseg.backbones.monai import EarlyFusion
from pmixseg.backbones.rfnet import RFNet
from pmixseg.backbones.uhved import UHVED
from pmixseg.backbones.unet import MultiEncoderUNet

__all__ = ["UHVED", "Backbone", "EarlyFusion", "MMFormer", "MultiEncoderUNet", "RFNet"]
