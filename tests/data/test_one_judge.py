"""One judge of a case: `inspect`, `prepare` and `segment` find the same and say the same."""

import gzip
import re
import shutil
import struct

import nibabel as nib
import numpy as np
import pytest

from pmixseg.cli import main
from pmixseg.data.cohorts.inspection import inspect_cohort
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.store.store import Store, prepare
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.scans import SegmentSettings
from pmixseg.task import BRATS
from tests.inference.test_refusals import with_head
from tests.inference.tiny_models import tiny_student


def rewrite(path, change, affine=None, unit=None):
    image = nib.load(path)
    data = change(np.asarray(image.dataobj))
    made = nib.Nifti1Image(data, image.affine if affine is None else affine)
    if unit is not None:
        made.header.set_xyzt_units(unit)
    nib.save(made, path)


def patch(path, kind, offset, *values):
    raw = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into(kind, raw, offset, *values)
    path.write_bytes(gzip.compress(bytes(raw)))


def everyone(case, folder, **settings):
    """What inspect, prepare and segment say about a case, without what names its command."""
    root = folder / "cohort"
    problems = [p for p in inspect_cohort(root, BRATS).problems if case.case_id in p]
    report = prepare(find_cases(root, BRATS), folder / "store", BRATS, progress=False, **settings)
    refused = report.failed.get(case.case_id)
    try:
        tiny_student().segment(case.images, name=case.case_id)
        segmented = None
    except InputError as error:
        segmented = str(error)
    return problems, refused, segmented


BACKGROUND = {
    "noise": lambda x: np.where(x == 0, np.random.default_rng(0).normal(0, 1e-4, x.shape), x),
    "minus 1024": lambda x: np.where(x == 0, -1024, x),
    "z-score of the whole volume": lambda x: (x - x.mean()) / x.std(),
    "one more everywhere": lambda x: x + 1,
    "ringing around the brain": lambda x: np.where(
        (x == 0) & (np.indices(x.shape).sum(0) % 3 > 0) & (np.indices(x.shape)[0] > 0), 1e-3, x
    ),
}


@pytest.mark.parametrize("spacing", [None, (2.0, 2.0, 2.0)], ids=["native", "resampled"])
@pytest.mark.parametrize("kind", BACKGROUND)
def test_a_background_that_is_not_0(make_case, tmp_path, kind, spacing):
    case, good = make_case(), make_case("BraTS2021_00002")
    for path in case.images.values():
        rewrite(path, lambda x: BACKGROUND[kind](x.astype(np.float32)).astype(np.float32))
    problems, refused, segmented = everyone(case, tmp_path, spacing=spacing)
    assert refused is not None and "so its background is not 0" in refused
    assert problems == [refused] and segmented == refused
    assert "--force" in refused and "same scan" not in refused
    assert Store.open(tmp_path / "store").cases == (good.case_id,)


def test_one_scan_under_two_names(make_case, tmp_path):
    case = make_case()
    make_case("BraTS2021_00002")
    case.images["t2"].write_bytes(case.images["flair"].read_bytes())
    problems, refused, segmented = everyone(case, tmp_path)
    assert refused is not None and "flair and t2 are one and the same scan" in refused
    assert problems == [refused] and segmented == refused


def test_a_label_of_other_scans_or_of_the_whole_brain(phantom_root, tmp_path):
    """72 real cases have no label outside the brain, and at most 16 % of the brain as tumour."""
    case = find_cases(phantom_root, BRATS)[0]
    folder = tmp_path / "cohort" / case.case_id
    shutil.copytree(case.label.parent, folder)
    (label,) = folder.glob("*_seg.nii.gz")
    brain = np.asarray(nib.load(case.images["t1"]).dataobj) != 0
    tumour = np.asarray(nib.load(case.label).dataobj)
    half = np.zeros_like(tumour)  # 8 voxels of tumour in the brain, 8 in the air
    half[tuple(np.argwhere(brain)[:8].T)] = half[tuple(np.argwhere(~brain)[-8:].T)] = 1
    for change, words in (
        (lambda x: half, "50% of its label lies where no scan has signal"),
        (lambda x: np.ones_like(x), "of its label lies where no scan has signal"),
        (lambda x: brain.astype(np.uint8), "its label covers 100% of the brain"),
    ):
        rewrite(label, change)
        for spacing in (None, (5.0, 5.0, 5.0)):
            if spacing is not None and words.startswith("50%"):
                continue  # at 5 mm other voxels remain of 16
            root = tmp_path / "cohort"
            (problem,) = inspect_cohort(root, BRATS).problems
            report = prepare(
                find_cases(root, BRATS), tmp_path / "s", BRATS, progress=False, spacing=spacing
            )
            assert words in problem
            if spacing is None:
                assert list(report.failed.values()) == [problem]
            else:
                assert "its label" in next(iter(report.failed.values()))
            shutil.rmtree(tmp_path / "s")


