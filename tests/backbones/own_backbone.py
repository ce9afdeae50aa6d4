import torch
from torch import nn

from pmixseg.backbones import Backbone
from pmixseg.types import Latents, SegOutput


class Tiny(Backbone):
    def __init__(self, modalities=("flair", "t1ce", "t1", "t2"), num_classes=4, width=8):
        super().__init__(modalities, num_classes, channels=[width, 2 * width], strides=[1, 2])
        self.fine = nn.ModuleList(self.block(1, width, 1) for _ in modalities)
        self.coarse = nn.ModuleList(self.block(width, 2 * width, 2) for _ in modalities)
        self.up = nn.ConvTranspose3d(2 * width, width, 2, 2)
        self.head = nn.Conv3d(width, num_classes, 1)

    def block(self, inside, outside, stride):
        conv = nn.Conv3d(inside, outside, 3, stride, 1, bias=False)
        return nn.Sequential(conv, nn.InstanceNorm3d(outside, affine=True), nn.LeakyReLU())

    def encode(self, image, present):  # one latent per modality and level, [B, M, C, D, H, W]
        fine = torch.stack([net(image[:, m : m + 1]) for m, net in enumerate(self.fine)], 1)
        coarse = torch.stack([net(fine[:, m]) for m, net in enumerate(self.coarse)], 1)
        return Latents([fine, coarse], self.modalities, [present, present])

    def decode(self, latents):  # absent slots are 0, or whatever the module filled them with
        fine, coarse = latents.masked(0).sum(1), latents.masked(1).sum(1)
        return SegOutput(self.head(fine + self.up(coarse)), latents)
