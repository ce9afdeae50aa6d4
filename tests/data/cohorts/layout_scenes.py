"""File names of BraTS cases, and what the search must make of them."""

import json

from pmixseg.task import BRATS

OLD = {"flair": "flair", "t1ce": "t1ce", "t1": "t1", "t2": "t2"}
NEW = {"flair": "t2f", "t1ce": "t1c", "t1": "t1n", "t2": "t2w"}

OLD_CODES, NEW_CODES = {"NCR": 1, "ED": 2, "ET": 4}, {"NCR": 1, "ED": 2, "ET": 3}


def brats_files(stem, suffixes=OLD, joint="_", ending=".nii.gz", folder=""):
    names = [*suffixes.values(), "seg"]
    return [f"{folder}{stem}/{stem}{joint}{x}{ending}" for x in names]


def describe(root, **content):
    """Write the ``dataset.json`` of a cohort."""
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def check(cases, layout, ids, codes):
    assert [c.case_id for c in cases] == ids
    assert {c.layout for c in cases} == {layout}
    for case in cases:
        assert case.codes == codes and case.problem is None
        assert list(case.images) == list(BRATS.modalities)
