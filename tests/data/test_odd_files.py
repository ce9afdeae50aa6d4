"""Files that are not what their name or size says, labels of other names and codings."""

import gzip
import json
import logging
import math
import struct

import nibabel as nib
import numpy as np
import pytest
from nibabel.imageglobals import logger

from pmixseg.cli import main
from pmixseg.cli.commands import console
from pmixseg.data.cohorts.inspection import inspect_cohort
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.formats.headers import BadHeader, read_header
from pmixseg.data.splits import WholeCohort
from pmixseg.data.store.store import Store, prepare
from pmixseg.errors import InputError
from pmixseg.task import BRATS
from tests.inference.tiny_models import Glance, tiny_student


def test_a_file_that_unpacks_to_far_more_than_it_promises_stops_one_case_only(make_case, tmp_path):
    bomb, good = make_case(), make_case("BraTS2021_00002")
    raw = gzip.decompress(bomb.images["t1"].read_bytes())
    bomb.images["t1"].write_bytes(gzip.compress(raw + bytes(20_000_000), 1))
    root = tmp_path / "cohort"
    (problem,) = inspect_cohort(root, BRATS).problems
    assert "it unpacks to more than" in problem and "\n" not in problem
    report = prepare(find_cases(root, BRATS), tmp_path / "store", BRATS, progress=False)
    assert list(report.failed.values()) == [problem]
    assert Store.open(tmp_path / "store").cases == (good.case_id,)
    with pytest.raises(InputError, match="it unpacks to more than"):
        tiny_student().segment(bomb.images)


@pytest.mark.parametrize("packed", [True, False])
def test_a_misnamed_file_is_read_like_one_that_is_named_right(phantom_root, tmp_path, packed):
    """On a grid of its own, so that it is resampled."""
    images = dict(find_cases(phantom_root, BRATS)[0].images)
    other = nib.load(images["t1"])
    affine = other.affine.copy()
    affine[:3, 3] += 2.0
    nib.save(nib.Nifti1Image(np.asarray(other.dataobj), affine), tmp_path / "right.nii.gz")
    raw = (tmp_path / "right.nii.gz").read_bytes()
    wrong = tmp_path / ("wrong.nii" if packed else "wrong.nii.gz")
    wrong.write_bytes(raw if packed else gzip.decompress(raw))
    model = tiny_student(backbone=Glance())
    scans = {"flair": images["flair"], "t1": tmp_path / "right.nii.gz"}
    result = model.segment(scans)
    assert np.array_equal(model.segment({**scans, "t1": wrong}).labels, result.labels)
    assert np.unique(result.labels).size > 1


