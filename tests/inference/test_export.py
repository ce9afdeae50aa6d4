"""Exported models answer as the model does, in the format that others read."""

import json
import os
import resource
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from pmixseg.backbones import Backbone, MultiEncoderUNet
from pmixseg.cli import main
from pmixseg.data.scans.canonical import canonicalise
from pmixseg.data.scans.grids import on_one_grid
from pmixseg.errors import InputError
from pmixseg.inference.export import FACTS, export
from pmixseg.inference.tracing import FixedCombination
from pmixseg.modules import load
from pmixseg.task import BRATS
from pmixseg.types import Latents, SegOutput
from tests.inference.tiny_models import Glance, save, tiny_student
from tests.processes import Copy

PAIR = ("flair", "t1")


def pocket(**arguments):
    net = MultiEncoderUNet(BRATS.modalities, 4, width=2, levels=2)
    return tiny_student(window=16, backbone=net, **arguments)


@pytest.fixture(scope="module")
def module():
    return pocket()


@pytest.fixture
def windows():
    return torch.randn(3, 1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(7))


class Local(Backbone):
    """Sees one voxel around each: where windows lie makes no difference to it."""

    def __init__(self, modalities=BRATS.modalities, num_classes=4):
        super().__init__(modalities, num_classes, [3], [1])
        self.strided = nn.ModuleList(nn.Conv3d(1, 3, 3, padding=1) for _ in modalities)
        self.head = nn.Conv3d(3, num_classes, 1)

    def encode(self, image, present):
        features = [conv(image[:, m : m + 1]) for m, conv in enumerate(self.strided)]
        return Latents([torch.stack(features, 1)], self.modalities, [present])

    def decode(self, latents):
        return SegOutput(self.head(latents.masked(0).sum(1)), latents)


def assert_same_inside(output, expected):
    """Equal in the boxes around what is not 0, wherever these lie."""
    inner = []
    for image in (output, expected):
        where = np.argwhere((image != 0).any(0))
        box = zip(where.min(0), where.max(0) + 1, strict=True)
        inner.append(image[(slice(None), *(slice(a, b) for a, b in box))])
    np.testing.assert_allclose(inner[0], inner[1], atol=1e-5)


def by_hand(module, window):
    """The model itself, with both absent channels 0."""
    image = torch.zeros(1, 4, *window.shape[2:])
    image[:, 0], image[:, 2] = window[:, 0], window[:, 1]
    present = torch.tensor([[True, False, True, False]])
    with torch.no_grad():
        return module(image, present).logits.softmax(1)


def test_a_fixed_combination_is_the_model(module, windows):
    network = FixedCombination(module, PAIR)
    for window in windows:
        with torch.no_grad():
            exported = network(window)
        torch.testing.assert_close(exported, by_hand(module, window), atol=1e-6, rtol=0)
    assert sum(p.numel() for p in network.parameters()) == sum(
        p.numel() for n, p in module.named_parameters() if n.startswith(("backbone", "anchor"))
    )


