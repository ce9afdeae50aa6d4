import gzip
import itertools
import math
from fractions import Fraction
from itertools import permutations

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from pmixseg.data.formats.nifti import ScanReader
from pmixseg.data.scans.canonical import BOX_MULTIPLE, canonicalise
from pmixseg.data.scans.volumes import Coding, _statistics
from pmixseg.errors import InputError
from pmixseg.task import BRATS, Task, all_combinations

CODES = {"NCR": 1, "ED": 2, "ET": 4}
ONE = Task("one", ("t1",), ("lesion",), {"lesion": ("lesion",)})


def reference(paths, spacing=None):
    """The rule, written plainly: nibabel, scipy, float64."""
    stacks, boxes = [], []
    for path in paths:
        image = nib.as_closest_canonical(nib.load(path))
        data = image.get_fdata()
        if spacing is not None:
            zooms = image.header.get_zooms()
            shape = [round(n * z / spacing) for n, z in zip(data.shape, zooms, strict=True)]
            at = np.meshgrid(
                *(
                    (np.arange(n) + 0.5) * spacing / z - 0.5
                    for n, z in zip(shape, zooms, strict=True)
                ),
                indexing="ij",
            )
            data = ndimage.map_coordinates(data, at, order=1, mode="nearest")
        brain = data != 0
        z = np.zeros(data.shape)
        z[brain] = (data[brain] - data[brain].mean()) / data[brain].std()
        tight = ndimage.find_objects(brain.astype(np.uint8))[0]
        lo = [s.start // BOX_MULTIPLE * BOX_MULTIPLE for s in tight]
        hi = np.minimum([-(-s.stop // BOX_MULTIPLE) * BOX_MULTIPLE for s in tight], data.shape)
        stacks.append(z)
        boxes.append((lo, hi))
    lo = np.min([b[0] for b in boxes], axis=0)
    hi = np.max([b[1] for b in boxes], axis=0)
    box = tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))
    return np.stack([z[box] for z in stacks])


@pytest.mark.parametrize("spacing", [None, 2.0])
def test_equals_the_plain_rule(make_case, spacing):
    case = make_case()
    triple = None if spacing is None else (spacing,) * 3
    made = canonicalise(case.images, case.label, BRATS, CODES, triple, dtype="float32")
    expected = reference([case.images[m] for m in BRATS.modalities], spacing)
    assert made.image.dtype == np.float32
    np.testing.assert_allclose(made.image, expected, atol=2e-5)
    half = canonicalise(case.images, case.label, BRATS, CODES, triple)
    np.testing.assert_array_equal(half.image, made.image.astype(np.float16))


def test_zscore_is_over_the_brain_alone(tmp_path, save):
    data = np.zeros((8, 8, 8), np.int16)
    data[2, 2, 2:6] = [1, 2, 3, 6]  # mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5
    made = canonicalise({"t1": save(tmp_path / "a.nii", data)}, None, ONE, dtype="float32")
    values = made.image[0][made.image[0] != 0]
    np.testing.assert_allclose(values, np.array([-2, -1, 3]) / 3.5**0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("offset", "scale", "atol"),
    [(1e4, 1.0, 1e-3), (0.0, 1e-6, 2e-5), (-3e4, 20.0, 2e-4), (0.0, 1e15, 2e-5)],
)
def test_statistics_do_not_cancel(tmp_path, save, offset, scale, atol):
    """What remains is the rounding of float32 at the offset; E[x²] - E[x]² would be far worse."""
    random = np.random.default_rng(5)
    data = np.zeros((40, 40, 40))
    data[5:30, 8:33, 2:39] = offset + scale * random.gamma(2.0, size=(25, 25, 37))
    made = canonicalise({"t1": save(tmp_path / "a.nii.gz", data)}, None, ONE, dtype="float32")
    source = made.geometry.canonical_view(data)[made.geometry.box().slices]
    values = made.image[0][source != 0].astype(np.float64)
    brain = data.astype(np.float32)[data != 0].astype(np.float64)
    expected = np.sort((brain - brain.mean()) / brain.std())
    np.testing.assert_allclose(np.sort(values), expected, atol=atol)


def test_sums_over_voxels_are_exact_in_whatever_order_axes_lie():
    random = np.random.default_rng(5)
    data = random.lognormal(6, 1, (30, 40, 50)).clip(0, 32767).astype(np.int16)
    voxels = data[data != 0].tolist()
    mean = Fraction(sum(voxels), len(voxels))
    variance = Fraction(sum(v * v for v in voxels), len(voxels)) - mean * mean
    expected = len(voxels), float(mean), math.sqrt(variance)
    found = {_statistics(np.asfortranarray(data.transpose(t))) for t in permutations(range(3))}
    assert len(found) == 1
    assert found.pop() == pytest.approx(expected, rel=1e-12)


def test_background_is_exactly_and_positively_zero(make_case):
    case = make_case()
    made = canonicalise(case.images, None, BRATS, CODES)
    source = made.geometry.canonical_view(np.asarray(nib.load(case.images["t1"]).dataobj))
    background = source[made.geometry.box().slices] == 0
    values = made.image[BRATS.modalities.index("t1")][background]
    assert (values == 0).all() and not np.signbit(values).any()


@pytest.mark.parametrize("spacing", [None, (2.0, 2.0, 2.0), (1.5, 0.9, 2.5)])
def test_a_combination_is_what_its_files_alone_give(make_case, spacing):
    """docs/method/evidence.md: nothing may come from a modality outside the combination."""
    case = make_case()
    full = canonicalise(case.images, None, BRATS, CODES, spacing)
    boxes = {full.geometry.box(c) for c in all_combinations(BRATS.modalities)}
    assert len(boxes) > 1, "the fields of view must differ for this to test anything"
    for combination in all_combinations(BRATS.modalities):
        alone = canonicalise({m: case.images[m] for m in combination}, None, BRATS, CODES, spacing)
        box = full.geometry.box(combination)
        assert alone.geometry.box() == box
        crop = full.image[(slice(None), *box.relative_to(full.geometry.box()).slices)].copy()
        for index, name in enumerate(BRATS.modalities):
            if name not in combination:
                crop[index] = 0
        np.testing.assert_array_equal(alone.image, crop)


def test_orientation_of_the_file_does_not_matter(make_case, tmp_path):
    case = make_case()
    plain = canonicalise(case.images, case.label, BRATS, CODES)
    turned = {}
    for (name, path), axes in zip(
        case.images.items(), itertools.cycle(["RAS", "PIR", "SLA"]), strict=False
    ):
        image = nib.load(path)
        change = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(axes))
        )
        turned[name] = tmp_path / f"turned_{name}.nii.gz"
        nib.save(image.as_reoriented(change), turned[name])
    other = canonicalise(turned, case.label, BRATS, CODES)
    np.testing.assert_array_equal(other.image, plain.image)
    np.testing.assert_array_equal(other.label, plain.label)


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.uint16, np.float32, np.float64, ">i2"])
def test_number_type_does_not_matter(tmp_path, save, volume, kind):
    data = volume() % 200
    plain = canonicalise({"t1": save(tmp_path / "a.nii.gz", data)}, None, ONE)
    header = nib.Nifti1Header(endianness=">") if kind == ">i2" else None
    nib.save(
        nib.Nifti1Image(data.astype(kind), np.diag([-1, -1, 1, 1]), header), tmp_path / "b.nii"
    )
    other = canonicalise({"t1": tmp_path / "b.nii"}, None, ONE)
    np.testing.assert_array_equal(other.image, plain.image)


