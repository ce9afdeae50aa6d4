import gzip
import io
import shutil
from dataclasses import asdict

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from pmixseg.data.cohorts.inspection import inspect_cohort
from pmixseg.data.store.store import prepare
from pmixseg.task import BRATS


def printed(inspection, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(inspection)
    return console.export_text()


def test_a_healthy_cohort_is_told_case_by_case(make_case, label):
    make_case()
    make_case("BraTS2021_00002", modalities=("flair", "t2"), labelled=False)
    root = make_case("BraTS2021_00003").label.parents[1]
    inspection = inspect_cohort(root, BRATS)
    assert inspection.problems == [] and inspection.layout == "brats2021"
    one, two, _ = inspection.cases
    counts = {n: int((label == c).sum()) for n, c in (("NCR", 1), ("ED", 2), ("ET", 4))}
    assert asdict(one) | {"scans": None} == {
        "case_id": "BraTS2021_00001",
        "modalities": BRATS.modalities,
        "labelled": True,
        "shape": (44, 40, 36),
        "spacing": (1.0, 1.0, 1.0),
        "orientation": "LPS",
        "voxels": counts,
        "ignored": {},
        "scans": None,
        "problems": (),
        "notes": (
            "case 'BraTS2021_00001': its brain is 42 × 38 × 34 mm, shorter than a whole one; if "
            "the voxel size in its headers is not that of its voxels, volumes and distances are "
            "wrong.",
        ),
    }
    assert two.modalities == ("flair", "t2") and two.voxels is None and not two.labelled
    text = printed(inspection)
    assert "3 cases: FLAIR 3, T1ce 2, T1 2, T2 3; with a label 2." in text
    assert "No problems." in text and "T1ce, T1" in text and "no label" in text
    assert f"{counts['ED']:,}" in text and "44×40×36" in text


def test_every_problem_of_a_case_is_listed_and_stray_files_are_named(make_case, save, volume):
    case = make_case()
    good = make_case("BraTS2021_00002[x]")
    root = good.label.parents[1]
    case.images["flair"].write_bytes(case.images["flair"].read_bytes()[:-50])
    save(case.images["t1"], np.zeros((44, 40, 36), np.int16))
    save(case.images["t2"], volume(3), np.diag([1.0, 1.0, 2.0, 1.0]))
    save(case.label, np.full((44, 40, 36), 7, np.uint8))
    save(root / "lost.nii.gz", volume())
    inspection = inspect_cohort(root, BRATS)
    assert len(inspection.problems) == 4 and all(
        "BraTS2021_00001'" in p for p in inspection.problems
    )
    for piece in ("truncated", "0 everywhere", "affines that differ", "label values 7"):
        assert any(piece in p for p in inspection.problems), piece
    text = printed(inspection, 200)
    assert "4 problems." in text and "BraTS2021_00002[x]" in text
    assert "1 scan file belongs to no case: lost.nii.gz." in text


def test_labels_that_no_case_has_are_named(make_case):
    """As where a whole-tumour mask was saved as the label map."""
    case = make_case()
    root = case.label.parents[1]
    assert "no label map holds" not in inspect_cohort(root, BRATS).summary()
    image = nib.load(case.label)
    whole = (np.asarray(image.dataobj) > 0).astype(np.uint8)
    nib.save(nib.Nifti1Image(whole, image.affine), case.label)
    summary = inspect_cohort(root, BRATS).summary()
    assert "no label map holds ED, ET; see that" in summary and "layout 'brats2021'" in summary


def test_a_mask_of_the_whole_tumour_among_label_maps_is_named(phantom_root, tmp_path):
    root = shutil.copytree(phantom_root, tmp_path / "cohort")
    assert "holds one label" not in inspect_cohort(root, BRATS).summary()
    path = sorted(root.rglob("*_seg.nii.gz"))[0]
    image = nib.load(path)
    whole = (np.asarray(image.dataobj) > 0).astype(np.uint8)
    nib.save(nib.Nifti1Image(whole, image.affine), path)
    name = path.name.removesuffix("_seg.nii.gz")
    told = f"1 label map holds one label alone ({name} NCR), as a mask of the whole tumour does"
    assert told in inspect_cohort(root, BRATS).summary()


def test_scans_under_two_names_are_told(make_case, tmp_path):
    """`prepare` also tells a copy whose files were packed anew."""
    one, two = make_case(), make_case("BraTS2021_00002")
    told = "1 pair of cases holds the same scan (BraTS2021_00001 and BraTS2021_00002), so one"
    assert told in inspect_cohort(one.label.parents[1], BRATS).summary()
    for path in (*two.images.values(), two.label):
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1, mtime=5))
    report = prepare([one], tmp_path / "store", BRATS, force=True, progress=False)
    assert not report.cohort
    for _ in range(2):  # also where it was prepared before
        report = prepare([two], tmp_path / "store", BRATS, force=True, progress=False)
        assert told in report.summary()


def test_a_case_that_the_layout_cannot_use(make_case):
    case = make_case()
    path = case.images["t1"]
    nib.save(nib.load(path), path.with_suffix(""))
    (facts,) = inspect_cohort(case.label.parents[1], BRATS).cases
    assert len(facts.problems) == 1 and "are both its t1" in facts.problems[0]
    assert "?" in printed(inspect_cohort(case.label.parents[1], BRATS))


def test_nothing_is_changed(make_case):
    root = make_case().label.parents[1]
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*") if p.is_file()}
    inspect_cohort(root, BRATS)
    assert before == {
        p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*") if p.is_file()
    }


@pytest.mark.real
def test_a_real_cohort_has_no_problems(real_root):
    inspection = inspect_cohort(real_root, BRATS)
    assert inspection.problems == [] and len(inspection.cases) == 7
    voxels = {c.case_id[-5:]: c.voxels for c in inspection.cases}
    assert voxels["00014"]["NCR"] == 2 and voxels["00014"]["ET"] == 2557
    assert max(v["ET"] for v in voxels.values()) == 32731
    assert {c.orientation for c in inspection.cases} == {"LPS"}


def test_rounding_makes_no_other_spacing(make_case, save, volume):
    """Headers hold float32: 4 mm from metres is 4.0000002 mm."""
    make_case()
    other = make_case("BraTS2021_00002", modalities=("t1",), labelled=False)
    affine = nib.load(other.images["t1"]).affine * np.array([[1 + 1e-6]] * 3 + [[1]])
    save(other.images["t1"], volume(2), affine)
    assert "different shapes" not in inspect_cohort(other.images["t1"].parents[1], BRATS).summary()