def test_onnx_answers_as_the_module(module, windows, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    pytest.importorskip("onnxscript", reason="needs the extra 'export'")
    made = export(module, tmp_path / "m.onnx", "onnx", PAIR)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    session = onnxruntime.InferenceSession(made.path)
    for window in windows:
        (answer,) = session.run(None, {"image": window.numpy()})
        np.testing.assert_allclose(answer, by_hand(module, window).numpy(), atol=1e-4)
    held = session.get_modelmeta().custom_metadata_map
    assert json.loads(held["window"]) == made.facts["window"] == [16, 16, 16]
    assert json.loads(held["channels"]) == made.facts["channels"] == list(PAIR)


def test_a_bundle_that_monai_loads(module, windows, tmp_path):
    from monai.bundle import load as monai_load

    made = export(module, tmp_path / "tumour", "bundle", PAIR)
    assert made.difference < 1e-5
    network, meta, _ = monai_load(
        "tumour", bundle_dir=tmp_path, load_ts_module=True, device="cpu", source="github"
    )
    for window in windows:
        torch.testing.assert_close(network(window), by_hand(module, window), atol=1e-5, rtol=0)
    assert meta["combination"] == "flair+t1"


def test_the_configuration_of_a_bundle_prepares_scans_as_segment_does(case, tmp_path):
    from monai.bundle import ConfigParser

    module = tiny_student(window=16, backbone=Local())
    made = export(module, tmp_path / "local", "bundle", PAIR)
    parser = ConfigParser()
    parser.read_config(made.path / "configs" / "inference.json")
    parser.read_meta(made.path / "configs" / "metadata.json")
    parser["bundle_root"], parser["device"] = str(made.path), "cpu"
    parser["dataset_dir"] = str(case.images["t1"].parent)
    parser["output_dir"] = str(tmp_path / "out")
    item = parser.get_parsed_content("dataset")[0]
    # What reaches the network is what `segment` and `test` give it, to rounding.
    files = {m: case.images[m] for m in PAIR}
    grid = on_one_grid(files, reference=None, strict=False, where="case")
    canonical = canonicalise(grid.images, None, BRATS, dtype="float32", where="case").image
    canonical = canonical[[BRATS.modalities.index(m) for m in PAIR]]
    assert_same_inside(item["image"].numpy(), canonical)
    inferer = parser.get_parsed_content("inferer")
    network = parser.get_parsed_content("network_def")
    with torch.no_grad():
        item["pred"] = inferer(item["image"][None], network)[0]
    parser.get_parsed_content("postprocessing")(item)
    (path,) = (tmp_path / "out").iterdir()
    image = nib.load(path)
    ours = module.segment({m: case.images[m] for m in PAIR})
    assert image.shape == ours.classes.shape
    np.testing.assert_allclose(image.affine, ours.affine, atol=1e-4)
    inside = np.asarray(nib.load(case.images["t1"]).dataobj) != 0
    assert (np.asarray(image.dataobj) == ours.classes)[inside].mean() > 0.98  # borders of windows
    assert len(np.unique(ours.classes)) > 1


@pytest.fixture(autouse=True)
def gradients_stay_as_they_were():
    """A bundle's workflow switches them off for the whole process."""
    was = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(was)


def test_the_bundle_runs_as_a_workflow(module, case, tmp_path):
    pytest.importorskip("ignite", reason="MONAI's evaluators need pytorch-ignite")
    from monai.bundle import ConfigWorkflow

    made = export(module, tmp_path / "tumour", "bundle", PAIR)
    workflow = ConfigWorkflow(
        workflow_type="infer",
        config_file=str(made.path / "configs" / "inference.json"),
        meta_file=str(made.path / "configs" / "metadata.json"),
        logging_file=False,
        bundle_root=str(made.path),
        dataset_dir=str(case.images["t1"].parent),
        output_dir=str(tmp_path / "out"),
        device="$torch.device('cpu')",
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    workflow.run()
    assert len(list((tmp_path / "out").iterdir())) == 1


class Moody(Glance):
    """Answers otherwise every second time, which no trace can follow."""

    calls = 0

    def encode(self, image, present):
        latents = super().encode(image, present)
        self.calls += 1
        return replace(latents, features=[f * (self.calls % 2) for f in latents.features])


@pytest.mark.parametrize("kind", ["torch", "bundle"])
def test_an_export_that_answers_otherwise_is_an_error(tmp_path, kind):
    with pytest.raises(RuntimeError, match="differs from the model"):
        export(tiny_student(window=16, backbone=Moody()), tmp_path / "x", kind)


def test_the_command_writes_the_model_and_names_the_temperature_that_is_not_in_the_graph(
    windows, tmp_path, capsys
):
    path = save(
        pocket(evaluation={"window": (16, 16, 16), "temperatures": {2: 2.5}}), tmp_path / "t.ckpt"
    )
    out = tmp_path / "deep" / "t.pt2"
    assert main(["export", str(path), "--combination", "t1+flair", "-o", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "fitted one, 2.5" in said
    assert "research use only" in said
    extra = {FACTS: ""}
    program = torch.export.load(out, extra_files=extra).module()
    facts = json.loads(extra[FACTS])
    assert facts["temperature"] == 2.5
    assert facts["channels"] == list(PAIR)
    assert facts["notice"].startswith("Research use only")
    model = load(path)
    for window in windows:
        torch.testing.assert_close(program(window), by_hand(model, window), atol=1e-5, rtol=0)
    assert main(["export", str(path), "--combination", "x", "-o", str(out)]) == 1


def test_wrong_requests_are_refused_in_words(module, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="kind is 'caffe'; give torch or onnx or bundle"):
        export(module, tmp_path / "m", "caffe")
    with pytest.raises(InputError, match="dwi"):
        export(module, tmp_path / "m", "torch", "dwi")
    with pytest.raises(InputError, match="not an empty folder"):
        (tmp_path / "used").mkdir()
        (tmp_path / "used" / "file").write_text("mine")
        export(module, tmp_path / "used", "bundle")
    # None in sys.modules makes the import fail, whether the package is installed or not.
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"onnx.*; pip install .pmixseg\[export\]"):
        export(module, tmp_path / "m.onnx", "onnx")


def test_a_bundle_cannot_prepare_scans_for_an_imported_model(tmp_path):
    model = tiny_student()
    model.preparation = replace(model.preparation, normalisation="zscore-joint-mask")
    with pytest.raises(InputError, match="bundle would prepare scans wrongly; export it as torch"):
        export(model, tmp_path / "bundle", "bundle")
    assert not (tmp_path / "bundle").exists()


def export_to_a_full_disk(*words):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return main(["export", *words])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["torch", "bundle"])
def test_a_disk_that_fills_up_is_one_sentence(module, tmp_path, kind):
    checkpoint = save(module, tmp_path / "pocket.ckpt")
    out = tmp_path / "out" / ("model" if kind == "bundle" else "model.pt2")
    words = str(checkpoint), f"--format={kind}", f"-o{out}"
    code, said = Copy(export_to_a_full_disk, *words).join()
    assert code == 1, said
    assert "cannot be written (File too large); allow larger files (ulimit -f)" in said
    assert "Traceback" not in said
    assert list(out.parent.iterdir()) == []


def test_the_source_of_an_export_is_not_replaced(module, tmp_path, capsys):
    checkpoint = save(module, tmp_path / "pocket.ckpt")
    before = checkpoint.read_bytes()
    again = tmp_path / "link.ckpt"
    again.symlink_to(checkpoint)
    for out in (checkpoint, again):
        assert main(["export", str(checkpoint), "-o", str(out)]) == 1
        assert "is read here and would be replaced" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


def test_the_command_takes_an_address_as_segment_does(tmp_path, capsys):
    assert main(["export", "http://example.org/m.ckpt", "-o", str(tmp_path / "a.pt2")]) == 1
    assert "http://example.org/m.ckpt: an http:// address" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["to_onnx", "to_torchscript", "to_tensorrt"])
def test_the_exports_of_lightning_name_the_command_that_works(module, tmp_path, method):
    scans = (torch.zeros(1, 4, 16, 16, 16), torch.ones(1, 4).bool())
    with pytest.raises(InputError, match="of one combination of modalities; use `pmixseg export"):
        getattr(module, method)(tmp_path / "model", scans)


def test_torchs_own_export_names_it_too(module):
    scans = (torch.zeros(1, 4, 16, 16, 16), torch.ones(1, 4).bool())
    with pytest.raises(InputError, match="of one combination of modalities; use `pmixseg export"):
        torch.export.export(module, scans, strict=False)  # as newer torch does
