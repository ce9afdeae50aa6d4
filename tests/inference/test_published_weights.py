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
from tests.inference.official_states import MODALITIES, filled, mmformer_shapes, rfnet_shapes

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
    found = import_official("rfnet", write(tmp_path / "x.pth", state))
    net = found.module.backbone
    assert isinstance(net, RFNet)
    assert (found.tensors, found.dropped, found.epoch) == (len(state), (), 299)
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
    found = import_official("mmformer", tmp_path / "bare.pth")
    net = found.module.backbone
    assert isinstance(net, MMFormer)
    assert net.official
    unused = {f"{m}_decode_conv.{k}" for m in MODALITIES for k in ("weight", "bias")}
    assert set(found.dropped) == unused
    assert found.module.preparation.patch == (32, 32, 32)
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
    assert found.tensors == len(used) == len(own)
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
    (found,) = trainer.predict(other.module, loader, ckpt_path=path, weights_only=True)
    assert torch.equal(found.probabilities, expected.probabilities)


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
