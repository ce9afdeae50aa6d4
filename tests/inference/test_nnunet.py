"""nnU-Net's folders both ways: its raw data in, predictions that its evaluation takes out."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pmixseg.cli import main
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.splits import SplitJson
from pmixseg.data.store.store import Store, prepare
from pmixseg.errors import InputError
from pmixseg.inference.outputs import Outputs
from pmixseg.task import BRATS

LABELS = {"background": 0, "edema": 1, "necrosis": 2, "enhancing tumor": 3}
REGIONS = {
    "background": 0,
    "whole tumor": [1, 2, 3],
    "tumor core": [2, 3],
    "enhancing tumor": [3],
    "ignore": 4,
}
PLANS = {  # what nnU-Net's evaluation reads of a plans.json
    "dataset_name": "Dataset137_BraTS",
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "SimpleITKIO",
    "label_manager": "LabelManager",
}


@pytest.fixture(scope="module")
def raw(phantom_root, tmp_path_factory):
    """Three phantom cases as ``nnUNet_raw``, with regions; the last one is annotated in part."""
    folder = tmp_path_factory.mktemp("nnUNet_raw") / "Dataset137_BraTS"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    order = ("t1", "t1ce", "t2", "flair")
    *_, part = cases = find_cases(phantom_root, BRATS)[:3]
    for case in cases:
        for channel, modality in enumerate(order):
            name = f"{case.case_id}_{channel:04d}.nii.gz"
            shutil.copy(case.images[modality], folder / "imagesTr" / name)
        image = nib.load(case.label)
        label = np.array([0, 2, 1, 0, 3], np.uint8)[np.asarray(image.dataobj).astype(np.uint8)]
        if case is part:
            label[:2] = 4
        image = nib.Nifti1Image(label, image.affine)
        nib.save(image, folder / "labelsTr" / f"{case.case_id}.nii.gz")
    names = sorted(p.name.removesuffix(".nii.gz") for p in (folder / "labelsTr").iterdir())
    describe(folder, labels=REGIONS, regions_class_order=[1, 2, 3])
    folds = [{"train": names[:1], "val": names[1:2]}, {"train": names[1:2], "val": names[:1]}]
    (folder / "splits_final.json").write_text(json.dumps(folds))
    (folder / "plans.json").write_text(json.dumps(PLANS))
    return folder


def describe(folder, **facts):
    channels = {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}
    text = {"channel_names": channels, "numTraining": 3, "file_ending": ".nii.gz", **facts}
    (folder / "dataset.json").write_text(json.dumps(text))


def test_regions_and_unannotated_voxels_are_read(raw, tmp_path, capsys):
    cases = find_cases(raw, BRATS)
    assert [c.layout for c in cases] == ["nnunet"] * 3
    assert cases[0].codes == {"NCR": 2, "ED": 1, "ET": 3} and cases[0].unannotated == (4,)
    store = tmp_path / "store"
    for state in ("3 prepared, 0 up to date", "0 prepared, 3 up to date"):
        assert main(["prepare", str(raw), str(store), "--workers=0"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert state in said
        assert "nobody annotated" in said
        assert f"of no use for training: {cases[2].case_id}" in said
    opened = Store.open(store)
    labelled = [opened.read(name).labelled for name in opened.cases]
    assert labelled == [True, True, False]
    stored = opened.read(opened.cases[0])
    truth = np.asarray(nib.load(raw / "labelsTr" / f"{stored.case_id}.nii.gz").dataobj)
    np.testing.assert_array_equal(np.array([0, 2, 1, 3])[stored.native_label()], truth)
    plan = SplitJson(raw / "splits_final.json", fold=1)
    split = plan.split([opened.read(name) for name in opened.cases])
    assert (split.train, split.val) == (opened.cases[1:2], opened.cases[:1])


def test_names_by_hand_make_unannotated_voxels_background(raw, tmp_path):
    names = {"NCR": 2, "ED": 1, "ET": 3}
    cases = find_cases(raw, BRATS, labels=names)
    assert not cases[0].unannotated and cases[0].ignored == (4,)
    report = prepare(cases[2:], tmp_path / "s", BRATS, progress=False)
    assert not report.unlabelled


@pytest.fixture
def predicted(raw, checkpoint, tmp_path):
    out = tmp_path / "predicted"
    assert main(["segment", str(checkpoint), str(raw), "-o", str(out), "--nnunet", "--png"]) == 0
    return out


def test_predictions_are_named_and_numbered_as_the_ground_truth(raw, predicted):
    truth = sorted((raw / "labelsTr").iterdir())
    assert sorted(p.name for p in predicted.glob("*.nii.gz")) == [p.name for p in truth]
    for path in truth:
        made, true = nib.load(predicted / path.name), nib.load(path)
        assert made.shape == true.shape and made.get_data_dtype().kind in "iu"
        np.testing.assert_allclose(made.affine, true.affine)
        assert set(np.unique(made.dataobj)) <= {0, 1, 2, 3}


def test_other_volumes_beside_plain_names_are_refused(checkpoint, raw, tmp_path, capsys):
    arguments = ["segment", str(checkpoint), str(raw), "-o", str(tmp_path), "--nnunet", "--entropy"]
    assert main(arguments) == 1
    assert "every volume of a folder for a label map" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(InputError, match="would be taken for its label"):
        name = next((raw / "labelsTr").iterdir())
        Outputs(name.parent, plain=True).check(name.name.removesuffix(".nii.gz"), [name])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nnunets_own_evaluation_takes_them(raw, predicted):
    """With ``PMIXSEG_NNUNET``: the folder of an environment that has nnunetv2."""
    place = os.environ.get("PMIXSEG_NNUNET")
    if not place:
        pytest.skip("needs nnunetv2 in an environment of its own, named by PMIXSEG_NNUNET")
    command = [Path(place) / "bin" / "nnUNetv2_evaluate_folder", raw / "labelsTr", predicted]
    command += ["-djfile", raw / "dataset.json", "-pfile", raw / "plans.json", "-np", "1"]
    rest = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=rest)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((predicted / "summary.json").read_text())
    assert set(summary["mean"]) == {"(1, 2, 3)", "(2, 3)", "(3,)"}
    for row in summary["metric_per_case"]:
        made, true = (
            np.asarray(nib.load(row[f"{k}_file"]).dataobj) for k in ("prediction", "reference")
        )
        for region, codes in {"(1, 2, 3)": (1, 2, 3), "(2, 3)": (2, 3), "(3,)": (3,)}.items():
            a, b = (np.isin(m, codes) & (true != 4) for m in (made, true))
            dice = 2 * (a & b).sum() / (a.sum() + b.sum())
            assert row["metrics"][region]["Dice"] == pytest.approx(dice)
