import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pmixseg.data.cases import Layout, Tree, match
from pmixseg.data.layouts import LAYOUTS, find_cases, load_layout, search
from pmixseg.errors import InputError
from pmixseg.task import BRATS, Task

OLD = {"flair": "flair", "t1ce": "t1ce", "t1": "t1", "t2": "t2"}
NEW = {"flair": "t2f", "t1ce": "t1c", "t1": "t1n", "t2": "t2w"}


@pytest.fixture
def touch(tmp_path):
    """Empty files: recognition looks at names, not into images."""

    def make(*names: str) -> Path:
        for name in names:
            path = tmp_path / "cohort" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "cohort"

    return make


def brats_files(stem, suffixes=OLD, joint="_", ending=".nii.gz", folder=""):
    names = [*suffixes.values(), "seg"]
    return [f"{folder}{stem}/{stem}{joint}{x}{ending}" for x in names]


def check(cases, layout, ids, codes):
    assert [c.case_id for c in cases] == ids
    assert {c.layout for c in cases} == {layout}
    for case in cases:
        assert case.codes == codes and case.problem is None
        assert list(case.images) == list(BRATS.modalities)


OLD_CODES, NEW_CODES = {"NCR": 1, "ED": 2, "ET": 4}, {"NCR": 1, "ED": 2, "ET": 3}


@pytest.mark.parametrize(
    ("layout", "one", "two"),
    [
        ("brats2018", "Brats18_CBICA_AAB_1", "Brats18_2013_8_1"),
        ("brats2018", "Brats17_CBICA_AAB_1", "Brats17_TCIA_192_1"),
        ("brats2019", "BraTS19_CBICA_AAB_1", "BraTS19_TCIA01_131_1"),
        ("brats", "phantom_007", "phantom_008"),
    ],
)
def test_graded(touch, layout, one, two):
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
        (found,) = find_cases(part, BRATS)
        assert (found.case_id, found.grade, len(found.images)) == (case, "HGG", 4)


def test_2018_validation_is_flat(touch):
    (case,) = find_cases(touch(*brats_files("Brats18_CBICA_AAM_1")), BRATS)
    assert case.layout == "brats2018" and case.grade is None
    assert case.patient == "Brats18_CBICA_AAM"


def test_2020_and_its_misnamed_label(touch):
    whole = brats_files("BraTS20_Training_001", ending=".nii")
    odd = brats_files("BraTS20_Training_355", ending=".nii")[:-1]
    misnamed = "BraTS20_Training_355/W39_1998.09.19_Segm.nii"
    root = touch(*whole, *odd, misnamed)
    found = search(root, BRATS)
    ids = ["BraTS20_Training_001", "BraTS20_Training_355"]
    check(found.cases, "brats2020", ids, OLD_CODES)
    assert found.cases[1].label == root / misnamed and not found.stray
    # a repaired copy beside it is preferred, not a conflict
    touch("BraTS20_Training_355/BraTS20_Training_355_seg.nii")
    assert find_cases(root, BRATS)[1].label.name == "BraTS20_Training_355_seg.nii"


def test_2021(touch):
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
    assert {c.ignored for c in cases} == {()}


def test_2024_by_its_numbers(touch):
    root = touch(*brats_files("BraTS-GLI-00005-100", NEW, "-"))
    (case,) = find_cases(root, BRATS)
    check([case], "brats2024", ["BraTS-GLI-00005-100"], NEW_CODES)
    assert case.ignored == (4,) and case.patient == "BraTS-GLI-00005"


@pytest.mark.parametrize(
    ("values", "layout"),
    [
        ([1, 2, 3, 4], "brats2024"),  # 3 and 4: the cavity is 4
        ([1, 2, 3], "brats2023"),
        ([1, 2, 4], "brats2023"),  # may be the old coding: 4 must not be dropped unseen
        ([], "brats2023"),
    ],
)
def test_2023_and_2024_are_told_apart_by_their_labels(touch, save, values, layout):
    name = "BraTS-GLI-00005-000"
    root = touch(*brats_files(name, NEW, "-"))
    data = np.zeros((8, 8, 8), np.uint8)
    data[0, 0, : len(values)] = values
    save(root / name / f"{name}-seg.nii.gz", data)
    (case,) = find_cases(root, BRATS)
    assert case.layout == layout and case.ignored == ((4,) if layout == "brats2024" else ())


