"""Segmenting a patient's scans gives what testing the prepared case gives."""

import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from pmixseg.cli import main
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.scans.canonical import canonicalise
from pmixseg.data.store.prepare import prepare
from pmixseg.data.store.store import Store
from pmixseg.data.training_cases import TrainingCases, training_cases
from pmixseg.evaluation.prediction.scans import SegmentSettings
from pmixseg.evaluation.prediction.segmentation import doubts
from pmixseg.modules import load
from pmixseg.task import BRATS
from pmixseg.types import SegOutput
from tests.evaluation.made_up import predict_combinations
from tests.inference.tiny_models import Glance, save, tiny_student


def through_the_store(module, stored, combinations):
    """What ``test`` predicts for a stored case."""
    item = {
        "image": torch.from_numpy(np.array(stored.image)).float(),
        "case_id": stored.case_id,
        "acquired": torch.tensor(stored.acquired),
        "stored": stored,
    }
    return {p.combination: p for p in module.predict_item(item, combinations)}


ALL = BRATS.combinations()


@pytest.mark.parametrize(
    ("spacing", "dtype", "combinations"),
    [(None, "float32", ALL), (None, "float16", ALL[3:9:2]), ((6.0,) * 3, "float16", ALL[1:13:4])],
)
def test_segment_of_files_equals_test_of_the_case(
    cropped_root, tmp_path, spacing, dtype, combinations
):
    module = tiny_student(spacing=spacing)
    cases = find_cases(cropped_root, BRATS)
    assert not prepare(cases, tmp_path, BRATS, spacing=spacing, dtype=dtype, progress=False).failed
    store = Store.open(tmp_path)
    stored = store.read(cases[0].case_id)
    assert len({stored.geometry.box(c) for c in ALL}) >= 4  # fields of view differ
    expected = through_the_store(module, stored, ALL)
    seen = set()
    for combination in combinations:
        images = {m: cases[0].images[m] for m in combination}
        result = module.segment(images, SegmentSettings(dtype=dtype), codes=cases[0].codes)
        assert result.combination == combination
        assert np.array_equal(result.classes, expected[combination].labels())
        np.testing.assert_allclose(
            result.probabilities, expected[combination].source_probabilities(), atol=1e-5
        )
        seen |= set(np.unique(result.labels).tolist())
    assert len(seen) > 1
    assert seen <= {0, 1, 2, 4}


def reoriented(image, axcodes):
    """The same scan with its axes in another order and direction, voxels untouched."""
    start = nib.io_orientation(image.affine)
    change = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(tuple(axcodes)))
    return image.as_reoriented(change)


@pytest.fixture(scope="module")
def whole(model, images):
    return model.segment(images)


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SAR", "IPL"])
def test_orientation_of_the_file_changes_no_voxel(model, images, whole, axcodes):
    turned = {m: reoriented(i, axcodes) for m, i in images.items()}
    labels = model.segment(turned).to_nifti()
    assert "research use only" in str(labels.header["descrip"])
    assert labels.header.get_xyzt_units()[0] == "mm"
    assert nib.aff2axcodes(labels.affine) == tuple(axcodes)
    assert labels.shape == turned["t1"].shape
    back = reoriented(labels, nib.aff2axcodes(images["t1"].affine))
    assert np.array_equal(back.dataobj, whole.to_nifti().dataobj)
    np.testing.assert_allclose(back.affine, images["t1"].affine, atol=1e-4)


def test_compressed_or_not_is_the_same(model, case, images, whole, tmp_path):
    for name, image in images.items():
        nib.save(image, tmp_path / f"x_{name}.nii")
    plain = model.segment({m: tmp_path / f"x_{m}.nii" for m in images})
    packed = model.segment({m: str(p) for m, p in case.images.items()})
    for source in (plain, packed):
        assert np.array_equal(source.classes, whole.classes)


def test_a_file_of_four_dimensions_is_its_volumes(model, images, whole, tmp_path):
    order = ("t2", "flair", "t1", "t1ce")
    stacked = np.stack([np.asarray(images[m].dataobj) for m in order], axis=-1)
    path = tmp_path / "all.nii.gz"
    nib.save(nib.Nifti1Image(stacked, images["t1"].affine), path)
    result = model.segment({m: (path, i) for i, m in enumerate(order)})
    assert np.array_equal(result.classes, whole.classes)


