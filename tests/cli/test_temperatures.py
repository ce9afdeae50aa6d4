"""Temperatures from validation cases: fitted, stored, applied, recorded; entropy on request."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from pmixseg import BraTSDataModule
from pmixseg.cli import main
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.scores.calibration import reliability
from pmixseg.modules import StudentModule, load
from pmixseg.modules.preparation import Preparation
from pmixseg.task import BRATS, format_combination

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def run(phantom_store, tmp_path_factory):
    """A network far too sure that everything is background; the same with temperatures."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("calibration")
    backbone = {
        "class_path": "pmixseg.backbones.MultiEncoderUNet",
        "init_args": {"modalities": BRATS.modalities, "num_classes": 4, "width": 4, "levels": 2},
    }
    evaluation = {"window": [32, 32, 32], "overlap": 0.0, "examples": 0}
    module = StudentModule(backbone=backbone, evaluation=evaluation)
    module.preparation = Preparation(None, "zscore-own-mask", (32, 32, 32))
    module.backbone.heads[0].bias.data = torch.tensor([12.0, 0.0, 0.0, 0.0])
    content = {"state_dict": module.state_dict(), "pmixseg": module.payload().to_dict()}
    torch.save({**content, "pytorch-lightning_version": "2.6.6"}, folder / "raw.ckpt")
    assert main(command("validate", folder / "raw.ckpt", phantom_store, folder)) == 0
    return folder


def command(name, checkpoint, store, folder, *more):
    fitted = [f"--calibrate={folder / 'fitted.ckpt'}"] if name == "validate" else []
    data = [f"--data.store={store}", "--data.val_cases=2"]
    return [name, f"--ckpt_path={checkpoint}", *data, *QUIET, *fitted, *more]


def test_every_size_gets_a_temperature_that_mends_overconfidence(run):
    by_size = load(run / "fitted.ckpt").evaluation.temperatures
    assert sorted(by_size) == [1, 2, 3, 4]
    assert min(by_size.values()) > 2
    raw, fitted = (load(run / f"{name}.ckpt") for name in ("raw", "fitted"))
    assert raw.evaluation.temperatures is None
    for name, weights in raw.state_dict().items():
        assert torch.equal(weights, fitted.state_dict()[name])


def test_records_hold_calibration_and_their_sidecar_the_temperatures(run, phantom_store):
    tables = {}
    for name in ("raw", "fitted"):
        flags = [f"--run={run / name}", "--model.evaluation.records=records.parquet"]
        assert main(command("test", run / f"{name}.ckpt", phantom_store, run, *flags)) == 0
        records = Records.read(run / name)
        tables[name] = records.table.set_index(["case", "combination", "region"])
        kept = records.sidecar.config["evaluation"]["temperatures"]
        assert kept == (None if name == "raw" else to_text(load(run / "fitted.ckpt")))
    raw, fitted = tables["raw"], tables["fitted"]
    assert raw["dice"].equals(fitted["dice"])  # no label changes
    assert fitted["ece"].mean() < raw["ece"].mean() / 2
    assert fitted["brier"].mean() < raw["brier"].mean()

    # One row again, from the prediction itself.
    module = load(run / "fitted.ckpt")
    data = BraTSDataModule(phantom_store, patch_size=16, val_cases=2)
    data.setup("test")
    item = next(iter(data.test_dataloader()))
    brain = (item["image"] != 0).any(0)
    for combination in (("t1",), BRATS.modalities):
        (one,) = module.predict_item(item, [combination])
        assert one.temperature == module.evaluation.temperatures[len(combination)]
        assert one.box == item["stored"].geometry.box()
        logits = one.probabilities.double().log()
        p = (logits / one.temperature).softmax(0)
        for region, expected in reliability(p, item["label"], BRATS, brain).items():
            row = fitted.loc[item["case_id"], format_combination(combination), region]
            assert row["ece"] == pytest.approx(expected.ece, abs=1e-6)
            assert row["brier"] == pytest.approx(expected.brier, abs=1e-6)