def test_paediatric_labels_are_not_guessed(touch):
    root = touch(*brats_files("BraTS-PED-00002-000", NEW, "-"))
    with pytest.raises(InputError, match="no known layout fits 5 NIfTI files such as"):
        find_cases(root, BRATS)


def dataset_json(root, **content):
    (root / "dataset.json").write_text(json.dumps(content))
    return root


MSD_CHANNELS = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
MSD_LABELS = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}


def test_msd(touch):
    files = ["imagesTr/BRATS_001.nii.gz", "labelsTr/BRATS_001.nii.gz", "imagesTr/BRATS_002.nii.gz"]
    root = touch(*files, "imagesTr/._BRATS_001.nii.gz", "imagesTs/BRATS_485.nii.gz")
    found = search(dataset_json(root, modality=MSD_CHANNELS, labels=MSD_LABELS), BRATS)
    check(found.cases, "msd", ["BRATS_001", "BRATS_002"], {"NCR": 2, "ED": 1, "ET": 3})
    one, two = found.cases
    path = root / "imagesTr/BRATS_001.nii.gz"
    assert one.images == {"flair": (path, 0), "t1ce": (path, 2), "t1": (path, 1), "t2": (path, 3)}
    assert one.label == root / "labelsTr/BRATS_001.nii.gz" and two.label is None
    assert found.stray == [root / "imagesTs/BRATS_485.nii.gz"]


NNUNET_FILES = [f"imagesTr/case_1_000{i}.nii.gz" for i in range(4)] + ["labelsTr/case_1.nii.gz"]


@pytest.mark.parametrize(
    ("content", "codes", "ignored"),
    [
        (
            {
                "channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "Flair"},
                "labels": {
                    "background": 0,
                    "whole tumor": [1, 2, 3],
                    "tumor core": [2, 3],
                    "enhancing tumor": [3],
                },
            },
            {"NCR": 2, "ED": 1, "ET": 3},
            (),
        ),
        (
            {
                "channel_names": {"0": "t1n", "1": "t1c", "2": "t2w", "3": "t2f"},
                "labels": {"background": 0, "NETC": 1, "SNFH": 2, "ET": 3, "RC": 4},
            },
            {"NCR": 1, "ED": 2, "ET": 3},
            (4,),
        ),
        (
            {
                "modality": {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"},
                "labels": {"0": "background", "1": "edema", "2": "necrosis", "3": "enhancing"},
            },
            {"NCR": 2, "ED": 1, "ET": 3},
            (),
        ),
    ],
)
def test_nnunet(touch, content, codes, ignored):
    root = dataset_json(touch(*NNUNET_FILES), **content)
    (case,) = find_cases(root, BRATS)
    check([case], "nnunet", ["case_1"], codes)
    assert case.ignored == ignored
    assert {m: p.name for m, p in case.images.items()} == {
        "t1": "case_1_0000.nii.gz",
        "t1ce": "case_1_0001.nii.gz",
        "t2": "case_1_0002.nii.gz",
        "flair": "case_1_0003.nii.gz",
    }
    assert case.label.name == "case_1.nii.gz"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"labels": MSD_LABELS}, "KeyError: 'modality'"),
        ({"modality": {"0": "CT"}, "labels": MSD_LABELS}, "none of its channels"),
        (
            {"modality": MSD_CHANNELS, "labels": {"0": "background", "1": "liver"}},
            "cannot be matched to the labels",
        ),
        ({"modality": {"0": "FLAIR"}, "labels": MSD_LABELS}, "has no pattern for"),
    ],
)
def test_dataset_json_that_does_not_fit(touch, content, sentence):
    root = dataset_json(touch("imagesTr/a.nii.gz"), **content)
    with pytest.raises(InputError, match=sentence):
        find_cases(root, BRATS, "msd")
    # recognition passes the reason on
    with pytest.raises(InputError, match=sentence):
        find_cases(root, BRATS)


def test_dataset_json_missing_or_broken(touch):
    root = touch("imagesTr/a.nii.gz")
    with pytest.raises(InputError, match=r"needs .*dataset\.json, which does not exist"):
        find_cases(root, BRATS, "nnunet")
    (root / "dataset.json").write_text("{")
    with pytest.raises(InputError, match=r"dataset\.json cannot be read as a dataset description"):
        find_cases(root, BRATS, "msd")


