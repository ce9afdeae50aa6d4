"""What no patient has is refused or told: sizes, labels that lie elsewhere, exchanged sequences."""

import shutil

import nibabel as nib
import numpy as np
import pytest

from pmixseg.data.cohorts.inspection import inspect_cohort
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.formats.outputs import nifti_image
from pmixseg.data.phantom.cohort import PhantomSettings, make_case
from pmixseg.data.phantom.contrast import Scanner
from pmixseg.data.scans.canonical import canonicalise
from pmixseg.data.scans.plausibility import judge
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
    assert len(notes) == 1 and "mm, shorter than a whole one" in notes[0]
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


@pytest.mark.parametrize(
    ("spacing", "private", "seed", "index"),
    # Moved, they share 1.32 to 1.7 times the information, but of little: 4 to 30 ml at 5 mm.
    # In the last, sequences have smooth signals of their own: much is shared wherever a label lies.
    [(5, 0, 1, 14), (5, 0, 6, 1), (5, 0, 10, 3), (5, 0, 23, 13), (4, 1, 4000, 5)],
)
def test_a_faint_tumour_is_not_taken_for_a_label_elsewhere(tmp_path, spacing, private, seed, index):
    settings = PhantomSettings(spacing=spacing, scanner=Scanner(private_signal=private))
    made = make_case(seed, index, settings)
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
        ((slice(None, None, 39),) * 3, 90, "longer than any; look for voxels outside of it"),
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


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ("flair", "t1", "t1ce resembles flair more than t1,"),
        ("flair", "t1ce", "t1 resembles flair more than t1ce,"),
    ],
)
def test_a_sequence_in_the_place_of_a_t1_is_told(phantom_root, one, other, words):
    """T1 and T1ce resemble each other more than any other sequence."""
    scans, _ = scans_of(phantom_root, 0)
    scans[one], scans[other] = scans[other], scans[one]
    told = judge(canonicalise(scans, None, BRATS), BRATS).remarks
    assert any(text.startswith(words) for text in told)
    without = {m: scan for m, scan in scans.items() if m in ("t1", "t1ce", one)}
    told = judge(canonicalise(without, None, BRATS), BRATS).remarks
    assert any(text.startswith(words) for text in told)


@pytest.mark.parametrize(("given", "name"), [("t2", "t1"), ("t2", "t1ce"), ("t1", "t2")])
def test_a_scan_whose_fluid_is_not_that_of_its_name_is_told(phantom_root, given, name):
    scans, _ = scans_of(phantom_root, 0)
    (alone,) = judge(canonicalise({name: scans[given]}, None, BRATS), BRATS).remarks
    assert alone.startswith(f"{name} shows fluid {'bright' if given == 't2' else 'dark'}")
    together = canonicalise({name: scans[given], "flair": scans["flair"]}, None, BRATS)
    assert alone in judge(together, BRATS).remarks


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ((1, 0, 2), "like its mirror image back-front rather than left-right"),
        ((2, 1, 0), "like its mirror image down-up rather than left-right"),
        ((0, 2, 1), "longer down-up than back-front"),
        ((1, 2, 0), "like its mirror image down-up rather than left-right"),
    ],
)
def test_arrays_that_were_turned_under_their_headers_are_told(phantom_root, axes, words):
    """As where one program counts the axes of an array from the other end."""
    scans, _ = scans_of(phantom_root)
    turned = {
        m: nib.Nifti1Image(np.asarray(i.dataobj).transpose(axes), i.affine)
        for m, i in scans.items()
    }
    (told,) = judge(canonicalise(turned, None, BRATS), BRATS).remarks
    assert words in told


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ((1,), "back to front"),
        ((0, 1), "back to front"),  # left and posterior counted as right and anterior
        ((2,), "upside down"),
        ((1, 2), "upside down and back to front"),
    ],
)
def test_brains_that_are_upside_down_or_back_to_front_are_told(phantom_root, axes, words):
    """As where an array of LPS is saved as RAS; left and right alone look like each other."""
    scans, _ = scans_of(phantom_root)
    flipped = {
        m: nib.Nifti1Image(np.flip(np.asarray(i.dataobj), axes), i.affine) for m, i in scans.items()
    }
    (told,) = judge(canonicalise(flipped, None, BRATS), BRATS).remarks
    assert told.startswith(f"its brain is {words}, as if")


def test_a_label_that_a_spacing_leaves_nothing_of_is_told(phantom_root):
    scans, label = scans_of(phantom_root)
    one = np.zeros(label.shape, np.uint8)
    one[tuple(np.argwhere(np.asarray(label.dataobj))[0])] = 3
    case = canonicalise(scans, nib.Nifti1Image(one, label.affine), BRATS, spacing=(20.0,) * 3)
    assert not case.label.any()
    assert "its label is too small for voxels of this spacing" in judge(case, BRATS).remarks


