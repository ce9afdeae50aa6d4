"""What segmenting refuses, in one sentence, and what force or strictness change."""

import errno
from itertools import islice
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.processing import resample_to_output
from scipy import ndimage

from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.scans import canonical, placement
from pmixseg.data.scans.brains import MAX_BRAIN_ML, not_a_brain
from pmixseg.data.scans.canonical import canonicalise, join
from pmixseg.data.scans.grids import on_one_grid
from pmixseg.data.scans.placement import Overview, misplaced
from pmixseg.data.scans.plausibility import judge
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.scans import SegmentSettings
from pmixseg.inference.segment import Outputs, segment_folder
from pmixseg.modules.preparation import Preparation
from pmixseg.task import BRATS
from tests.inference.tiny_models import tiny_student


def changed(image, change):
    return nib.Nifti1Image(change(np.asarray(image.dataobj)), image.affine)


def test_no_scan_and_unknown_modalities(model, images):
    with pytest.raises(InputError, match=r"no scan given.*flair, t1ce, t1, t2"):
        model.segment({})
    with pytest.raises(InputError, match=r"dwi given.*knows flair"):
        model.segment({"t1": images["t1"], "dwi": images["t1"]})


def test_what_is_no_scan_at_all(model, images):
    with pytest.raises(InputError, match="a str was given; give a scan for each modality"):
        model.segment("folder")
    with pytest.raises(InputError, match="t1 is a ndarray, which does not say how it lies"):
        model.segment({"t1": np.asarray(images["t1"].dataobj)})
    with pytest.raises(InputError, match="t1 is a Nifti1Image, which does not say how it lies"):
        model.segment({"t1": nib.Nifti1Image(np.asarray(images["t1"].dataobj), None)})


def test_numbers_that_are_no_intensities_are_refused_in_every_format(model, images, tmp_path):
    values, affine = np.asarray(images["t1"].dataobj), images["t1"].affine
    colours = np.zeros(values.shape, [(name, "u1") for name in "RGB"])
    analyze = nib.AnalyzeImage(values.astype(np.complex64), affine)
    analyze.set_data_dtype(np.complex64)
    nib.save(analyze, tmp_path / "t1.img")
    for source, says in {
        nib.Nifti1Image(values.astype(np.complex64), affine): "complex64 numbers",
        nib.Nifti1Image(colours, affine): "colours",
        tmp_path / "t1.img": "complex64 numbers",
    }.items():
        with pytest.raises(InputError, match=f"holds {says}, but a scan is integers or floats"):
            model.segment({"t1": source})


def test_a_dedicated_student_says_what_it_reads(images):
    module = tiny_student(combination="t1ce+flair")
    with pytest.raises(InputError, match="no input for t2, it reads flair, t1ce"):
        module.segment({"t2": images["t2"], "flair": images["flair"]})
    assert module.segment({"flair": images["flair"]}).combination == ("flair",)