YAML = """
images:
  flair: "{patient}/{visit}/FLAIR.nii.gz"
  t1ce: ["{patient}/{visit}/T1_gd.nii.gz", "{patient}/{visit}/T1_post*.nii.gz"]
  t1: {file: "{patient}/{visit}/all.nii.gz", channel: 1}
  t2: {file: "{patient}/{visit}/all.nii.gz", channel: 0}
label: "{patient}/{visit}/mask.nii.gz"
case: "{patient}_{visit}"
fields: {visit: "[0-9]+"}
codes: {NCR: 10, ED: 20, ET: 30}
ignored: [5]
"""


def test_any_other_cohort_through_yaml(touch, tmp_path):
    (tmp_path / "mine.yaml").write_text(YAML)
    root = touch(
        "anna/1/FLAIR.nii", "anna/1/all.nii.gz", "anna/1/mask.nii.gz", "anna/2/T1_post_a.nii.gz",
        "anna/2/T1_gd.nii.gz", "bert/1/T1_post_b.nii", "bert/x/FLAIR.nii.gz",
        "deeper/anna/1/FLAIR.nii.gz",
    )  # fmt: skip
    found = search(root, BRATS, tmp_path / "mine.yaml")
    assert [c.case_id for c in found.cases] == ["anna_1", "anna_2", "bert_1"]
    first, second, third = found.cases
    both = root / "anna/1/all.nii.gz"
    assert first.images == {"flair": root / "anna/1/FLAIR.nii", "t1": (both, 1), "t2": (both, 0)}
    assert first.label == root / "anna/1/mask.nii.gz"
    assert second.images == {"t1ce": root / "anna/2/T1_gd.nii.gz"}
    assert third.images == {"t1ce": root / "bert/1/T1_post_b.nii"} and third.label is None
    assert {c.patient for c in found.cases} == {"anna", "bert"}
    assert first.codes == {"NCR": 10, "ED": 20, "ET": 30} and first.ignored == (5,)
    assert first.layout == "mine"
    # anchored at the root; what matches nothing, or only a pattern of lower rank, is told
    assert sorted(p.relative_to(root).as_posix() for p in found.stray) == [
        "bert/x/FLAIR.nii.gz",
        "deeper/anna/1/FLAIR.nii.gz",
    ]


def test_yaml_that_begins_from_a_preset(touch, tmp_path):
    (tmp_path / "recoded.yaml").write_text("base: brats\ncodes: {NCR: 1, ED: 2, ET: 3}\n")
    (case,) = find_cases(touch(*brats_files("case_1")), BRATS, tmp_path / "recoded.yaml")
    assert case.codes == NEW_CODES and case.layout == "recoded" and len(case.images) == 4


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a\n- b", "list is not among"),
        ("imagess: {}\n", r"\['imagess'\] is not among"),
        ("images: [", "cannot be read"),
        ("images: 3\n", "does not describe a layout"),
        ("images: {t1: '{case}.nii'}\ncodes: {ET: three}\n", "does not describe a layout"),
        ("images: {t1: 't1.nii'}\ncodes: {ET: 1}\n", "'t1.nii' lacks a field of the case's name"),
        ("base: brats2077\n", "base 'brats2077' is not among"),
        ("codes: {ET: 1}\n", "does not describe a layout"),
    ],
)
def test_yaml_that_is_wrong(tmp_path, text, sentence):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(InputError, match=sentence):
        load_layout(tmp_path / "wrong.yaml")


def test_a_guess_can_be_overridden(touch):
    root = touch(*brats_files("BraTS2021_00000"))
    assert find_cases(root, BRATS, "brats")[0].layout == "brats"
    recoded = replace(LAYOUTS["brats2021"], name="mine", codes=NEW_CODES)
    assert find_cases(root, BRATS, recoded)[0].codes == NEW_CODES
    with pytest.raises(InputError, match="layout 'brats2018' finds no case among 5 NIfTI files"):
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
    with pytest.raises(InputError, match=r"it holds no \.nii or \.nii\.gz file"):
        find_cases(tmp_path / "empty", BRATS)
    with pytest.raises(InputError, match=r"it holds no \.nii or \.nii\.gz file"):
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
    found = match(Tree.of(root), LAYOUTS["brats2021"])
    assert len(found.cases) == 120 and not found.stray
    shutil.rmtree(root)


@pytest.mark.real
def test_real_cohort(real_root):
    found = search(real_root, BRATS)
    assert len(found.cases) == 7 and not found.stray
    assert {c.layout for c in found.cases} == {"brats2021"}
    assert all(len(c.images) == 4 and c.label for c in found.cases)