def test_mirroring_averages_the_eight_answers(model, images, whole):
    averaged = model.segment(images, SegmentSettings(tta=True)).prediction.probabilities
    image = torch.from_numpy(canonicalise(images, None, BRATS).image).float()
    answers = [
        predict_combinations(
            model, image.flip(axes), torch.ones(1, 4, dtype=torch.bool), patch=(32, 32, 32)
        )[0].flip(axes)
        for axes in [(), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)]
    ]
    torch.testing.assert_close(averaged, torch.stack(answers).mean(0), atol=1e-5, rtol=0)
    assert (averaged - whole.prediction.probabilities).abs().max() > 1e-3


def test_reduced_precision_is_close_but_not_equal(model, images, whole):
    half = model.segment(images, SegmentSettings(precision="bf16"))
    difference = np.abs(half.probabilities - whole.probabilities)
    assert 0 < difference.max() < 0.05


def test_a_callers_autocast_changes_nothing(model, images, whole):
    with torch.autocast("cpu", torch.bfloat16):
        again = model.segment(images)
    assert np.array_equal(again.probabilities, whole.probabilities)


def test_overlap_and_window_are_used(model, images, whole):
    other = model.segment(images, SegmentSettings(overlap=0.0, window=(16, 16, 16)))
    assert other.settings["window"] == [16, 16, 16]
    assert not np.array_equal(other.probabilities, whole.probabilities)


def test_post_processing_is_used_and_recorded(model, images, whole):
    result = model.segment(images, SegmentSettings(postprocess=["largest_component"]))
    assert result.settings["postprocess"] == ["largest_component"]
    assert 0 < (result.classes > 0).sum() <= (whole.classes > 0).sum()


def test_volumes_entropy_and_probabilities_by_hand(whole):
    voxel_ml = 5.0**3 / 1000
    for region, classes in {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}.items():
        expected = np.isin(whole.classes, classes).sum() * voxel_ml
        assert whole.volumes[region] == pytest.approx(expected)
    p = whole.probabilities
    np.testing.assert_allclose(p.sum(0), 1, atol=1e-5)
    assert np.array_equal(p.argmax(0), whole.classes)
    at = np.unravel_index(whole.entropy.argmax(), whole.entropy.shape)
    here = p[(slice(None), *at)].astype(float)
    assert whole.entropy[at] == pytest.approx(-(here * np.log(here)).sum(), rel=1e-4)
    assert whole.entropy[0, 0, 0] == 0  # nothing was shown there


def test_training_mode_is_left_as_it_was(images):
    module = tiny_student()
    module.train()
    module.segment({"t1": images["t1"]})
    assert module.training
    assert module.backbone.training


@pytest.fixture
def scans_of(phantom_root):
    return sorted(p.parent for p in phantom_root.rglob("*_flair.nii.gz"))[0]


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_a_scan_by_file_has_the_codes_of_its_folder(checkpoint, scans_of, tmp_path, capsys):
    assert main(["segment", str(checkpoint), str(scans_of), "-o", str(tmp_path / "folder")]) == 0
    told = "numbers in the files: 0 background, 1 NCR, 2 ED, 4 ET"
    assert told in said(capsys)
    scans = [
        f"--{p.name.split('_')[-1][:-7]}={p}" for p in scans_of.iterdir() if "seg" not in p.name
    ]
    assert main(["segment", str(checkpoint), *scans, "-o", str(tmp_path / "files")]) == 0
    assert told in said(capsys)
    results = [nib.load(next((tmp_path / k).glob("*_seg.nii.gz"))) for k in ("folder", "files")]
    codes = [np.unique(image.dataobj).tolist() for image in results]
    assert codes[0] == codes[1]
    assert np.array_equal(results[0].dataobj, results[1].dataobj)


def test_codes_of_the_users_own_are_told(checkpoint, scans_of, tmp_path, capsys):
    scan = f"--flair={next(scans_of.glob('*_flair.nii.gz'))}"
    flags = ["-o", str(tmp_path), "--codes", "NCR=5,ED=6,ET=7"]
    assert main(["segment", str(checkpoint), scan, *flags]) == 0
    assert "numbers in the files: 0 background, 5 NCR, 6 ED, 7 ET" in said(capsys)