@pytest.mark.parametrize("width", [20, 60])
def test_ids_are_never_cut_or_folded(make_case, tmp_path, capsys, monkeypatch, width):
    name = "BraTS2021_00001" + "_long" * 12
    case = make_case(name)
    case.images["t1"].write_bytes(b"")
    monkeypatch.setattr(console, "_width", width)
    assert main(["inspect", str(tmp_path / "cohort")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(name in line for line in lines) >= 3  # table, what is left out, the problem
    assert main(["prepare", str(tmp_path / "cohort"), str(tmp_path / "s"), "--workers=0"]) == 1
    assert name in capsys.readouterr().out


def test_the_data_module_takes_names_of_labels(make_case, tmp_path):
    case = make_case()
    root = tmp_path / "nnunet"
    for index, path in enumerate(case.images.values()):
        target = root / "imagesTr" / f"a_{index:04d}.nii.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (root / "labelsTr").mkdir()
    (root / "labelsTr" / "a.nii.gz").write_bytes(case.label.read_bytes())
    names = {"background": 0, "rubbish": 1, "water": 2, "bright": 4}
    channels = {"0": "FLAIR", "1": "T1ce", "2": "T1", "3": "T2"}
    content = {"channel_names": channels, "labels": names, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="labels"):
        BraTSDataModule(root=root, store=tmp_path / "s", split=WholeCohort()).prepare_data()
    mapping = {"NCR": "rubbish", "ED": 2, "ET": ["bright"]}
    data = BraTSDataModule(root=root, store=tmp_path / "s", labels=mapping, split=WholeCohort())
    data.prepare_data()
    expected = np.searchsorted([0, 1, 2, 4], nib.load(case.label).get_fdata())
    assert np.array_equal(Store.open(tmp_path / "s").read("a").native_label(), expected)


@pytest.mark.parametrize("name", ["a[bold]b", "[/x]", "long " * 30])
def test_names_are_printed_as_they_are(make_case, tmp_path, capsys, name):
    make_case()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    root = (tmp_path / "cohort").rename(tmp_path / name)
    assert main(["prepare", str(root), str(tmp_path / f"{name}s"), "--workers=0"]) == 0
    assert f"{tmp_path / name}s: 1 prepared" in capsys.readouterr().out
    assert main(["inspect", str(root)]) == 0
    assert f"{root} · layout" in capsys.readouterr().out
    assert main(["compare", "--a", str(root), "--b", "x"]) == 1
    assert str(root) in capsys.readouterr().err
    assert (
        main(["phantom", str(tmp_path / "p" / name), "--cases=1", "--spacing=6", "--workers=0"])
        == 0
    )
    assert f"1 synthetic case in {tmp_path / 'p' / name}: no patient" in capsys.readouterr().out


def test_a_link_to_a_folder_around_it_is_not_followed(make_case, tmp_path):
    case = make_case()
    root = tmp_path / "cohort"
    (root / "self").symlink_to(root)
    (case.label.parent / "up").symlink_to(tmp_path)
    (alone,) = find_cases(root, BRATS)
    assert alone.case_id == case.case_id and alone.problem is None


def test_a_library_says_nothing_beside_the_sentence(make_case, monkeypatch, capfd):
    """nibabel logs what it does not like; where a log has no handler, Python prints it."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logger, "handlers", [])
    raw = bytearray(gzip.decompress(make_case().images["t2"].read_bytes()))
    struct.pack_into("<f", raw, 108, math.nan)
    with pytest.raises(BadHeader, match="vox_offset nan"):
        read_header(bytes(raw))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("turn", [np.diag([-1, 1, 1]), np.diag([-1, -1, 1]), np.eye(3)[[1, 0, 2]]])
def test_a_header_that_says_in_two_ways_how_it_lies_is_refused(make_case, turn):
    """Which of the two is read differs between programs: one would mirror the case."""
    case = make_case()
    image = nib.load(case.images["t1"])
    other = image.affine.copy()
    other[:3, :3] = turn @ other[:3, :3]
    image.set_sform(image.affine, 1)
    image.set_qform(other, 1)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), case.images["t1"])
    (problem,) = inspect_cohort(case.label.parents[1], BRATS).problems
    assert "its qform and sform turn the volume in different ways" in problem
    assert "--force guesses none; set the code of the wrong one to 0" in problem
    image.set_qform(other, 0)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), case.images["t1"])
    assert inspect_cohort(case.label.parents[1], BRATS).problems == []


@pytest.mark.parametrize("code", [0, 1])
def test_a_header_that_tells_two_sizes_of_its_voxels_is_refused(make_case, code):
    """ITK goes by pixdim, nibabel by the sform: volumes would differ by a factor of 3.4."""
    case = make_case()
    image = nib.load(case.images["t1"])
    size = image.header.get_zooms()[0]
    image.header["pixdim"][1:4], image.header["qform_code"] = size / 1.51, code
    path = case.images["t1"]
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), path)
    (problem,) = inspect_cohort(case.label.parents[1], BRATS).problems
    assert f"its sform {size:.4g} x {size:.4g} x {size:.4g}, and programs differ" in problem
    for fair in (size / 1.49, 0):  # an affine registration left in the sform, or nothing said
        image.header["pixdim"][1:4] = fair
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), path)
        assert inspect_cohort(case.label.parents[1], BRATS).problems == []


def test_another_place_or_a_small_angle_in_the_qform_is_no_conflict():
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), None)
    image.set_sform(np.eye(4), 1)
    other = np.eye(4)
    other[:3, 3] = 40
    angle = math.radians(50)
    other[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    image.set_qform(other, 1)
    assert np.array_equal(read_header(image.to_bytes()).affine, np.eye(4))


def dashed(make_case, save, tmp_path, name, label, codes):
    """A case with names as of 2023, its label in the given codes."""
    case = make_case()
    folder = tmp_path / "new" / name
    for modality, suffix in {"flair": "t2f", "t1ce": "t1c", "t1": "t1n", "t2": "t2w"}.items():
        image = nib.load(case.images[modality])
        save(folder / f"{name}-{suffix}.nii.gz", np.asarray(image.dataobj), image.affine)
    table = np.zeros(5, np.uint8)
    for old, new in codes.items():
        table[old] = new
    save(folder / f"{name}-seg.nii.gz", table[label])
    return name


NEW, OLD = {1: 1, 2: 2, 4: 3}, {1: 1, 2: 2, 4: 4}


def test_mixed_codings_are_judged_case_by_case(make_case, save, tmp_path, label):
    ids = [
        dashed(make_case, save, tmp_path, f"BraTS-GLI-{k:05d}-000", label, NEW if k % 2 else OLD)
        for k in range(4)
    ]
    root = tmp_path / "new"
    inspection = inspect_cohort(root, BRATS)
    report = prepare(find_cases(root, BRATS), tmp_path / "store", BRATS, progress=False)
    assert sorted(report.failed) == [ids[0], ids[2]] and report.prepared == [ids[1], ids[3]]
    assert inspection.problems == list(report.failed.values())
    for sentence in inspection.problems:
        assert "holds the label value 4 and no 3" in sentence and "--layout brats2024" in sentence
    stored = Store.open(tmp_path / "store").read(ids[1]).native_label()
    assert (stored == 3).sum() == (label == 4).sum() > 0


def test_a_cavity_is_ignored_counted_and_shown(make_case, save, tmp_path, label):
    both = label.copy()
    both[30:34, 30:34, 30:33] = 3  # 48 voxels of cavity, coded 4 below
    for k in range(3):
        dashed(make_case, save, tmp_path, f"BraTS-GLI-{k:05d}-000", both, {**NEW, 3: 4})
    root = tmp_path / "new"
    line = "label value 4 is ignored, it becomes background: 144 voxels in 3 cases"
    inspection = inspect_cohort(root, BRATS)
    assert inspection.problems == [] and line in inspection.summary()
    for _ in range(2):  # also of what is up to date
        report = prepare(find_cases(root, BRATS), tmp_path / "store", BRATS, progress=False)
        assert not report.failed and line in report.summary()


def test_scans_after_treatment_have_cavities_without_a_doubt(make_case, save, tmp_path, label):
    name = dashed(make_case, save, tmp_path, "BraTS-GLI-00001-101", label, OLD)
    report = prepare(find_cases(tmp_path / "new", BRATS), tmp_path / "s", BRATS, progress=False)
    assert report.prepared == [name] and report.ignored == {name: {4: (label == 4).sum()}}


def test_a_named_layout_ends_the_doubt(make_case, save, tmp_path, label):
    dashed(make_case, save, tmp_path, "BraTS-GLI-00001-000", label, OLD)
    cases = find_cases(tmp_path / "new", BRATS, "brats2024")
    assert not prepare(cases, tmp_path / "s", BRATS, progress=False).failed
    cases = find_cases(tmp_path / "new", BRATS, "brats2023")
    report = prepare(cases, tmp_path / "s", BRATS, progress=False)
    assert "label values 4, but its layout knows 0, 1, 2, 3" in next(iter(report.failed.values()))


def test_a_label_map_of_a_channel_per_class_is_told_what_to_do(make_case, save, label):
    case = make_case()
    save(case.label, np.stack([label == code for code in (1, 2, 4)], -1).astype(np.uint8))
    (problem,) = inspect_cohort(case.label.parents[1], BRATS).problems
    assert problem.endswith("is needed; make one map of numbers of its channels.")