def test_missing_and_damaged_files_are_refused(model, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        model.segment({"t1": tmp_path / "none.nii.gz"})
    (tmp_path / "text.nii.gz").write_text("hello")
    with pytest.raises(InputError, match="not a NIfTI"):
        model.segment({"t1": tmp_path / "text.nii.gz"})


def test_an_unknown_normalisation_is_refused(images):
    module = tiny_student()
    module.preparation = Preparation(normalisation="minmax", patch=(32, 32, 32))
    with pytest.raises(InputError, match="normalisation 'minmax'"):
        module.segment({"t1": images["t1"]})


def test_codes_must_tell_labels_apart(model, images):
    with pytest.raises(InputError, match="number of its own"):
        model.segment({"t1": images["t1"]}, codes={"NCR": 1, "ED": 1, "ET": 4})


@pytest.mark.parametrize(
    "wrong", [{"overlap": 1.0}, {"precision": "fp16"}, {"dtype": "int8"}, {"overlap": -0.1}]
)
def test_settings_that_do_not_exist(wrong):
    with pytest.raises(InputError):
        SegmentSettings(**wrong)


# ------------------------------------------------------------------- grids


def on_other_grid(image, zoom=(1.0, 1.0, 2.0)):
    return resample_to_output(
        changed(image, lambda d: d.astype(np.float32)), tuple(5.0 * z for z in zoom), order=1
    )


def test_scans_on_other_grids_are_resampled_with_a_warning(model, images):
    thick = {"t1": on_other_grid(images["t1"]), "t2": images["t2"]}
    with pytest.warns(UserWarning, match="t1 was resampled from its own grid to that of t2"):
        result = model.segment(thick)
    assert result.to_nifti().shape == images["t2"].shape  # the finer one
    assert result.warnings
    assert np.allclose(result.affine, images["t2"].affine)


def test_resampling_puts_every_point_where_it_belongs():
    """A scan whose value is its distance in mm from a plane has it after resampling, too."""
    normal = np.array([0.3, -0.5, 0.8])

    def plane(shape, affine):
        points = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
        return nib.Nifti1Image((300 + points @ normal).astype(np.float32), affine)

    turned = nib.affines.from_matvec(_rotation(10) @ np.diag([-2.0, 3.0, 2.5]), [40.0, -55.0, -40])
    source = plane((40, 38, 36), turned)
    target = plane(
        (30, 30, 30), np.diag([1.1, 1.2, 1.0, 1.0]) + [[0, 0, 0, t] for t in (0, 1, 2, 0)]
    )
    resampled = on_one_grid({"t1": source, "t2": target}, reference="t2").images["t1"]
    inside = np.asarray(resampled.dataobj) != 0
    assert inside.mean() > 0.5
    np.testing.assert_allclose(
        np.asarray(resampled.dataobj)[inside], np.asarray(target.dataobj)[inside], atol=0.9
    )
    deep = ndimage.binary_erosion(inside, iterations=3)  # the border extrapolates by half a voxel
    np.testing.assert_allclose(
        np.asarray(resampled.dataobj)[deep], np.asarray(target.dataobj)[deep], atol=1e-2
    )


def _rotation(degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def test_the_reference_can_be_chosen_and_resampling_refused(model, images):
    thick = {"t1": on_other_grid(images["t1"]), "t2": images["t2"]}
    with pytest.raises(InputError, match=r"(shape|affines).*--strict"):
        model.segment(thick, SegmentSettings(strict=True))
    with pytest.warns(UserWarning, match="t2 was resampled"):
        result = model.segment(thick, SegmentSettings(reference="t1"))
    assert result.to_nifti().shape == thick["t1"].shape
    with pytest.raises(InputError, match="reference 'flair'"):
        model.segment(thick, SegmentSettings(reference="flair"))


def test_the_result_has_the_axes_of_the_reference(model, images):
    start = nib.io_orientation(images["t2"].affine)
    turn = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(tuple("SAR")))
    mixed = {"t1": images["t1"], "t2": images["t2"].as_reoriented(turn)}
    labels = model.segment(mixed, SegmentSettings(reference="t2")).to_nifti()
    assert nib.aff2axcodes(labels.affine) == tuple("SAR")
    back = nib.as_closest_canonical(labels)
    plain = nib.as_closest_canonical(model.segment({m: images[m] for m in mixed}).to_nifti())
    assert np.array_equal(back.dataobj, plain.dataobj)


def test_resampling_makes_no_dark_rim(images):
    flat = changed(images["t1"], lambda d: np.where(d != 0, 100, 0).astype(np.int16))
    shifted = flat.affine.copy()
    shifted[:3, 3] += 1.7  # a third of a voxel
    moved = nib.Nifti1Image(np.asarray(images["t2"].dataobj), shifted)
    grid = on_one_grid({"t1": flat, "t2": moved}, reference="t2")
    values = np.unique(np.asarray(grid.images["t1"].dataobj).round(3))
    assert values.tolist() == [0, 100]


def test_a_scan_that_misses_the_grid_is_named(model, images, tmp_path):
    slice_below = nib.Nifti1Image(np.asarray(images["t1"].dataobj)[:, :, 12:13], np.eye(4))
    nib.save(images["t2"], tmp_path / "mine_t2.nii.gz")
    there = {"t1": slice_below, "t2": tmp_path / "mine_t2.nii.gz"}
    with pytest.raises(InputError, match=r"nothing of .*mine_t2\.nii\.gz lies on the grid of t1"):
        model.segment(there, SegmentSettings(reference="t1"))


# ------------------------------------------------------------------- plausibility


def shared_information(one, two, enough):
    """As its equation stands: of one pair of scans, less its bias."""
    both = (one > 0) & (two > 0)
    one, two = one[both], two[both]
    if len(one) < enough:
        return 0.0
    table = np.array(
        [[np.mean((one == a) & (two == b)) for b in range(1, 17)] for a in range(1, 17)]
    )
    rows, columns = table.sum(1), table.sum(0)
    independent = np.outer(rows, columns)
    filled = table > 0
    cells = [np.count_nonzero(p) for p in (table, rows, columns)]
    bias = (cells[0] - cells[1] - cells[2] + 1) / (2 * len(one))
    return (table[filled] * np.log(table[filled] / independent[filled])).sum() - bias


def test_information_of_many_pairs_at_once_is_that_of_each():
    random = np.random.default_rng(0)
    scans = random.integers(0, 17, (3, 500)).astype(np.int16)
    scans[2, 100:] = 0  # too few voxels in common
    others = np.stack([random.integers(0, 17, 500), np.maximum(scans[0], 1)]).astype(np.int16)
    expected = [sum(shared_information(s, o, 200) for s in scans) for o in others]
    assert expected[1] > 2 > 0.2 > abs(expected[0])
    np.testing.assert_allclose(placement._information(scans, others, 200), expected, rtol=1e-12)


def test_a_scan_with_no_voxel_on_the_grid_is_not_moved():
    scan = np.zeros((3, 3, 3), np.int16)
    scan[1, 1, 1] = 5
    gains = placement._gains(scan, [scan], [4.0] * 3, placement.moves(), 2)
    assert list(gains) == []
    assert len(list(placement._gains(scan, [scan], [4.0] * 3, placement.moves()))) == 27


@pytest.mark.parametrize("steps", [(1, 1, 1), (2, 2, 2), (4, 1, 3)])
def test_block_means_are_numpys(steps):
    volume = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(np.float32)
    a, b, c = steps
    blocks = volume.reshape(8 // a, a, 4 // b, b, 6 // c, c)
    means = placement._block_means(volume, steps)
    np.testing.assert_allclose(means, blocks.mean((1, 3, 5)), rtol=1e-5, atol=1e-6)


def test_phantoms_look_as_they_should(model, images):
    model.segment(images)


def noisy(data):
    noise = np.random.default_rng(0).integers(1, 30, data.shape)
    return np.where(data != 0, data, noise).astype(data.dtype)


def with_head(data):
    """A shell of scalp around the brain, after a gap for the skull."""
    depth = ndimage.distance_transform_edt(data == 0, sampling=5.0)
    bright = int(np.percentile(data[data > 0], 90))
    return np.where(depth > 0, np.where(depth <= 18, bright, 0), data).astype(data.dtype)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (noisy, "background is not 0|more than a brain"),
        (with_head, "ml of"),
        (np.negative, "below 0 in 100% of its non-zero voxels"),
    ],
)
def test_scans_with_skull_or_background(model, images, change, says):
    raw = {"t1": changed(images["t1"], change), "t2": images["t2"]}
    with pytest.raises(InputError, match=f"t1.*({says}).*--force"):
        model.segment(raw)
    with pytest.warns(UserWarning, match="because of force"):
        assert model.segment(raw, SegmentSettings(force=True)).warnings