def test_a_result_of_this_package_in_the_place_of_a_label_is_told(phantom_root, tmp_path):
    scans, label = scans_of(phantom_root)
    case = written(scans, label, tmp_path)
    rewritten = nifti_image(np.asarray(label.dataobj), label.affine)
    nib.save(rewritten, case.label)
    (note,) = inspect_cohort(tmp_path / "cohort", BRATS).cases[0].notes
    assert "its label was written by pmixseg: a result, and no annotation" in note
    assert prepare([case], tmp_path / "st", BRATS, progress=False).notes[case.case_id] == (note,)


def noisy(flair):
    noise = np.random.default_rng(0).normal(0, 0.1 * flair[flair > 0].std(), flair.shape)
    return np.maximum(flair + noise, 1)


@pytest.mark.parametrize("change", [np.sqrt, lambda x: 3 * x + 5, np.round, noisy], ids="abcd")
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


def empty(scan):
    scan[:, :, 1::2] = 0
    return scan


def noise(scan):
    middle = scan[:, :, scan.shape[2] // 2]
    middle[middle > 0] = np.random.default_rng(0).permutation(middle[middle > 0])
    return scan


def twice(scan):
    scan[1::2] = scan[0 : len(scan) // 2 * 2 : 2]
    return scan


def wrapped(scan):
    scale = 256 / np.quantile(scan[scan > 0], 0.95)
    return (scan * scale).astype(np.uint16).astype(np.uint8)


def half(scan):
    scan[: len(scan) // 2] = 0
    return scan


def inverted(scan):
    return np.where(scan > 0, scan.max() + 1 - scan, 0)


@pytest.mark.parametrize(
    ("change", "which", "words"),
    [
        (empty, ["t1"], "t1 has slices down-up that resemble no neighbour"),
        (noise, ["t1"], "t1 has slices down-up that resemble no neighbour"),
        (twice, ["t2"], "t2 shows 50% of its slices left-right twice"),
        (wrapped, ["flair"], "flair leaps between neighbouring voxels by its whole range of 256"),
        (half, ["t2"], "t2 shows 51% of the brain that other scans show"),
        (half, BRATS.modalities, "its brain is 72 × 168 × 144 mm, shorter than"),
        (inverted, BRATS.modalities, "see that their names are right, and dark and bright"),
    ],
)
def test_what_is_wrong_with_voxels_is_told(phantom_root, change, which, words):
    scans, _ = scans_of(phantom_root, 0)
    for name in which:
        odd = change(np.asarray(scans[name].dataobj).copy())
        scans[name] = nib.Nifti1Image(odd.astype(np.float32), scans[name].affine)
    verdict = judge(canonicalise(scans, None, BRATS), BRATS)
    assert not verdict.findings
    assert len(verdict.remarks) == 1 and words in verdict.remarks[0]


def test_a_scan_of_another_patient_is_told(phantom_root):
    """Of the same atlas space: no move would make it fit."""
    (scans, _), (others, _) = scans_of(phantom_root, 0), scans_of(phantom_root, 2)
    verdict = judge(canonicalise({**scans, "t2": others["t2"]}, None, BRATS), BRATS)
    assert not verdict.findings and len(verdict.remarks) == 1
    assert "t2 shows another brain than flair and t1ce and t1, as of another" in verdict.remarks[0]


def noise(values):
    drawn = np.random.default_rng(0).normal(100, 20, values.shape)
    return np.where(values != 0, np.abs(drawn) + 1, 0)


def uneven(values):
    return values * np.geomspace(1, 8, values.shape[1])[:, None]


def inverted(values):
    return np.where(values != 0, values.max() + 1 - values, 0)


@pytest.mark.parametrize(
    ("change", "modality", "words"),
    [
        (noise, "t1", "t1 is noise, for its voxels tell nothing about those beside them"),
        (noise, "flair", "flair is noise, for its voxels tell nothing about those beside them"),
        (uneven, "t1", "times as bright at one end of the brain as at the other; correct its bias"),
        (inverted, "t1", "t1 and t1ce are each bright where the other is dark, as if one were inv"),
        (inverted, "t1ce", "t1 and t1ce are each bright where the other is dark, as if one were i"),
    ],
)
def test_scans_that_are_not_what_a_scanner_gives(phantom_root, change, modality, words):
    scans, _ = scans_of(phantom_root)
    values = np.asarray(scans[modality].dataobj).astype(np.float32)
    scans[modality] = nib.Nifti1Image(change(values), scans[modality].affine)
    alone = [{modality: scans[modality]}] if change is not inverted else []
    for shown in (scans, *alone):
        verdict = judge(canonicalise(shown, None, BRATS), BRATS)
        (told,) = verdict.findings + verdict.remarks
        assert words in told