def test_codes_number_the_labels_of_a_folder_that_no_layout_fits(
    checkpoint, scans_of, tmp_path, capsys
):
    folder = tmp_path / "visit"
    folder.mkdir()
    shutil.copy(next(scans_of.glob("*_flair.nii.gz")), folder / "FLAIR.nii.gz")
    flags = ["-o", str(tmp_path / "out"), "--codes", "NCR=5,ED=6,ET=7"]
    assert main(["segment", str(checkpoint), str(folder), *flags]) == 0
    assert "labels are numbered NCR 5, ED 6, ET 7" in said(capsys)
    result = nib.load(next((tmp_path / "out").glob("*_seg.nii.gz")))
    assert {0, 6} <= set(np.unique(result.dataobj).tolist()) <= {0, 5, 6, 7}
    assert main(["segment", str(checkpoint), str(scans_of), *flags]) == 1
    assert "has label codes of its own; leave --codes out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bias", "sentence"), [((9.0, 0, 0, 0), "nothing was segmented"), ((0, 0, 9.0, 0), "more than")]
)
def test_a_result_that_no_patient_has_is_told(scans_of, tmp_path, bias, sentence):
    module = tiny_student()
    head = [m for m in module.backbone.modules() if getattr(m, "out_channels", 0) == 4][-1]
    head.weight.data.zero_()
    head.bias.data.copy_(head.bias.data.new_tensor(bias))
    model = load(save(module, tmp_path / "a.ckpt"))
    scans = {
        "flair": next(scans_of.glob("*_flair.nii.gz")),
        "t1": next(scans_of.glob("*_t1.nii.gz")),
    }
    with pytest.warns(UserWarning, match=sentence):
        result = model.segment(scans)
    assert sentence in " ".join(result.warnings)


class Corner(Glance):
    """Oedema in a corner of the window, whatever it is shown."""

    def decode(self, latents):
        logits = torch.zeros(len(latents.features[0]), 4, 32, 32, 32)
        logits[:, 0], logits[:, 2, :9, :9, :9] = 1.0, 9.0
        return SegOutput(logits, latents)


def test_a_tumour_beside_the_brain_is_told(scans_of):
    scan = next(scans_of.glob("*_flair.nii.gz"))
    with pytest.warns(UserWarning, match=r"\d\d% of what is segmented lies outside the brain"):
        result = tiny_student(backbone=Corner()).segment({"flair": scan})
    outside = np.asarray(nib.load(scan).dataobj) == 0
    share = (outside & (result.classes > 0)).sum() / (result.classes > 0).sum()
    assert f"{share:.0%} of" in result.warnings[-1]


def test_a_model_of_phantoms_says_so_of_a_patient(phantom_store, scans_of, tmp_path):
    data = BraTSDataModule(store=phantom_store, patch_size=16)
    phantoms = training_cases(data)
    module = tiny_student()
    module.preparation = replace(module.preparation, cases=phantoms)
    model = load(save(module, tmp_path / "a.ckpt"))
    scan = nib.load(next(scans_of.glob("*_flair.nii.gz")))
    scan.header["descrip"] = b"a patient"
    nib.save(scan, tmp_path / "PHANTOM_flair.nii.gz")
    patient = tmp_path / "PHANTOM_flair.nii.gz"
    with pytest.warns(UserWarning, match="trained on synthetic patients alone"):
        model.segment({"flair": patient})
    later = phantoms.after(TrainingCases(train=("Brats18_2013_2_1",)))
    of_phantom = next(scans_of.glob("*_flair.nii.gz"))
    image = nib.load(of_phantom)
    silent = (
        (phantoms, of_phantom),
        (phantoms, image),
        (later, patient),
        (TrainingCases(), patient),
    )
    for cases, file in silent:
        model.preparation = replace(model.preparation, cases=cases)
        assert "synthetic" not in " ".join(model.segment({"flair": file}).warnings)


def test_voxels_that_resampling_alone_made_raise_no_doubt_of_place():
    whole = np.ones((4, 4, 4), bool)
    made = SimpleNamespace(
        prediction=SimpleNamespace(on_grid=lambda: torch.zeros(4, 4, 4, dtype=torch.int64)),
        volumes={"WT": 1.0},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 0 of 0 voxels
        assert doubts(made, whole, 1.0, "case 'x'") == ()
