"""What no patient has is refused or told: sizes, labels that lie elsewhere, exchanged sequences."""

import shutil

import nibabel as nib
import numpy as np
import pytest

from pmixseg.data.cohorts.inspection import inspect_cohort
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.phantom.cohort import PhantomSettings, make_case
from pmixseg.data.store.store import prepare
from pmixseg.task import BRATS
from tests.data.test_one_judge import everyone, rewrite
from tests.inference.tiny_models import tiny_student


def scans_of(root, place=2):
    case = find_cases(root, BRATS)[place]
    return {m: nib.load(p) for m, p in case.images.items()}, nib.load(case.label)


def written(images, label, folder, name="BraTS2021_00001"):
    own = folder / "cohort" / name
    own.mkdir(parents=True)
    for role, image in {**images, "seg": label}.items():
        nib.save(image, own / f"{name}_{role}.nii.gz")
    (case,) = find_cases(folder / "cohort", BRATS)
    return case


@pytest.mark.parametrize("factor", [0.1, 1 / 25.4])
def test_centimetres_or_inches_that_are_called_millimetres(phantom_root, tmp_path, factor):
    """A volume would be a thousandth of what it is."""
    scans, label = scans_of(phantom_root)
    scale = np.diag([factor] * 3 + [1])
    small = {m: nib.Nifti1Image(i.dataobj, scale @ i.affine) for m, i in scans.items()}
    case = written(small, nib.Nifti1Image(label.dataobj, scale @ label.affine), tmp_path)
    problems, refused, segmented = everyone(case, tmp_path)
    assert refused is not None and "so the voxel size in its headers is not in mm" in refused
    assert problems == [refused] and segmented == refused


def test_a_header_that_lost_its_voxel_size_is_told(phantom_root, tmp_path):
    scans, label = scans_of(phantom_root)
    bare = {m: nib.Nifti1Image(i.dataobj, np.eye(4)) for m, i in scans.items()}
    case = written(bare, nib.Nifti1Image(label.dataobj, np.eye(4)), tmp_path)
    notes = inspect_cohort(tmp_path / "cohort", BRATS).cases[0].notes
    assert len(notes) == 1 and "mm long, shorter than a whole one" in notes[0]
    first, again = (prepare([case], tmp_path / "store", BRATS, progress=False) for _ in range(2))
    assert first.notes == again.notes == {case.case_id: notes}  # also of a case that is kept
    with pytest.warns(UserWarning, match="shorter than a whole one"):
        tiny_student().segment(case.images)


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (lambda x: x[::-1], "mirrored left-right it would fit"),
        (lambda x: x[::-1, ::-1], "mirrored left-right and back-front it would fit"),
        (lambda x: x.transpose(1, 0, 2), "the axes left-right and back-front exchanged"),
        (lambda x: np.roll(x, -4, 1), "shifted 24 mm back-front it would fit"),
    ],
    ids=["mirrored", "half a turn", "exchanged", "shifted"],
)
def test_a_label_whose_axes_are_not_those_of_the_scans(phantom_root, tmp_path, turn, words):
    """As when one program's array is saved with another's header; the affines agree."""
    scans, label = scans_of(phantom_root, 0)
    wrong = nib.Nifti1Image(turn(np.asarray(label.dataobj)).copy(), label.affine)
    case = written(scans, wrong, tmp_path)
    problems = inspect_cohort(tmp_path / "cohort", BRATS).problems
    report = prepare([case], tmp_path / "store", BRATS, progress=False)
    assert list(report.failed.values()) == problems
    assert "its label does not seem to lie on the scans" in problems[0] and words in problems[0]


