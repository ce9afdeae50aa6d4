"""Scan files that the layout of a cohort does not read."""

import pytest

from pmixseg.data.cohorts.layouts import find_cases, search
from pmixseg.errors import InputError
from pmixseg.task import BRATS
from tests.data.cohorts.layout_scenes import NEW, brats_files


def problems(root, **how):
    return {c.case_id: c.problem for c in search(root, BRATS, **how).cases}


def test_half_a_cohort_of_another_layout_is_not_left_out_without_a_word(touch):
    """ET is 3 in one half and 4 in the other, so no layout may read both."""
    old, new = "BraTS2021_00003", "BraTS-GLI-00000-000"
    root = touch(*brats_files(old), *brats_files(new, NEW, "-"), *brats_files("x-000", NEW, "-"))
    assert problems(root) == {
        "BraTS-GLI-00000-000": None,
        "x-000": None,
        old: (
            f"case '{old}': {old}_flair.nii.gz and the other scans there have no names of layout "
            "'brats2023', but of layout 'brats2021'; prepare those on their own, into the same "
            "store (--layout brats2021), or go on without them (--layout brats2023)."
        ),
    }
    cohort = search(root, BRATS, "brats2023")
    assert [c.case_id for c in cohort.cases] == [new, "x-000"]
    assert cohort.remarks[0].startswith(f"5 scan files belong to no case: {old}/{old}_flair")


def test_a_folder_that_was_renamed(touch):
    one, two = "BraTS2021_00001", "BraTS2021_00002"
    moved = [f"anna/{name.split('/')[1]}" for name in brats_files(two)]
    root = touch(*brats_files(one), *moved)
    problem_of = problems(root)
    assert problem_of[one] is None
    assert f"for their folder is not named '{two}'; rename it" in problem_of["anna"]
    with pytest.raises(
        InputError, match=f"would have {two}_flair.nii.gz in a folder named '{two}'"
    ):
        find_cases(root / "anna", BRATS)


def test_a_sequence_under_another_name_is_not_taken_for_missing(touch):
    case = "BraTS2021_00001"
    root = touch(*(f.replace("_t1ce", "_T1_post_contrast") for f in brats_files(case)))
    (problem,) = problems(root).values()
    assert f"{case}_T1_post_contrast.nii.gz seems to be its t1ce" in problem
    assert problems(root, layout="brats2021") == {case: None} == problems(root, trusted=True)


def test_other_files_beside_scans_are_no_problem(touch):
    case = "BraTS2021_00001"
    more = [f"{case}/{case}_{x}.nii.gz" for x in ("t1_mask", "swi", "dwi", "flair_brainmask")]
    root = touch(*brats_files(case), *more, "atlas/T1.nii.gz", "pred/T1_seg.nii", "pred/T2_seg.nii")
    assert problems(root) == {case: None}


def test_decathlon_images_without_their_description(touch):
    with pytest.raises(InputError, match=r"need a dataset\.json beside imagesTr"):
        find_cases(touch("imagesTr/BRATS_001.nii.gz"), BRATS)
