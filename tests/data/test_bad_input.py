"""docs/design/contracts.md: what a person can get wrong gives a sentence, here through prepare."""

import gzip
import io
import re

import nibabel as nib
import numpy as np
import pytest

from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.formats.nifti import ScanReader
from pmixseg.data.store.store import Store, prepare
from pmixseg.errors import InputError
from pmixseg.task import BRATS
from tests.inference.tiny_models import tiny_student

SHAPE = (44, 40, 36)
MODEL = tiny_student()


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
SHEAR = np.eye(4)
SHEAR[0, 2] = 0.5


def rewrite(path, change, affine=None, dtype=None):
    image = nib.load(path)
    data = change(np.array(image.dataobj, dtype=dtype))
    nib.save(nib.Nifti1Image(data, image.affine if affine is None else affine), path)


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def put(value, where=(20, 20, 20)):
    def change(data):
        data[where] = value
        return data

    return change


def shifted(path, millimetres):
    affine = nib.load(path).affine.copy()
    affine[0, 3] += millimetres
    rewrite(path, lambda d: d, affine)


def flip_bit(path, place=None):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if place is None else place] ^= 4
    path.write_bytes(raw)


def raw_header(path, **fields):
    image = bytearray(gzip.decompress(path.read_bytes()))
    header = nib.Nifti1Header.from_fileobj(io.BytesIO(image))
    for name, value in fields.items():
        header[name] = value
    image[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(image)))


CUT, NO_NIFTI = "is a truncated or damaged gzip file", "is not a NIfTI file"
HEADER, NOT_FINITE = "has a damaged NIfTI header", "holds NaN, infinite or far too large voxels"