def to_text(module):
    return {str(size): t for size, t in module.evaluation.temperatures.items()}


def test_predict_and_segment_write_the_tempered_entropy(run, phantom_store, phantom_root, capsys):
    writer = ["--trainer.callbacks+=PredictionWriter", "--trainer.callbacks.entropy=true"]
    writer += ["--trainer.callbacks.probabilities=true", f"--run={run / 'predicted'}"]
    assert main(command("predict", run / "fitted.ckpt", phantom_store, run, *writer)) == 0
    written = sorted((run / "predicted" / "predictions").glob("*_entropy.nii.gz"))
    assert written
    case = written[0].name.removesuffix("_entropy.nii.gz")
    entropy = nib.load(written[0]).get_fdata()
    p = nib.load(written[0].with_name(f"{case}_probabilities.nii.gz")).get_fdata()
    np.testing.assert_allclose(entropy, -(p * np.log(p.clip(1e-38))).sum(-1), atol=1e-5)

    (here,) = [c for c in find_cases(phantom_root, BRATS) if c.case_id == case]
    out = run / "segmented"
    flags = ["-o", str(out), "--entropy", "--device=cpu"]
    folder = str(next(iter(here.images.values())).parent)
    assert main(["segment", str(run / "fitted.ckpt"), folder, *flags]) == 0
    np.testing.assert_allclose(
        nib.load(out / f"{case}_entropy.nii.gz").get_fdata(), entropy, atol=1e-5
    )
    facts = json.loads((out / f"{case}_seg.json").read_text())
    assert facts["settings"]["temperature"] == load(run / "fitted.ckpt").evaluation.temperatures[4]
    assert main(["segment", str(run / "raw.ckpt"), folder, *flags]) == 0
    assert nib.load(out / f"{case}_entropy.nii.gz").get_fdata().mean() < entropy.mean()


def test_post_processing_is_recorded_and_not_compared_with_none(run, phantom_store, capsys):
    flags = ["--model.evaluation.postprocess=[largest_component]", f"--run={run / 'post'}"]
    assert main(command("test", run / "raw.ckpt", phantom_store, run, *flags)) == 0
    assert Records.read(run / "post").sidecar.postprocess == ["largest_component"]
    assert main(command("test", run / "raw.ckpt", phantom_store, run, f"--run={run / 'no'}")) == 0
    assert list(Records.read(run / "no").sidecar.postprocess) == []
    assert main(["compare", "--a", str(run / "post"), "--b", str(run / "no")]) == 1
    assert "in different ways (postprocess)" in capsys.readouterr().err


def test_only_validation_cases_are_fitted_on(run, phantom_store, capsys):
    flags = command("test", run / "raw.ckpt", phantom_store, run, "--calibrate=x.ckpt")
    assert main(flags) == 1
    assert "pmixseg validate" in capsys.readouterr().err


def test_a_checkpoint_is_not_replaced_by_its_fitted_copy(run, phantom_store, capsys):
    before = (run / "raw.ckpt").read_bytes()
    same = f"--calibrate={run / 'raw.ckpt'}"
    flags = [
        f for f in command("validate", run / "raw.ckpt", phantom_store, run) if "--cal" not in f
    ]
    assert main([*flags, same]) == 1
    assert "raw.ckpt is read here and would be replaced" in capsys.readouterr().err
    assert (run / "raw.ckpt").read_bytes() == before


def test_impossible_settings_are_refused(run, phantom_store, capsys):
    for name in ("records.xlsx", "elsewhere/records.csv"):
        flags = [f"--model.evaluation.records={name}", f"--run={run / 'never'}"]
        assert main(command("test", run / "raw.ckpt", phantom_store, run, *flags)) == 1
        assert "evaluation.records" in capsys.readouterr().err