def test_scale_factors_are_honoured(tmp_path, volume):
    data = volume() // 3 * 3
    header = nib.Nifti1Header()
    header.set_data_shape(data.shape)
    header.set_data_dtype(np.int16)
    header.set_sform(np.eye(4), code=1)
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = 0.3, -2.1, 352
    # An intercept moves the background: it is 7 in the file, and 0.3 * 7 - 2.1 is not quite 0.
    stored = (data // 3 * 10 + 7).astype(np.int16)
    path = tmp_path / "scaled.nii.gz"
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4) + stored.tobytes(order="F")))
    assert (nib.load(path).get_fdata() != 0).all()
    scan = ScanReader("x").read(path, "t1")
    np.testing.assert_allclose(scan.values(), nib.load(path).get_fdata(), atol=1e-4)
    np.testing.assert_array_equal(scan.values() == 0, data == 0)
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "plain.nii.gz")
    made = canonicalise({"t1": path}, None, ONE, dtype="float32")
    plain = canonicalise({"t1": tmp_path / "plain.nii.gz"}, None, ONE, dtype="float32")
    np.testing.assert_allclose(made.image, plain.image, atol=1e-5)


def test_gzip_files_of_several_members(make_case, tmp_path):
    """As bgzip and pigz may write them; members of equal length are the hardest to tell."""
    case = make_case(modalities=("t1",))
    raw = gzip.decompress(case.images["t1"].read_bytes())
    plain = canonicalise(case.images, None, BRATS, CODES)
    half = len(raw) // 2
    for cuts in ([half], [400, half], [100, 200]):
        pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        for end in (b"", gzip.compress(b"")):
            path = tmp_path / "members.nii.gz"
            path.write_bytes(b"".join(gzip.compress(p) for p in pieces) + end)
            made = canonicalise({"t1": path}, None, BRATS, CODES)
            np.testing.assert_array_equal(made.image, plain.image)


