"""Published checkpoints: every tensor lands where it belongs, and nothing is lost silently."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

import pmixseg
from pmixseg.backbones import MMFormer, RFNet
from pmixseg.cli import main
from pmixseg.data.scans.boxes import Box
from pmixseg.data.scans.geometry import Geometry
from pmixseg.errors import InputError
from pmixseg.inference.published_weights import import_official
from pmixseg.task import BRATS, Task

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


SMALL = {"width": 4, "embedding": 16, "hidden": 24, "side": 2}


def write(path, state, **more):
    torch.save({"epoch": 299, "state_dict": state, "optim_dict": {"lr": 2e-4}, **more}, path)
    return path


def parameters(shapes):
    return sum(int(np.prod(s)) for s in shapes.values())


def test_the_shapes_are_those_of_the_papers():
    assert parameters(rfnet_shapes()) == 8_984_960
    assert parameters(mmformer_shapes()) == 36_654_416


def test_every_tensor_of_rfnet_lands(tmp_path):
    state = filled(rfnet_shapes(width=4))
    imported = import_official("rfnet", write(tmp_path / "x.pth", state))
    net = imported.module.backbone
    assert isinstance(net, RFNet)
    assert (imported.tensors, imported.dropped, imported.epoch) == (len(state), (), 299)
    own = net.state_dict()
    for channel, modality in enumerate(MODALITIES):
        for part in ("e1_c1.conv.weight", "e4_c3.conv.bias"):
            theirs = state[f"module.{modality}_encoder.{part}"]
            assert torch.equal(own[f"encoders.{channel}.{part}"], theirs)
    name = "decoder_fuse.RFM2.modal_fusion.3.weight_layer.0.weight"
    assert torch.equal(own[name], state[f"module.{name}"])
    sums = sorted(float(t.double().sum()) for t in state.values())
    assert sums == sorted(float(t.double().sum()) for t in own.values())


def test_every_used_tensor_of_mmformer_lands(tmp_path):
    state = filled(mmformer_shapes(**SMALL), prefix="")
    torch.save(state, tmp_path / "bare.pth")
    imported = import_official("mmformer", tmp_path / "bare.pth")
    net = imported.module.backbone
    assert isinstance(net, MMFormer)
    assert net.official
    unused = {f"{m}_decode_conv.{k}" for m in MODALITIES for k in ("weight", "bias")}
    assert set(imported.dropped) == unused
    assert imported.module.preparation.patch == (32, 32, 32)
    own = net.state_dict()
    for theirs, ours in (
        ("t1_transformer.cross_attention_list.0.fn.fn.qkv.weight", "2.transformer.qkv.weight"),
        ("t2_transformer.cross_attention_list.0.fn.norm.bias", "3.transformer.norm_attention.bias"),
        ("flair_transformer.cross_ffn_list.0.fn.norm.weight", "0.transformer.norm_feed.weight"),
        ("t1ce_transformer.cross_ffn_list.0.fn.fn.net.0.weight", "1.transformer.feed_in.weight"),
        ("t1ce_transformer.cross_ffn_list.0.fn.fn.net.3.bias", "1.transformer.feed_out.bias"),
        ("t1_pos", "2.pos"),
        ("t2_encode_conv.weight", "3.encode_conv.weight"),
        ("flair_encoder.e1_c1.weight", "0.encoder.e1_c1.weight"),
    ):
        assert torch.equal(own[f"encoders.{ours}"], state[theirs])
    together = "multimodal_transformer.cross_ffn_list.0.fn.fn.net.3.weight"
    assert torch.equal(own["multimodal_transformer.feed_out.weight"], state[together])
    used = [t for n, t in state.items() if n not in unused]
    assert imported.tensors == len(used) == len(own)
    assert sorted(float(t.double().sum()) for t in used) == sorted(
        float(t.double().sum()) for t in own.values()
    )


def test_command_writes_a_checkpoint_that_load_and_lightning_read(tmp_path, capsys):
    official = write(tmp_path / "x.pth", filled(mmformer_shapes(**SMALL)))
    path = tmp_path / "out" / "mmformer.ckpt"
    assert main(["import", "mmformer", str(official), "-o", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "trained for 299 epochs" in said
    assert "8 tensors left out" in said
    assert "as in the published code (normalisation 'zscore-joint-mask')" in said

    module = pmixseg.load(path)
    direct = import_official("mmformer", official).module
    assert module.fill == "zero"
    assert module.preparation == direct.preparation
    assert module.preparation.normalisation == "zscore-joint-mask"
    for name, tensor in direct.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor)
    box = Box((0, 0, 0), (32, 32, 32))
    geometry = Geometry.of(box.hi, np.eye(4), boxes=dict.fromkeys(MODALITIES, box))
    item = {
        "image": torch.randn(4, 32, 32, 32, generator=torch.Generator().manual_seed(0)),
        "case_id": "a",
        "acquired": torch.ones(4, dtype=torch.bool),
        "stored": SimpleNamespace(geometry=geometry),
    }
    (expected,) = direct.predict_item(item, [MODALITIES])
    other = import_official("mmformer", write(official, filled(mmformer_shapes(**SMALL), seed=1)))
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet)
    loader = DataLoader([item], batch_size=None)
    (prediction,) = trainer.predict(other.module, loader, ckpt_path=path, weights_only=True)
    assert torch.equal(prediction.probabilities, expected.probabilities)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("module.t1_encoder.e2_c1.conv.bias"), "1 tensors are missing"),
        (lambda s: s.update({"module.extra.weight": torch.ones(2)}), r"unknown \(extra.weight\)"),
        (lambda s: s.update({"module.t2_encoder.e1_c1.conv.bias": torch.ones(3)}), "other shapes"),
        (lambda s: s.pop("module.decoder_fuse.seg_layer.weight"), "no rfnet checkpoint"),
        (lambda s: s.clear(), "no state dict"),
        (lambda s: s.update({"module.note": "text"}), "no state dict"),
    ],
)
def test_other_checkpoints_are_refused_in_words(tmp_path, change, says):
    state = filled(rfnet_shapes(width=4))
    change(state)
    with pytest.raises(InputError, match=says):
        import_official("rfnet", write(tmp_path / "x.pth", state))


def test_one_network_is_not_taken_for_the_other(tmp_path):
    rfnet = write(tmp_path / "r.pth", filled(rfnet_shapes(width=4)))
    mmformer = write(tmp_path / "m.pth", filled(mmformer_shapes(**SMALL)))
    for kind, path in (("rfnet", mmformer), ("mmformer", rfnet)):
        with pytest.raises(InputError):
            import_official(kind, path)


def test_nothing_but_tensors_is_unpickled(tmp_path):
    class Danger:
        def __reduce__(self):
            return (print, ("unpickled",))

    path = write(tmp_path / "x.pth", filled(rfnet_shapes(width=4)), args=Danger())
    with pytest.raises(InputError, match="not opened for safety"):
        import_official("rfnet", path)
    with pytest.raises(InputError, match="does not exist"):
        import_official("rfnet", tmp_path / "none.pth")


@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04", b"\x80\x02}q"])
def test_a_damaged_file_is_one_sentence(tmp_path, capsys, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    assert main(["import", "rfnet", str(path), "-o", str(tmp_path / "x.ckpt")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"pmixseg: {path} cannot be read as a file of tensors (")
    assert "damaged or empty" in said


def test_tasks_that_do_not_fit(tmp_path):
    path = write(tmp_path / "x.pth", filled(rfnet_shapes(width=4)))
    two = Task("two", MODALITIES, ("core", "rest"), {"all": ("core", "rest")})
    with pytest.raises(InputError, match="segments 4 classes"):
        import_official("rfnet", path, two)
    turned = Task("turned", MODALITIES[::-1], BRATS.labels, BRATS.regions)
    with pytest.raises(InputError, match="in the order t2, t1, t1ce, flair"):
        import_official("rfnet", path, turned)