def test_thresholds_by_hand():
    ball = np.zeros((60, 60, 60), np.float16)
    z, y, x = np.ogrid[:60, :60, :60]
    inside = (z - 30) ** 2 + (y - 30) ** 2 + (x - 30) ** 2 <= 20**2  # 33401 voxels
    ball[inside] = np.arange(np.count_nonzero(inside)) % 16 + 1
    assert not_a_brain(ball, (3.0, 3.0, 3.0), "t1") is None  # 902 ml
    limit = (MAX_BRAIN_ML / np.count_nonzero(ball) * 1000) ** (1 / 3)
    assert not_a_brain(ball, (limit - 0.01,) * 3, "t1") is None
    assert "more than a brain" in not_a_brain(ball, (limit + 0.01,) * 3, "t1")
    few = np.where(ball == 16, 15, ball)
    assert "15 different values" in not_a_brain(few, (3.0, 3.0, 3.0), "t1")
    assert "100% of the box" in not_a_brain(np.ones((20, 20, 20), np.float16), (1.0,) * 3, "t1")


def test_a_label_map_is_no_scan(model, case):
    label = case.label
    with pytest.raises(InputError, match="t1 has 3 different values only"):
        model.segment({"t1": label})


def test_a_resampled_label_map_is_no_scan():
    rng = np.random.default_rng(0)
    ball = np.zeros((60, 60, 60), np.float32)
    ball[10:50, 15:45, 20:40] = rng.random((40, 30, 20))  # between two labels: values of their own
    interior = np.zeros_like(ball, dtype=bool)
    interior[10:35, 15:45, 20:40] = True  # 25 of 40 planes: 62.5 % of the voxels
    labels = np.where(interior, rng.integers(1, 4, ball.shape), ball)
    for scan in (labels, ball):
        scan[0, 0, 0] = scan[-1, -1, -1] = 9  # a loose box, so that the background counts as 0
    assert "five values in 63% of its voxels" in not_a_brain(labels, (1.0,) * 3, "t1")
    assert not_a_brain(ball, (1.0,) * 3, "t1") is None