def test_force_keeps_such_a_case_and_says_so(make_case, tmp_path, capsys):
    case = make_case()
    rewrite(case.images["t1"], lambda x: (x + 1).astype(np.int16))
    root, store = str(tmp_path / "cohort"), tmp_path / "store"
    assert main(["prepare", root, str(store), "--workers", "0"]) == 1
    told = capsys.readouterr().out
    assert "0 prepared, 0 up to date, 1 left out" in told and "exit code 1" in told
    assert main(["prepare", root, str(store), "--workers", "0", "--force"]) == 0
    said = "its background is not 0; went on because of force."
    assert said in capsys.readouterr().out
    # What was kept stays, told each time, until its files change.
    assert main(["prepare", root, str(store), "--workers", "0"]) == 0
    assert said in capsys.readouterr().out and Store.open(store).cases == (case.case_id,)
    rewrite(case.images["t1"], lambda x: (x + 1).astype(np.int16))
    assert main(["prepare", root, str(store), "--workers", "0"]) == 1
    assert Store.open(store).cases == ()


def test_a_label_map_given_as_a_scan(make_case, tmp_path, label):
    case = make_case()
    rewrite(case.images["t2"], lambda _: label)
    problems, refused, segmented = everyone(case, tmp_path)
    assert "t2 has 3 different values only, as a label map has" in refused
    assert problems == [refused] == [segmented]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x[::-1], r"t1 does not seem to lie on .* mirrored"),
        (with_head, r"t1 .* ml of .*--force"),
    ],
    ids=["mirrored", "skull"],
)
def test_a_scan_with_skull_or_that_lies_elsewhere_is_refused(phantom_root, tmp_path, change, says):
    case = find_cases(phantom_root, BRATS)[0]
    folder = tmp_path / "cohort" / "BraTS2021_00001"
    folder.mkdir(parents=True)
    for modality, path in case.images.items():
        shutil.copy(path, folder / f"BraTS2021_00001_{modality}.nii.gz")
    rewrite(folder / "BraTS2021_00001_t1.nii.gz", change)
    (case,) = find_cases(tmp_path / "cohort", BRATS)
    problems, refused, segmented = everyone(case, tmp_path)
    assert re.search(says, refused), refused
    assert problems == [refused] == [segmented]


# ------------------------------------------------------------------- units and sizes


@pytest.mark.parametrize(("factor", "unit"), [(1e-3, "meter"), (1e3, "micron")])
def test_units_of_the_header_are_honoured(make_case, tmp_path, factor, unit):
    plain, other = make_case(), make_case("BraTS2021_00002")
    affine = np.diag([factor] * 3 + [1]) @ nib.load(plain.label).affine
    for path in [*other.images.values(), other.label]:
        rewrite(path, lambda x: x, affine, unit)
    problems, refused, segmented = everyone(other, tmp_path)
    assert (problems, refused, segmented) == ([], None, None)
    store = Store.open(tmp_path / "store")
    one, two = (store.read(c.case_id) for c in (plain, other))
    np.testing.assert_allclose(two.geometry.affine, one.geometry.affine, atol=1e-3)
    np.testing.assert_allclose(two.geometry.source_zooms, (1.0, 1.0, 1.0), rtol=1e-5)
    np.testing.assert_array_equal(two.image, one.image)


@pytest.mark.parametrize(("factor", "unit"), [(1e-3, "meter"), (1e3, "micron")])
def test_a_result_has_the_affine_and_the_unit_of_its_scan(make_case, tmp_path, factor, unit):
    case = make_case()
    affine = np.diag([factor] * 3 + [1]) @ nib.load(case.label).affine
    for path in case.images.values():
        rewrite(path, lambda x: x, affine, unit)
    model = tiny_student()
    result = model.segment(case.images)
    image = result.to_nifti()
    np.testing.assert_allclose(image.affine, affine, rtol=1e-5, atol=1e-6 * factor)
    assert image.header.get_xyzt_units()[0] == unit
    saved = nib.load(result.save(tmp_path, probabilities=True)["probabilities"])
    np.testing.assert_allclose(saved.affine, affine, rtol=1e-5, atol=1e-6 * factor)
    assert saved.header.get_xyzt_units()[0] == unit
    make_case()  # the same in mm
    plain = model.segment(case.images)
    assert result.volumes == pytest.approx(plain.volumes, rel=1e-5)


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0)], ids=["native", "resampled"])
@pytest.mark.parametrize("size", [1e-3, 1e3, 1e6])
def test_absurd_voxels_stop_no_other_case(make_case, tmp_path, size, spacing):
    case, good = make_case(), make_case("BraTS2021_00002")
    for path in [*case.images.values(), case.label]:
        rewrite(path, lambda x: x, np.diag([size] * 3 + [1]))
    problems, refused, segmented = everyone(case, tmp_path, spacing=spacing)
    assert f"its voxels measure {size:.4g} x" in refused and "repair its header" in refused
    assert len(problems) == 5 and problems[0] in (refused, segmented)
    assert "its voxels measure" in segmented
    assert Store.open(tmp_path / "store").cases == (good.case_id,)


