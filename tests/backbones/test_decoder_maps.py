"""``SegOutput.decoder``: every backbone gives its decoder's feature maps, finest last."""

import pytest
import torch

from pmixseg.backbones import (
    UHVED,
    DeMoSeg,
    EarlyFusion,
    MMFormer,
    MultiEncoderUNet,
    RFNet,
    ShaSpec,
)

SEGRESNET = {"init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]}
UNET = {"channels": [3, 4, 6], "strides": [1, 2], "num_res_units": 1}
DYNUNET = {
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2],
    "filters": [3, 4, 6],
}
SWIN = {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
SMALL = {"width": 4, "patch_size": 32, "embedding": 8, "heads": 2, "hidden": 8}


def monai(name, arguments):
    return EarlyFusion({"class_path": f"monai.networks.nets.{name}", "init_args": arguments})


# The backbone, and channels and strides of its maps, coarsest first.
BACKBONES = {
    "unet": (lambda: MultiEncoderUNet(width=4, levels=3), [(8, 2), (4, 1)]),
    "unet at half": (lambda: MultiEncoderUNet(width=4, levels=3, stem=2), [(8, 4), (4, 2)]),
    "rfnet": (lambda: RFNet(width=4), [(16, 4), (8, 2), (4, 1)]),
    "mmformer": (lambda: MMFormer(**SMALL), [(32, 8), (16, 4), (8, 2), (4, 1)]),
    "uhved": (lambda: UHVED(width=4), [(8, 4), (4, 2), (2, 1)]),
    "shaspec": (lambda: ShaSpec(width=4, levels=3), [(8, 2), (4, 1)]),
    "demoseg": (lambda: DeMoSeg(width=4, levels=4), [(16, 4), (8, 2), (4, 1)]),
    "segresnet": (lambda: monai("SegResNet", SEGRESNET), [(16, 2), (8, 1)]),
    # The last block of MONAI's UNet makes the logits, so the finest map is the one before it.
    "monai unet": (lambda: monai("UNet", UNET), [(3, 1)]),
    "dynunet": (lambda: monai("DynUNet", DYNUNET), [(4, 2), (3, 1)]),
    "swin": (lambda: monai("SwinUNETR", SWIN), [(96, 16), (48, 8), (24, 4), (12, 2), (12, 1)]),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_maps_have_their_strides_and_the_logits_follow_from_them(name):
    make, expected = BACKBONES[name]
    torch.manual_seed(0)
    net, side = make().eval(), 64 if name == "swin" else 32
    present = torch.tensor([[True, False, True, True]])
    output = net(torch.randn(1, 4, side, side, side), present)
    sizes = [(m.shape[1], side // m.shape[2]) for m in output.decoder]
    assert sizes == expected
    (gradient,) = torch.autograd.grad(output.logits.square().mean(), output.decoder[-1])
    assert gradient.isfinite().all() and gradient.any()


def test_the_finest_map_is_what_the_last_convolution_reads():
    net = MultiEncoderUNet(width=4, levels=3).eval()
    output = net(torch.randn(2, 4, 16, 16, 16), torch.ones(2, 4, dtype=torch.bool))
    torch.testing.assert_close(net.heads[0](output.decoder[-1]), output.logits)


def test_segresnet_decodes_as_its_own_decode_does():
    net = monai("SegResNet", SEGRESNET).eval()
    image = torch.randn(1, 4, 16, 16, 16)
    output = net(image, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(output.logits, net.network(image))
