"""Layouts that are recognised by file names."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pmixseg.data.cohorts.cases import Layout
from pmixseg.data.cohorts.layouts import LAYOUTS, find_cases, search
from pmixseg.data.cohorts.matching import Tree, match
from pmixseg.errors import InputError
from pmixseg.task import BRATS, Task
from tests.data.cohorts.layout_scenes import NEW, NEW_CODES, OLD_CODES, brats_files, check


@pytest.mark.parametrize(
    ("layout", "one", "two"),
    [
        ("brats2018", "Brats18_CBICA_AAB_1", "Brats18_2013_8_1"),
        ("brats2018", "Brats17_CBICA_AAB_1", "Brats17_TCIA_192_1"),
        ("brats2019", "BraTS19_CBICA_AAB_1", "BraTS19_TCIA01_131_1"),
        ("brats", "phantom_007", "phantom_008"),
    ],
)
def test_folders_of_grades_are_read(touch, layout, one, two):
    root = touch(*brats_files(one, folder="HGG/"), *brats_files(two, folder="LGG/"))
    cases = find_cases(root, BRATS)
    check(cases, layout, sorted([one, two]), OLD_CODES)
    assert {c.case_id: c.grade for c in cases} == {one: "HGG", two: "LGG"}
    if layout != "brats":
        assert {c.patient for c in cases} == {one[:-2], two[:-2]}
    first = next(c for c in cases if c.case_id == one)
    assert first.images["t1ce"] == root / "HGG" / one / f"{one}_t1ce.nii.gz"
    assert first.label == root / "HGG" / one / f"{one}_seg.nii.gz"


@pytest.mark.parametrize("inner", ["", "MICCAI_BraTS_2018_Data_Training/"])
def test_folders_around_and_inside_the_root_do_not_matter(touch, inner):
    case = "Brats18_CBICA_AAB_1"
    root = touch(*brats_files(case, folder=f"{inner}HGG/"))
    for part in (root, root / f"{inner}HGG", root / f"{inner}HGG" / case):
        (entry,) = find_cases(part, BRATS)
        assert (entry.case_id, entry.grade, len(entry.images)) == (case, "HGG", 4)


def test_the_path_around_a_cohort_may_hold_any_letter(touch):
    root = touch(*brats_files("BraTS2021_00000", folder="a\nb #=,\t/"))
    assert len(find_cases(next(root.iterdir()), BRATS)) == 1


def test_2018_validation_is_flat(touch):
    (case,) = find_cases(touch(*brats_files("Brats18_CBICA_AAM_1")), BRATS)
    assert case.layout == "brats2018" and case.grade is None
    assert case.patient == "Brats18_CBICA_AAM"


def test_2020_and_its_misnamed_label(touch):
    whole = brats_files("BraTS20_Training_001", ending=".nii")
    odd = brats_files("BraTS20_Training_355", ending=".nii")[:-1]
    misnamed = "BraTS20_Training_355/W39_1998.09.19_Segm.nii"
    root = touch(*whole, *odd, misnamed)
    cohort = search(root, BRATS)
    ids = ["BraTS20_Training_001", "BraTS20_Training_355"]
    check(cohort.cases, "brats2020", ids, OLD_CODES)
    assert cohort.cases[1].label == root / misnamed and not cohort.stray
    # a repaired copy beside it is preferred, not a conflict
    touch("BraTS20_Training_355/BraTS20_Training_355_seg.nii")
    assert find_cases(root, BRATS)[1].label.name == "BraTS20_Training_355_seg.nii"


def test_brats_2021_is_recognised(touch):
    root = touch(*brats_files("BraTS2021_00000"), *brats_files("BraTS2021_01666"))
    check(find_cases(root, BRATS), "brats2021", ["BraTS2021_00000", "BraTS2021_01666"], OLD_CODES)


def test_2023_time_points_share_a_patient(touch):
    ids = ["BraTS-GLI-00000-000", "BraTS-GLI-00000-001", "BraTS-GLI-00002-000"]
    root = touch(*(f for i in ids for f in brats_files(i, NEW, "-")))
    cases = find_cases(root, BRATS)
    check(cases, "brats2023", ids, NEW_CODES)
    assert [c.patient for c in cases] == ["BraTS-GLI-00000"] * 2 + ["BraTS-GLI-00002"]
    assert cases[0].images["flair"].name == "BraTS-GLI-00000-000-t2f.nii.gz"
    assert cases[0].images["t1ce"].name == "BraTS-GLI-00000-000-t1c.nii.gz"
    assert {c.doubtful for c in cases} == {(4,)}, "whether 4 is a cavity is seen in each label"


def test_brats_2024_is_recognised_by_its_numbers(touch):
    root = touch(*brats_files("BraTS-GLI-00005-100", NEW, "-"))
    (case,) = find_cases(root, BRATS)
    check([case], "brats2024", ["BraTS-GLI-00005-100"], NEW_CODES)
    assert case.ignored == (4,) and case.patient == "BraTS-GLI-00005"


def test_paediatric_labels_have_numbers_of_their_own(touch):
    root = touch(*brats_files("BraTS-PED-00002-000", NEW, "-"))
    (case,) = find_cases(root, BRATS)
    check([case], "brats-ped", ["BraTS-PED-00002-000"], {"NCR": 2, "ED": 4, "ET": 1})
    assert case.also == {3: "NCR"}, "non-enhancing tumour and cysts are core"
    assert case.coding(BRATS).table[:5].tolist() == [0, 3, 1, 1, 2]


def test_a_guess_can_be_overridden(touch):
    root = touch(*brats_files("BraTS2021_00000"))
    assert find_cases(root, BRATS, "brats")[0].layout == "brats"
    recoded = replace(LAYOUTS["brats2021"], name="mine", codes=NEW_CODES)
    assert find_cases(root, BRATS, recoded)[0].codes == NEW_CODES
    with pytest.raises(InputError, match="layout 'brats2018' finds no case among 5 scan files"):
        find_cases(root, BRATS, "brats2018")
    with pytest.raises(InputError, match="layout 'brats18' is not known; use one of brats2018, "):
        find_cases(root, BRATS, "brats18")


def test_cases_may_lack_modalities_and_label(touch):
    names = brats_files("BraTS2021_00000")
    root = touch(*names, brats_files("BraTS2021_00001")[1])
    whole, part = find_cases(root, BRATS)
    assert len(whole.images) == 4 and list(part.images) == ["t1ce"] and part.label is None
    assert part.problem is None


def test_conflicts_are_problems_of_their_case(touch):
    twin = "Brats18_A_1"
    root = touch(
        *brats_files(twin, folder="HGG/"),
        f"LGG/{twin}/{twin}_t1.nii.gz",
        *brats_files("Brats18_B_1", folder="HGG/"),
        "HGG/Brats18_B_1/Brats18_B_1_t2.nii",
        "HGG/Brats18_C_1/Brats18_C_1_seg.nii.gz",
    )
    one, two, three = find_cases(root, BRATS)
    assert "are both its t1; remove or rename one" in one.problem
    assert "are both its t2" in two.problem
    assert three.problem == (
        "case 'Brats18_C_1' has a label but no image; add an image or remove it."
    )


def test_two_files_whose_names_both_mean_one_sequence(touch):
    """Which of them is right is not known; a copy under another name is no conflict."""
    case = "BraTS2021_00001"
    root = touch(*brats_files(case), f"{case}/{case}_t1post.nii.gz")
    assert find_cases(root, BRATS)[0].problem is None
    (root / case / f"{case}_t1post.nii.gz").write_bytes(b"other")
    assert "are both its t1ce; remove or rename one" in find_cases(root, BRATS)[0].problem
    patterns = ("{case}/{case}_t1post.nii.gz", "{case}/{case}_t1ce.nii.gz")
    old = LAYOUTS["brats2021"]
    mine = replace(old, name="mine", images={**old.images, "t1ce": patterns})
    (chosen,) = find_cases(root, BRATS, mine)
    assert chosen.problem is None and chosen.images["t1ce"].name == f"{case}_t1post.nii.gz"


def test_a_task_of_other_names(touch, tmp_path):
    task = Task("two", ("adc", "t2"), ("lesion",), {"lesion": ("lesion",)})
    root = touch("p1/adc.nii.gz", "p1/t2.nii.gz", "p2/t2.nii.gz")
    with pytest.raises(InputError, match="no known layout fits"):
        find_cases(root, task)
    layout = Layout(
        "own",
        {"adc": ("{case}/adc.nii.gz",), "t2": ("{case}/t2.nii.gz",), "t1": ("{case}/t1.nii",)},
        (),
        {"lesion": 1},
    )
    assert [list(c.images) for c in find_cases(root, task, layout)] == [["adc", "t2"], ["t2"]]
    with pytest.raises(InputError, match=r"layout 'brats' has no pattern for \['adc'\]"):
        find_cases(root, task, "brats")


def test_a_task_with_fewer_modalities(touch):
    task = Task("one", ("t2",), BRATS.labels, BRATS.regions)
    (case,) = find_cases(touch(*brats_files("BraTS2021_00000")), task)
    assert list(case.images) == ["t2"]


def test_links_are_followed(touch, tmp_path):
    root = touch(*brats_files("BraTS2021_00000"))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "BraTS2021_00000").symlink_to(root / "BraTS2021_00000")
    assert len(find_cases(tmp_path / "links", BRATS)) == 1


def test_missing_empty_and_unreadable_roots(touch, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="does not exist; name the folder that holds the cases"):
        find_cases(tmp_path / "nowhere", BRATS)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is not a folder"):
        find_cases(tmp_path / "file", BRATS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"it holds no \.nii, \.nii\.gz, \.mha, \.nrrd file"):
        find_cases(tmp_path / "empty", BRATS)
    with pytest.raises(InputError, match=r"it holds no \.nii, \.nii\.gz, \.mha, \.nrrd file"):
        find_cases(tmp_path / "empty", BRATS, "brats2021")
    root = touch(*brats_files("BraTS2021_00000"), *brats_files("BraTS2021_00001"))
    closed = {root / "BraTS2021_00001"}
    original = os.scandir

    def scandir(path):
        if Path(path) in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    one, two = find_cases(root, BRATS)
    assert one.problem is None and two.case_id == "BraTS2021_00001"
    assert two.problem.endswith("cannot be read (Permission denied); check permissions.")
    closed.add(root)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\); check the folder"):
        find_cases(root, BRATS)


def test_every_file_of_a_big_tree_is_matched_quickly(touch):
    root = touch(*(f for i in range(120) for f in brats_files(f"BraTS2021_{i:05d}")))
    matches = match(Tree.of(root), LAYOUTS["brats2021"])
    assert len(matches.cases) == 120 and not matches.stray
    shutil.rmtree(root)


@pytest.mark.real
def test_a_real_cohort_is_recognised(real_root):
    cohort = search(real_root, BRATS)
    assert len(cohort.cases) == 7 and not cohort.stray
    assert {c.layout for c in cohort.cases} == {"brats2021"}
    assert all(len(c.images) == 4 and c.label for c in cohort.cases)


# ------------------------------------------------------------------- files that no layout reads


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


def test_a_folder_beside_the_description(touch):
    root = touch("Dataset001/imagesTr/a_0000.nii.gz", "Dataset001/dataset.json")
    for folder in (root, root / "Dataset001/imagesTr"):
        with pytest.raises(InputError, match=r"json lies in \S*Dataset001: name a folder that"):
            find_cases(folder, BRATS)


def test_decathlon_images_without_their_description(touch):
    with pytest.raises(InputError, match=r"need a dataset\.json beside imagesTr"):
        find_cases(touch("imagesTr/BRATS_001.nii.gz"), BRATS)