def test_channels_of_a_4d_file(make_case, tmp_path, save):
    case = make_case()
    stack = np.stack([np.asarray(nib.load(case.images[m]).dataobj) for m in ("t1", "t2")], axis=-1)
    path = save(tmp_path / "four.nii.gz", stack)
    made = canonicalise({"t2": (path, 1), "t1": (path, 0)}, None, BRATS, CODES)
    plain = canonicalise({m: case.images[m] for m in ("t1", "t2")}, None, BRATS, CODES)
    np.testing.assert_array_equal(made.image, plain.image)
    assert made.acquired == (False, False, True, True) and not made.image[:2].any()
    assert made.digests["t1"] == made.digests["t2"]


def test_images_in_memory_and_other_formats(make_case, tmp_path):
    case = make_case()
    plain = canonicalise(case.images, case.label, BRATS, CODES)
    opened = {m: nib.load(p) for m, p in case.images.items()}
    made = canonicalise(opened, nib.load(case.label), BRATS, CODES)
    np.testing.assert_array_equal(made.image, plain.image)
    np.testing.assert_array_equal(made.label, plain.label)
    second = {m: tmp_path / f"{m}.nii" for m in case.images}
    for m, image in opened.items():
        nib.save(nib.Nifti2Image(np.asarray(image.dataobj), image.affine), second[m])
    nib.save(
        nib.MGHImage(np.asarray(opened["t1"].dataobj), opened["t1"].affine), tmp_path / "t1.mgz"
    )
    second["t1"] = tmp_path / "t1.mgz"
    np.testing.assert_array_equal(canonicalise(second, None, BRATS, CODES).image, plain.image)