# What is damaged, how, and what is said of the file.
DAMAGE = {
    "gzip cut in the middle": (
        "t1",
        lambda p: cut(p, p.stat().st_size // 2),
        r"is a truncated or damaged gzip file .*; copy or download it again\.",
    ),
    "gzip without its last bytes": ("t2", lambda p: cut(p, -3), CUT),
    "gzip with a flipped bit": ("t2", flip_bit, CUT),
    "gzip with a damaged first block": ("t2", lambda p: flip_bit(p, 10), CUT),
    "empty file": (
        "t1ce",
        lambda p: p.write_bytes(b""),
        r"is not a NIfTI file .*; it is empty; download it again\.",
    ),
    "wrong magic": ("flair", lambda p: raw_header(p, magic=b"abc"), NO_NIFTI),
    "text that calls itself NIfTI": (
        "flair",
        lambda p: p.write_text("<html>404 not found</html>" * 40),
        r"is not a NIfTI file .*; it is a web page, as .*; fetch the file itself\.",
    ),
    "a pointer": (
        "flair",
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n"),
        r"is not a NIfTI file .*; it is a pointer of git LFS; fetch the file itself",
    ),
    "gzip of another kind": ("flair", lambda p: p.write_bytes(gzip.compress(b"x" * 999)), NO_NIFTI),
    "fewer voxels than promised": (
        "t1",
        lambda p: p.write_bytes(gzip.compress(gzip.decompress(p.read_bytes())[:5000])),
        r"is truncated \(its header promises \d+ bytes, it has 5000\)",
    ),
    "negative shape": ("t1", lambda p: raw_header(p, dim=[3, -44, 40, 36, 1, 1, 1, 1]), HEADER),
    "a size that wraps": (
        "t1",
        lambda p: raw_header(p, dim=[7] + [2**12] * 6 + [1]),  # 2**72 voxels
        r"promises \d{22} bytes of voxels .*, more than any scan; convert or",
    ),
    "unknown number type": ("t1", lambda p: raw_header(p, datatype=9999), HEADER),
    "complex numbers": (
        "t1",
        lambda p: rewrite(p, lambda d: d.astype(np.complex64)),
        r"holds complex64 numbers, but a scan is integers or floats; convert it\.",
    ),
    "colours": (
        "t1",
        lambda p: rewrite(p, lambda d: np.stack([d.astype("u1")] * 3, -1).view(RGB)[..., 0]),
        r"holds colours, but a scan is integers or floats; convert it\.",
    ),
    "other shape": (
        "t2",
        lambda p: rewrite(p, lambda d: d[:-1]),
        r"has shape \(43, 40, 36\), but .*flair\.nii\.gz has \(44, 40, 36\); co-",
    ),
    "4-D where a volume is meant": (
        "t2",
        lambda p: rewrite(p, lambda d: np.stack([d, d], axis=-1)),
        r"has shape \(44, 40, 36, 2\), but one volume of three axes is needed",
    ),
    "shifted affine": (
        "t1ce",
        lambda p: shifted(p, 1.0),
        r"and .*flair\.nii\.gz have affines that differ by up to 1 mm; co-register",
    ),
    "singular affine": (
        "t1ce",
        lambda p: raw_header(p, sform_code=1, srow_x=[0, 0, 0, 0]),
        r"has no usable geometry .*; repair its header\.",
    ),
    "an origin beyond all rooms": (
        "t1ce",
        lambda p: raw_header(p, sform_code=1, srow_x=[1, 0, 0, 1e30]),
        r"has no usable geometry \(its first voxel lies 1e\+30 mm from the origin\); repair its",
    ),
    "sheared axes": (
        "t1ce",
        lambda p: rewrite(p, lambda d: d, nib.load(p).affine @ SHEAR),
        r"has no usable geometry \(its axes are at 63\.4 degrees to each other",
    ),
    "all zero": (
        "t1",
        lambda p: rewrite(p, np.zeros_like),
        r"is 0 everywhere; leave the file out or replace it\.",
    ),
    "constant": (
        "t1",
        lambda p: rewrite(p, lambda d: (d > 0).astype(np.int16) * 300),
        r"has the same value 300 in all its non-zero voxels",
    ),
    "all NaN": (
        "t1",
        lambda p: rewrite(p, lambda d: np.full_like(d, np.nan), dtype=np.float32),
        r"holds NaN, infinite or far too large voxels; replace them, background by 0\.",
    ),
    "one NaN": ("t1", lambda p: rewrite(p, put(np.nan), dtype=np.float32), NOT_FINITE),
    "one NaN in the corner": (
        "t1",
        lambda p: rewrite(p, put(np.nan, (0, 0, 0)), dtype=np.float64),
        NOT_FINITE,
    ),
    "one infinity": ("t1", lambda p: rewrite(p, put(-np.inf), dtype=np.float32), NOT_FINITE),
    "label 7": (
        "seg",
        lambda p: rewrite(p, put(7)),
        r"holds the label values 7, but its layout knows 0, 1, 2, 4; name the right",
    ),
    "label 3, of another coding": (
        "seg",
        lambda p: rewrite(p, lambda d: np.where(d == 4, 3, d).astype(np.uint8)),
        r"holds the label values 3, but its layout knows 0, 1, 2, 4",
    ),
    "negative and large labels": (
        "seg",
        lambda p: rewrite(p, lambda d: put(257)(put(-1, (0, 0, 0))(d)), dtype=np.int16),
        r"holds the label values -1, 257, but",
    ),
    "labels between integers": (
        "seg",
        lambda p: rewrite(p, put(1.5), dtype=np.float32),
        r"holds the label values 1\.5, which are no whole numbers, .*nearest neigh",
    ),
    "NaN label": (
        "seg",
        lambda p: rewrite(p, put(np.nan), dtype=np.float32),
        r"holds the label values nan, which are no numbers; replace them, background",
    ),
    "label of another shape": (
        "seg",
        lambda p: rewrite(p, lambda d: d[:, :-2]),
        r"has shape \(44, 38, 36\), but",
    ),
    "label shifted": (
        "seg",
        lambda p: shifted(p, 3.0),
        r"and .*flair\.nii\.gz have affines that differ by up to 3 mm",
    ),
    "truncated label": ("seg", lambda p: cut(p, -10), CUT),
}


@pytest.mark.parametrize("spacing", [None, (2.0, 2.0, 2.0)], ids=["native", "resampled"])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_case_gives_its_sentence_and_stops_no_other(make_case, tmp_path, name, spacing):
    case, good = make_case(), make_case("BraTS2021_00002")
    role, damage, sentence = DAMAGE[name]
    path = case.label if role == "seg" else case.images[role]
    damage(path)
    cases = find_cases(path.parents[1], BRATS)
    report = prepare(cases, tmp_path / "store", BRATS, spacing=spacing, progress=False)
    assert report.prepared == [good.case_id] and list(report.failed) == [case.case_id]
    said = report.failed[case.case_id]
    assert re.search(rf"{role}\.nii\.gz {sentence}", said), said
    assert said.startswith("case 'BraTS2021_00001': ") and str(path) in said
    assert "\n" not in said and said.endswith(".")
    assert Store.open(tmp_path / "store").cases == (good.case_id,)
    if role != "seg" and spacing is None and name not in ("other shape", "shifted affine"):
        with pytest.raises(InputError, match=rf"{role}\.nii\.gz {sentence}"):
            MODEL.segment(case.images)


def test_small_differences_of_affines_are_header_noise(make_case, tmp_path):
    case = make_case()
    shifted(case.images["t2"], 0.05)
    assert not prepare([case], tmp_path / "store", BRATS, progress=False).failed


def test_a_missing_label_is_reported_and_no_error(make_case, tmp_path):
    report = prepare([make_case(labelled=False)], tmp_path / "store", BRATS, progress=False)
    assert not report.failed and report.unlabelled == ["BraTS2021_00001"]


def test_files_that_vanish_or_may_not_be_read(make_case, tmp_path, monkeypatch):
    case = make_case()
    case.images["t1"].unlink()
    report = prepare([case], tmp_path / "store", BRATS, progress=False)
    assert report.failed[case.case_id].endswith("t1.nii.gz does not exist; correct the path.")
    case = make_case()

    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(case.label), "read_bytes", closed)
    report = prepare([case], tmp_path / "store", BRATS, progress=False)
    assert "cannot be read (Permission denied); check its permissions" in next(
        iter(report.failed.values())
    )


def test_a_channel_that_is_not_there(tmp_path, save, volume):
    path = save(tmp_path / "four.nii.gz", np.stack([volume()] * 2, axis=-1))
    with pytest.raises(InputError, match=r"has shape \(44, 40, 36, 2\) and no channel 2; correct"):
        ScanReader("case 'x'").read((path, 2), "t1")
    with pytest.raises(InputError, match=r"has shape \(44, 40, 36\) and no channel 0"):
        ScanReader("case 'x'").read((save(tmp_path / "three.nii.gz", volume()), 0), "t1")
