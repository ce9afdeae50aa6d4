"""Cohorts that a file describes: dataset.json of MSD and nnU-Net, and one's own YAML."""

import pytest

from pmixseg.data.cohorts.layouts import find_cases, load_layout, search
from pmixseg.errors import InputError
from pmixseg.task import BRATS
from tests.data.cohorts.layout_scenes import NEW_CODES, brats_files, check, describe

MSD_CHANNELS = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
MSD_LABELS = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}


def test_dataset_json_of_msd_describes_the_cohort(touch):
    files = ["imagesTr/BRATS_001.nii.gz", "labelsTr/BRATS_001.nii.gz", "imagesTr/BRATS_002.nii.gz"]
    root = touch(*files, "imagesTr/._BRATS_001.nii.gz", "imagesTs/BRATS_485.nii.gz")
    cohort = search(describe(root, modality=MSD_CHANNELS, labels=MSD_LABELS), BRATS)
    check(cohort.cases, "msd", ["BRATS_001", "BRATS_002"], {"NCR": 2, "ED": 1, "ET": 3})
    one, two = cohort.cases
    path = root / "imagesTr/BRATS_001.nii.gz"
    assert one.images == {"flair": (path, 0), "t1ce": (path, 2), "t1": (path, 1), "t2": (path, 3)}
    assert one.label == root / "labelsTr/BRATS_001.nii.gz" and two.label is None
    assert cohort.stray == [root / "imagesTs/BRATS_485.nii.gz"]


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
def test_dataset_json_of_nnunet_describes_the_cohort(touch, content, codes, ignored):
    root = describe(touch(*NNUNET_FILES), **content)
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
        ({"labels": MSD_LABELS}, "neither 'channel_names' nor 'modality'"),
        ({"modality": {"0": "CT"}, "labels": MSD_LABELS}, "none of its channels"),
        (
            {"modality": MSD_CHANNELS, "labels": {"0": "background", "1": "liver"}},
            "cannot be matched to the labels",
        ),
        ({"modality": {"0": "FLAIR"}, "labels": MSD_LABELS}, "has no pattern for"),
    ],
)
def test_dataset_json_that_does_not_fit(touch, content, sentence):
    root = describe(touch("imagesTr/a.nii.gz"), **content)
    with pytest.raises(InputError, match=sentence):
        find_cases(root, BRATS, "msd")
    # recognition passes the reason on
    with pytest.raises(InputError, match=sentence):
        find_cases(root, BRATS)


def test_channels_that_are_told_by_their_names_as_files_are(touch):
    names = {"0": "T1 post contrast", "1": "T1-weighted", "2": "ax T2 FLAIR", "3": "T2 (TSE)"}
    labels = {"background": 0, "NETC": 1, "SNFH": 2, "ET": 3}
    root = describe(touch(*NNUNET_FILES), channel_names=names, labels=labels)
    (case,) = find_cases(root, BRATS)
    numbers = {m: int(p.name[-8]) for m, p in case.images.items()}
    assert numbers == {"t1ce": 0, "t1": 1, "flair": 2, "t2": 3}
    describe(root, channel_names={**names, "4": "T1 (bias)"}, labels=labels)
    with pytest.raises(InputError, match=r"more than one of its channels .* is t1; write a layout"):
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
    cohort = search(root, BRATS, tmp_path / "mine.yaml")
    assert [c.case_id for c in cohort.cases] == ["anna_1", "anna_2", "bert_1"]
    first, second, third = cohort.cases
    both = root / "anna/1/all.nii.gz"
    assert first.images == {"flair": root / "anna/1/FLAIR.nii", "t1": (both, 1), "t2": (both, 0)}
    assert first.label == root / "anna/1/mask.nii.gz"
    assert second.images == {"t1ce": root / "anna/2/T1_gd.nii.gz"}
    assert third.images == {"t1ce": root / "bert/1/T1_post_b.nii"} and third.label is None
    assert {c.patient for c in cohort.cases} == {"anna", "bert"}
    assert first.codes == {"NCR": 10, "ED": 20, "ET": 30} and first.ignored == (5,)
    assert first.layout == "mine"
    # anchored at the root; what matches nothing, or only a pattern of lower rank, is told
    assert sorted(p.relative_to(root).as_posix() for p in cohort.stray) == [
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
        ("images: 3\n", "wrong.yaml: Layout: images is 3; give a mapping"),
        ("images: {t1: '{case}.nii'}\ncodes: {ET: three}\n", "codes holds 'three'; give a whole"),
        ("images: {t1: 't1.nii'}\ncodes: {ET: 1}\n", "'t1.nii' lacks a field of the case's name"),
        ("base: brats2077\n", "base 'brats2077' is not among"),
        ("codes: {ET: 1}\n", "does not describe a layout"),
        ("images: {t1: {path: '{case}.nii'}}\n", "images holds .* {file: PATH, channel: NUMBER}"),
        ("images: {t1: [1]}\n", "images holds 1; give PATH"),
        ("images: {t1: {file: 't1.nii', channel: x}}\n", "images holds .*'x'.*; give PATH"),
        ("base: brats\ncodes: {ET: 4.7}\n", r"codes holds 4\.7; give a whole number there"),
        ("base: brats\nalso: {'6': ET}\n", "also holds '6'; give a whole number there"),
        ("base: brats\nignored: '45'\n", "ignored is '45'; give a list"),
        ("base: brats\nignored: 4\n", "ignored is 4; give a list"),
        ("base: brats\nignored: [true]\n", "ignored holds True; give a whole number there"),
        ("base: brats\nanchored: 'no'\n", "anchored is 'no'; give true or false"),
    ],
)
def test_wrong_yaml_is_refused_in_a_sentence(tmp_path, text, sentence):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(InputError, match=sentence):
        load_layout(tmp_path / "wrong.yaml")


def test_a_field_that_is_no_expression(touch, tmp_path):
    (tmp_path / "odd.yaml").write_text("base: brats\nfields: {case: '('}\n")
    with pytest.raises(InputError, match=r"with the fields {'case': '\('} cannot be read"):
        find_cases(touch("a_t1.nii"), BRATS, tmp_path / "odd.yaml")