@pytest.mark.parametrize(("seed", "index"), [(1, 14), (6, 1), (10, 3), (23, 13)])
def test_a_faint_tumour_is_not_taken_for_a_label_elsewhere(tmp_path, seed, index):
    """Moved, they share 1.32 to 1.7 times the information, but of little: 4 to 30 ml at 5 mm."""
    made = make_case(seed, index, PhantomSettings(spacing=5.0))
    scans = {m: nib.Nifti1Image(values, made.affine) for m, values in made.images.items()}
    codes = np.array([0, 1, 2, 4], np.uint8)[made.label]
    written(scans, nib.Nifti1Image(codes, made.affine), tmp_path)
    (case,) = inspect_cohort(tmp_path / "cohort", BRATS).cases
    assert not case.problems


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({1: 2, 2: 1}, "NCR and ED look as if each were the other (oedema surrounds the tumour)"),
        ({2: 4, 4: 2}, "ET and ED look as if each were the other (oedema surrounds the tumour)"),
        ({1: 4, 4: 1}, "NCR and ET look as if each were the other (what enhances is bright in T1"),
        ({1: 0, 2: 0, 4: 0}, "its label marks nothing"),
    ],
)
def test_labels_that_are_exchanged_or_empty_are_told(phantom_root, numbers, words, tmp_path):
    scans, label = scans_of(phantom_root, 3)
    values = np.asarray(label.dataobj)
    other = np.select([values == n for n in numbers], list(numbers.values()), values.astype(int))
    written(scans, nib.Nifti1Image(other.astype(np.uint8), label.affine), tmp_path)
    (case,) = inspect_cohort(tmp_path / "cohort", BRATS).cases
    assert not case.problems and len(case.notes) == 1 and words in case.notes[0]


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ((slice(None, None, 39),) * 3, 90, "longer than a brain; look for voxels outside of it"),
        ((20, 20, 13), 30_000, "t1 has a voxel more than 50 standard deviations from its mean"),
    ],
)
def test_a_single_voxel_that_is_no_tissue_is_told(phantom_root, tmp_path, where, value, words):
    scans, label = scans_of(phantom_root)
    odd = np.asarray(scans["t1"].dataobj).astype(np.float32)
    odd[where] = value
    written({**scans, "t1": nib.Nifti1Image(odd, label.affine)}, label, tmp_path)
    (case,) = inspect_cohort(tmp_path / "cohort", BRATS).cases
    assert not case.problems and len(case.notes) == 1 and words in case.notes[0]


def test_masks_of_the_whole_tumour_are_told(phantom_root, tmp_path):
    shutil.copytree(phantom_root, tmp_path / "cohort")
    for path in (tmp_path / "cohort").rglob("*_seg.nii.gz"):
        rewrite(path, lambda x: (x > 0).astype(np.uint8))
    summary = inspect_cohort(tmp_path / "cohort", BRATS).summary()
    assert "no label map holds ED, ET; see that" in summary


def test_sequences_of_tumours_that_do_not_enhance_are_not_taken_for_exchanged(phantom_root):
    inspection = inspect_cohort(phantom_root, BRATS)
    assert not any(case.notes or case.problems for case in inspection.cases)


@pytest.mark.parametrize(("one", "other"), [("flair", "t2"), ("t1", "t1ce")])
def test_exchanged_sequences_are_told(phantom_root, tmp_path, one, other):
    scans, label = scans_of(phantom_root, 0)
    scans[one], scans[other] = scans[other], scans[one]
    case = written(scans, label, tmp_path)
    (note,) = inspect_cohort(tmp_path / "cohort", BRATS).cases[0].notes
    assert f"{one} and {other} look as if each were the other" in note
    report = prepare([case], tmp_path / "store", BRATS, progress=False)
    assert report.notes == {case.case_id: (note,)}
    with pytest.warns(UserWarning, match="look as if each were the other"):
        tiny_student().segment(case.images)


@pytest.mark.parametrize("change", [np.sqrt, lambda x: 3 * x + 5, np.round], ids="abc")
def test_one_scan_saved_again_in_other_intensities(phantom_root, tmp_path, change):
    scans, label = scans_of(phantom_root)
    flair = np.asarray(scans["flair"].dataobj).astype(np.float32)
    again = np.where(flair > 0, change(flair), 0).astype(np.float32)
    case = written({**scans, "t2": nib.Nifti1Image(again, label.affine)}, label, tmp_path)
    problems, refused, segmented = everyone(case, tmp_path)
    assert refused is not None and "flair and t2 are one and the same scan" in refused
    assert problems == [refused] and segmented == refused


def test_intensities_whose_squares_vanish_are_refused(make_case, tmp_path):
    """A z-score of them was wrong without a word."""
    case = make_case()
    rewrite(case.images["t1"], lambda x: x.astype(np.float32) * np.float32(1e-30))
    problems, refused, segmented = everyone(case, tmp_path)
    assert refused is not None and "too small for an MR signal" in refused
    assert problems == [refused] and segmented == refused