@pytest.mark.real
def test_a_real_label_map_is_no_scan_at_any_spacing(real_root):
    (case,) = find_cases(real_root / "BraTS2021_00019", BRATS)
    for spacing in (None, (2.0, 2.0, 2.0)):
        with pytest.raises(InputError, match=r"t1 has .* as a label map has"):
            tiny_student(window=64, spacing=spacing).segment({"t1": case.label})


def test_scans_that_do_not_meet():
    one, other = np.zeros((2, 60, 40, 40), np.float32)
    one[2:28, 5:35, 5:35] = 1 + np.random.default_rng(0).random((26, 30, 30))
    other[32:58, 5:35, 5:35] = 1 + np.random.default_rng(1).random((26, 30, 30))
    assert misplaced(Overview.of({"t1": one, "t2": other}, (4.0, 4.0, 4.0))) == [
        "t1 and t2 hardly overlap"
    ]


# ------------------------------------------------------------------- real scans


def _shift(data):
    return np.roll(data, 10, axis=2)  # the volume's rim is empty


def _turn(data):
    return ndimage.rotate(data, 15, axes=(0, 1), reshape=False, order=0)


def _mirror(data):
    return data[::-1]


@pytest.mark.real
@pytest.mark.parametrize("number", ["00000", "00019"])
def test_real_scans_pass_and_damaged_ones_are_named(real_root, number):
    name = f"BraTS2021_{number}"
    scans = {m: nib.load(real_root / name / f"{name}_{m}.nii.gz") for m in BRATS.modalities}
    assert judge(canonicalise(scans, None, BRATS), BRATS).findings == ()
    for modality, change, says in (
        ("t1", _shift, "shifted"),
        ("t2", _turn, "turned"),
        ("flair", _mirror, "mirrored left-right"),
    ):
        damaged = {**scans, modality: changed(scans[modality], change)}
        (finding,) = judge(canonicalise(damaged, None, BRATS), BRATS).findings
        assert finding.startswith(f"{modality} does not seem to lie on ")
        assert says in finding


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_real_scan_is_suspected_in_any_combination(real_root):
    for folder in sorted(real_root.iterdir()):
        if folder.is_dir():
            scans = {m: folder / f"{folder.name}_{m}.nii.gz" for m in BRATS.modalities}
            case = canonicalise(scans, None, BRATS)
            image = dict(zip(BRATS.modalities, case.image, strict=True))
            for combination in BRATS.combinations():
                shown = {m: image[m] for m in combination}
                assert misplaced(Overview.of(shown, case.geometry.grid_spacing)) == []


def test_a_case_that_memory_does_not_hold_stops_no_other(
    model, cropped_root, tmp_path, monkeypatch
):
    calls = []

    def first_fails(*args):
        calls.append(args)
        if len(calls) == 1:
            raise MemoryError
        return join(*args)

    monkeypatch.setattr(canonical, "join", first_fails)
    results = [*islice(segment_folder(model, cropped_root, Outputs(tmp_path)), 2)]
    assert "there is not enough memory for it; use" in results[0].problem
    assert results[1].problem is None and results[1].files


def test_a_full_disk_stops_all(model, cropped_root, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match=r"cannot be written .No space left"):
        next(segment_folder(model, cropped_root, Outputs(tmp_path)))