def test_label_codes_and_ignored_codes(make_case, label, save, tmp_path):
    case = make_case()
    made = canonicalise(case.images, case.label, BRATS, CODES)
    crop = made.geometry.canonical_view(label)[made.geometry.box().slices]
    np.testing.assert_array_equal(made.label, np.array([0, 1, 2, 0, 3])[crop])
    assert made.label_native is None
    coding = Coding.of(BRATS, {"NCR": 2, "ED": 1, "ET": 3}, ignored=(4,))
    cavity = canonicalise(case.images, case.label, BRATS, coding)
    assert cavity.ignored == {4: np.count_nonzero(label == 4)} and made.ignored == {}
    np.testing.assert_array_equal(cavity.label, np.array([0, 2, 1, 3, 0])[crop])
    floats = save(tmp_path / "float.nii.gz", label.astype(np.float32) + 0.0004)
    np.testing.assert_array_equal(canonicalise(case.images, floats, BRATS, CODES).label, made.label)
    empty = save(tmp_path / "empty.nii.gz", np.zeros_like(label))
    assert not canonicalise(case.images, empty, BRATS, CODES).label.any()


def test_label_outside_the_brain_box_is_kept_natively(make_case, label, save, tmp_path):
    far = label.copy()
    far[:, :, 0] = 1
    case = make_case(modalities=("t2",))
    made = canonicalise(case.images, save(tmp_path / "far.nii.gz", far), BRATS, CODES)
    plain = canonicalise(case.images, case.label, BRATS, CODES)
    assert made.geometry == plain.geometry, "a label must not widen what the network sees"
    full = np.zeros(made.geometry.canonical_shape, np.uint8)
    full[made.label_box.slices] = made.label_native
    np.testing.assert_array_equal(
        full, made.geometry.canonical_view(np.array([0, 1, 2, 0, 3])[far])
    )


@pytest.mark.parametrize(
    ("codes", "ignored"),
    [
        ({"NCR": 1, "ED": 2}, ()),
        ({"NCR": 1, "ED": 2, "ET": 2}, ()),
        ({"NCR": 1, "ED": 2, "ET": 0}, ()),
        ({"NCR": 1, "ED": 2, "ET": 4}, (4,)),
        ({"NCR": 1, "ED": 2, "ET": 400}, ()),
        ({"NCR": 1, "ED": 2, "ET": 4, "RC": 5}, ()),
    ],
)
def test_impossible_codes_are_refused(codes, ignored):
    with pytest.raises(InputError, match="a number of its own from 1 to 255"):
        Coding.of(BRATS, codes, ignored)


def test_an_unknown_modality_or_none_is_refused(make_case):
    case = make_case()
    with pytest.raises(InputError, match=r"\['pd'\] given, but task 'brats' has the modalities"):
        canonicalise({**case.images, "pd": case.images["t1"]}, None, BRATS, CODES)
    with pytest.raises(InputError, match="no image given"):
        canonicalise({}, None, BRATS, CODES)


@pytest.mark.real
def test_real_scan_there_and_back(real_root):
    for name in ("BraTS2021_00019",):
        images = {m: real_root / name / f"{name}_{m}.nii.gz" for m in BRATS.modalities}
        seg = real_root / name / f"{name}_seg.nii.gz"
        made = canonicalise(images, seg, BRATS, CODES, dtype="float32")
        np.testing.assert_allclose(made.image, reference(images.values()), atol=2e-5)
        back = made.geometry.to_source(made.label, made.geometry.box(), order=0)
        source = np.asarray(nib.load(seg).dataobj)
        np.testing.assert_array_equal(np.array([0, 1, 2, 4])[back], source)


@pytest.mark.real
def test_real_box_does_not_depend_on_missing_files(real_root):
    name = "BraTS2021_00006"
    images = {m: real_root / name / f"{name}_{m}.nii.gz" for m in BRATS.modalities}
    full = canonicalise(images, None, BRATS, CODES)
    for combination in (("t1ce",), ("flair", "t2"), ("t1", "t1ce", "t2")):
        alone = canonicalise({m: images[m] for m in combination}, None, BRATS, CODES)
        box = alone.geometry.box()
        assert box == full.geometry.box(combination)
        inner = box.relative_to(full.geometry.box()).slices
        for m in combination:
            index = BRATS.modalities.index(m)
            np.testing.assert_array_equal(alone.image[index], full.image[(index, *inner)])