def test_no_grid_larger_than_memory_is_asked_for(make_case, tmp_path):
    case = make_case()
    for path in [*case.images.values(), case.label]:
        rewrite(path, lambda x: x, np.diag([20.0, 20.0, 20.0, 1.0]))
    report = prepare(
        [case], tmp_path / "s", BRATS, spacing=(0.1, 0.1, 0.1), progress=False, force=True
    )
    assert "more than memory is asked for" in report.failed[case.case_id]
    with pytest.raises(InputError, match=r"spacing .* measure .* correct the spacing"):
        prepare([case], tmp_path / "s", BRATS, spacing=(1e-6, 1.0, 1.0), progress=False)


# ------------------------------------------------------------------- orientation


def forget_orientation(case, roles=(*BRATS.modalities, "label")):
    for role in roles:
        patch(case.label if role == "label" else case.images[role], "<hh", 252, 0, 0)


def test_a_case_that_lost_its_orientation_is_refused_beside_others(make_case, tmp_path):
    case, good = make_case(), make_case("BraTS2021_00002")
    forget_orientation(case)
    inspection = inspect_cohort(tmp_path / "cohort", BRATS)
    report = prepare([case, good], tmp_path / "store", BRATS, progress=False)
    assert "qform_code and sform_code are 0" in report.failed[case.case_id]
    assert inspection.problems == [report.failed[case.case_id]]
    assert report.prepared == [good.case_id]


def test_a_cohort_without_orientation_is_told(make_case, tmp_path):
    cases = [make_case(), make_case("BraTS2021_00002")]
    for case in cases:
        forget_orientation(case)
    inspection = inspect_cohort(tmp_path / "cohort", BRATS)
    assert inspection.problems == [] and "do not say how they lie" in inspection.summary()
    report = prepare(cases, tmp_path / "store", BRATS, progress=False)
    assert len(report.prepared) == 2
    assert report.summary().count("do not say how they lie") == 2
    again = prepare(cases, tmp_path / "store", BRATS, progress=False)
    assert again.kept and again.summary().count("do not say how they lie") == 2
    with pytest.warns(UserWarning, match="do not say how they lie"):
        tiny_student().segment(cases[0].images)


def test_a_scan_without_orientation_is_refused_beside_scans_with(make_case, tmp_path):
    case = make_case()
    forget_orientation(case, ["t1ce"])
    problems, refused, segmented = everyone(case, tmp_path)
    assert "does not say how it lies" in refused and "t1ce" in refused
    assert problems == [refused] and "t1ce does not say how it lies" in segmented
    with pytest.raises(InputError, match="does not say how it lies"):
        tiny_student().segment(case.images, SegmentSettings(force=True))


def test_axes_at_45_degrees_are_read_alike_in_all_files(make_case, tmp_path):
    case = make_case()
    for sign, path in zip((1, -1, 1, -1), case.images.values(), strict=True):
        angle = np.radians(45) + sign * 1e-6
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        rewrite(path, lambda x: x, turn @ np.diag([-1.0, -1.0, 1.0, 1.0]))
    turn = np.eye(4)
    turn[:2, :2] = np.sqrt(0.5) * np.array([[1, -1], [1, 1]])
    rewrite(case.label, lambda x: x, turn @ np.diag([-1.0, -1.0, 1.0, 1.0]))
    assert everyone(case, tmp_path) == ([], None, None)


# ------------------------------------------------------------------- headers


@pytest.mark.parametrize("offset", [0.0, 348.0, 351.0, 352.5, float("nan"), -16.0, 1e30])
def test_voxels_never_begin_inside_the_header(make_case, tmp_path, offset):
    case, good = make_case(), make_case("BraTS2021_00002")
    patch(case.images["t2"], "<f", 108, offset)
    problems, refused, segmented = everyone(case, tmp_path)
    assert problems == [refused] and re.search("vox.offset|promises", refused)
    assert segmented == refused
    assert Store.open(tmp_path / "store").cases == (good.case_id,)


@pytest.mark.parametrize("slope", [1e-30, 1e-4, -1e-20])
def test_a_scale_that_leaves_nothing_of_a_label(make_case, tmp_path, slope):
    case = make_case()
    patch(case.label, "<f", 112, slope)
    problems, refused, _ = everyone(case, tmp_path)
    assert "scl_slope" in refused and problems == [refused]


def test_an_empty_label_map_is_a_label(make_case, tmp_path):
    case = make_case()
    rewrite(case.label, np.zeros_like)
    patch(case.label, "<f", 112, 0.5)
    assert prepare([case], tmp_path / "store", BRATS, progress=False).prepared
