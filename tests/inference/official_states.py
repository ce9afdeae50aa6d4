"""State dicts with the names and shapes of the published code (ARCHITECTURES.md), random values."""

import torch

MODALITIES = ("flair", "t1ce", "t1", "t2")


def conv(names, name, inside, outside, size):
    names[f"{name}.weight"] = (outside, inside, size, size, size)
    names[f"{name}.bias"] = (outside,)


def encoder(names, name, widths, plain_first):
    inside = 1
    for level, width in enumerate(widths, 1):
        plain = plain_first and level == 1
        conv(names, f"{name}.e{level}_c1" + ("" if plain else ".conv"), inside, width, 3)
        conv(names, f"{name}.e{level}_c2.conv", width, width, 3)
        conv(names, f"{name}.e{level}_c3.conv", width, width, 3)
        inside = width


def decoder(names, name, widths, classes):
    for level in range(len(widths) - 1, 0, -1):
        below, width = widths[level], widths[level - 1]
        conv(names, f"{name}.d{level}_c1.conv", below, width, 3)
        conv(names, f"{name}.d{level}_c2.conv", 2 * width, width, 3)
        conv(names, f"{name}.d{level}_out.conv", width, width, 1)
    conv(names, f"{name}.seg_layer", widths[0], classes, 1)


def stack(names, name, inside, middle, outside):
    conv(names, f"{name}.0.conv", inside, middle, 1)
    conv(names, f"{name}.1.conv", middle, middle, 3)
    conv(names, f"{name}.2.conv", middle, outside, 1)


def rfnet_shapes(width=16, classes=4):
    names, widths = {}, [width * 2**k for k in range(4)]
    for modality in MODALITIES:
        encoder(names, f"{modality}_encoder", widths, plain_first=False)
    decoder(names, "decoder_fuse", widths, classes)
    for level, c in enumerate(widths, 1):
        rfm, prm = f"decoder_fuse.RFM{level}", f"decoder_fuse.prm_generator{level}"
        for region in range(classes):
            conv(names, f"{rfm}.modal_fusion.{region}.weight_layer.0", 4 * c + 1, 128, 1)
            conv(names, f"{rfm}.modal_fusion.{region}.weight_layer.2", 128, 4, 1)
        stack(names, f"{rfm}.region_fusion.fusion_layer", classes * c, c, c // 2)
        stack(names, f"{rfm}.short_cut", 4 * c, c, c // 2)
        stack(names, f"{prm}.embedding_layer", 4 * c, c // 4, c)
        conv(names, f"{prm}.prm_layer.0.conv", c if level == 4 else 2 * c, 16, 1)
        conv(names, f"{prm}.prm_layer.1", 16, classes, 1)
    decoder(names, "decoder_sep", widths, classes)
    return names


def layer(names, name, width, hidden):
    attention, feed = f"{name}.cross_attention_list.0.fn", f"{name}.cross_ffn_list.0.fn"
    names |= {f"{attention}.norm.{k}": (width,) for k in ("weight", "bias")}
    names[f"{attention}.fn.qkv.weight"] = (3 * width, width)
    names[f"{attention}.fn.proj.weight"] = (width, width)
    names[f"{attention}.fn.proj.bias"] = (width,)
    names |= {f"{feed}.norm.{k}": (width,) for k in ("weight", "bias")}
    names[f"{feed}.fn.net.0.weight"], names[f"{feed}.fn.net.0.bias"] = (hidden, width), (hidden,)
    names[f"{feed}.fn.net.3.weight"], names[f"{feed}.fn.net.3.bias"] = (width, hidden), (width,)
    return names


def mmformer_shapes(width=8, classes=4, embedding=512, hidden=4096, side=8):
    names, widths = {}, [width * 2**k for k in range(5)]
    for modality in MODALITIES:
        encoder(names, f"{modality}_encoder", widths, plain_first=True)
        conv(names, f"{modality}_encode_conv", widths[-1], embedding, 1)
        conv(names, f"{modality}_decode_conv", embedding, widths[-1], 1)
        names[f"{modality}_pos"] = (1, side**3, embedding)
        names = layer(names, f"{modality}_transformer", embedding, hidden)
    names = layer(names, "multimodal_transformer", embedding, hidden)
    conv(names, "multimodal_decode_conv", 4 * embedding, 4 * widths[-1], 1)
    decoder(names, "decoder_fuse", widths, classes)
    for level, c in enumerate(widths, 1):
        stack(names, f"decoder_fuse.RFM{level}.fusion_layer", 4 * c, c, c)
        if level > 1:
            conv(names, f"decoder_fuse.seg_d{level - 1}", c, classes, 1)
    decoder(names, "decoder_sep", widths, classes)
    return names


def filled(shapes, prefix="module.", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix + name: 0.1 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
