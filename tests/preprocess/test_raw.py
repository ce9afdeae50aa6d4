"""Phantoms with a skull, moved by known amounts: registered, cut out, segmented, brought back."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage

from pmixseg.backbones import Backbone
from pmixseg.cli import main
from pmixseg.data.cohorts.cases import Case
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.formats.headers import unit_of
from pmixseg.data.formats.nifti import ScanReader
from pmixseg.data.formats.outputs import nifti_image
from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.scans import SegmentSettings
from pmixseg.inference.outputs import Outputs
from pmixseg.inference.raw import RawSettings, segment_raw
from pmixseg.modules import StudentModule
from pmixseg.modules.preparation import Preparation
from pmixseg.preprocess import cohort, pipeline, preprocess_scans
from pmixseg.preprocess.atlas import Atlas
from pmixseg.preprocess.brain import brain_mask
from pmixseg.preprocess.cohort import preprocess_cohort
from pmixseg.preprocess.itk import image_of
from pmixseg.preprocess.pipeline import Preprocessed
from pmixseg.preprocess.registration import register
from pmixseg.task import BRATS
from pmixseg.types import Latents, SegOutput

SCALP = {"bright": 1.6, "mid": 0.8}
"""Fat of the scalp against the mean of the brain."""


def add_skull(brain: sitk.Image, scalp: str = "bright") -> sitk.Image:
    """Put cerebrospinal fluid, bone and scalp around a brain whose background is 0."""
    values = sitk.GetArrayFromImage(brain)
    size = brain.GetSpacing()[0]
    outside = ndimage.distance_transform_edt(values == 0) * size
    level = values[values > 0].mean()
    head = values.copy()
    head[(outside > 0) & (outside <= 3)] = 0.3 * level
    head[(outside > 3) & (outside <= 8)] = 0.05 * level
    head[(outside > 8) & (outside <= 14)] = SCALP[scalp] * level
    noise = np.random.default_rng(0).normal(0, 0.02 * level, values.shape)
    image = sitk.GetImageFromArray((head + np.abs(noise)).astype(np.float32))
    image.CopyInformation(brain)
    return image


def move(image: sitk.Image, degrees, shift, spacing) -> tuple[sitk.Image, sitk.Transform]:
    """Image a head that lies elsewhere in the scanner.

    Returns:
        The scan, and the true transform: points of the anatomy -> points of the scan.
    """
    middle = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])
    true = sitk.Euler3DTransform()
    true.SetCenter(middle)
    true.SetRotation(*np.radians(degrees).tolist())
    true.SetTranslation(np.asarray(shift, float).tolist())
    extent = np.asarray(image.GetSize()) * np.asarray(image.GetSpacing())
    shape = [round(e / s) for e, s in zip(extent, spacing, strict=True)]
    scan = sitk.Resample(
        image,
        shape,
        true.GetInverse(),
        sitk.sitkLinear,
        image.GetOrigin(),
        spacing,
        image.GetDirection(),
        0.0,
        sitk.sitkFloat32,
    )
    return scan, true


SCANS = {  # degrees, mm, voxel size
    "t1ce": ((4.0, -3.0, 6.0), (5.0, -8.0, 4.0), (2.0, 2.0, 2.0)),
    "flair": ((-5.0, 2.0, -7.0), (-9.0, 6.0, -3.0), (1.8, 1.8, 3.0)),
}


class Bright(Backbone):
    """Calls oedema whatever is brighter in FLAIR than 1.2 standard deviations."""

    def __init__(self, modalities=BRATS.modalities, num_classes=4):
        super().__init__(modalities, num_classes, [1], [1])

    def encode(self, image, present):
        return Latents([image[:, :, None]], self.modalities, [present])

    def decode(self, latents):
        flair = latents.masked(0)[:, 0, 0]
        rest = torch.zeros_like(flair)
        return SegOutput(torch.stack([rest, rest - 9, 9 * (flair - 1.2), rest - 9], 1), latents)


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """Files of a moved head, the true transforms, and the head as it was."""
    folder = tmp_path_factory.mktemp("raw")
    write_cohort(folder / "cohort", 1, seed=5, settings=PhantomSettings(spacing=2.0))
    files, truth, brains = {}, {}, {}
    for modality, (degrees, shift, spacing) in SCANS.items():
        (path,) = (folder / "cohort").rglob(f"*_{modality}.nii.gz")
        brains[modality] = path
        brain = sitk.ReadImage(str(path), sitk.sitkFloat32)
        head = add_skull(brain, "bright" if modality == "t1ce" else "mid")
        scan, truth[modality] = move(head, degrees, shift, spacing)
        files[modality] = folder / f"x_{modality}.nii.gz"
        sitk.WriteImage(scan, str(files[modality]))
        if modality == "t1ce":
            mask, _ = move(sitk.Cast(brain > 0, sitk.sitkFloat32), degrees, shift, spacing)
            sitk.WriteImage(sitk.Cast(mask > 0.5, sitk.sitkUInt8), str(folder / "mask.nii.gz"))
    return {"files": files, "truth": truth, "brains": brains, "mask": folder / "mask.nii.gz"}


@pytest.fixture(scope="module")
def ready(patient):
    return preprocess_scans(patient["files"], "x", brain=str(patient["mask"]))


@pytest.fixture(scope="module")
def module():
    made = StudentModule(backbone=Bright(), fill="zero")
    made.preparation = Preparation(normalisation="zscore-own-mask", patch=(32,) * 3)
    return made.eval()


def difference(first: sitk.Euler3DTransform, second: sitk.Euler3DTransform) -> tuple[float, float]:
    """Largest shift in mm over a sphere of 80 mm, a brain; and the rotation in degrees."""
    corners = 80.0 * np.vstack([np.eye(3), -np.eye(3)]) + first.GetCenter()
    moved = [np.array([t.TransformPoint(p.tolist()) for p in corners]) for t in (first, second)]
    shift = np.linalg.norm(moved[0] - moved[1], axis=1).max()
    one, two = (np.reshape(t.GetMatrix(), (3, 3)) for t in (first, second))
    return shift, np.degrees(np.arccos(np.clip((np.trace(one.T @ two) - 1) / 2, -1, 1)))


def test_sequences_are_registered_within_a_millimetre_and_a_degree(patient, ready):
    centre, other = (ready.transforms[m] for m in ("t1ce", "flair"))
    transform = register(*(ready.sources[m] for m in ("t1ce", "flair")))
    truth = patient["truth"]
    expected = sitk.Euler3DTransform()
    matrices = {m: np.reshape(t.GetMatrix(), (3, 3)) for m, t in truth.items()}
    expected.SetMatrix((matrices["flair"] @ matrices["t1ce"].T).ravel().tolist(), 1e-6)
    origin = truth["flair"].TransformPoint(truth["t1ce"].GetInverse().TransformPoint((0, 0, 0)))
    expected.SetTranslation(origin)
    shift, turn = difference(transform, expected)
    assert shift < 1.0
    assert turn < 1.0
    # What is kept joins the same two steps: scan to scan goes through the atlas and out again.
    point = (100.0, -130.0, 60.0)
    there = other.TransformPoint(centre.GetInverse().TransformPoint(point))
    assert np.linalg.norm(np.subtract(there, transform.TransformPoint(point))) < 1e-3


def test_the_atlas_grid_is_that_of_brats_and_the_background_is_0(ready):
    for scan in ready.scans.values():
        assert scan.GetSize() == (240, 240, 155)
        assert scan.GetSpacing() == (1.0, 1.0, 1.0)
        values = sitk.GetArrayFromImage(scan)
        assert (values[sitk.GetArrayFromImage(ready.mask) == 0] == 0).all()
    assert ready.centre == "t1ce"


def test_a_head_keeps_its_size(patient, ready):
    own = sitk.ReadImage(str(patient["mask"]))
    ml = [
        sitk.GetArrayFromImage(m).sum() * np.prod(m.GetSpacing()) / 1000 for m in (own, ready.mask)
    ]
    assert ml[1] == pytest.approx(ml[0], rel=0.01)


@pytest.mark.slow
def test_the_atlas_finds_most_of_the_brain_by_itself(patient, ready):
    rough = preprocess_scans({"t1ce": patient["files"]["t1ce"]}, "x")
    a, b = (sitk.GetArrayFromImage(m.mask) > 0 for m in (rough, ready))
    assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.88


def test_a_result_comes_back_where_the_tumour_is(patient, ready, module, tmp_path, monkeypatch):
    raw = RawSettings(brain=str(patient["mask"]))

    def registered(images, name, *, brain, atlas, centre):
        """Registered already, with the same arguments."""
        assert (images, name) == (patient["files"], "x")
        assert (brain, atlas, centre) == (str(patient["mask"]), None, None)
        return ready

    monkeypatch.setattr("pmixseg.inference.raw.preprocess_scans", registered)
    result = segment_raw(module, patient["files"], Outputs(tmp_path), raw=raw, name="x")
    segmented = nib.load(result.files["seg"])
    source = nib.load(patient["files"]["t1ce"])
    assert segmented.shape == source.shape
    assert result.codes == {"NCR": 1, "ED": 2, "ET": 3}
    np.testing.assert_allclose(segmented.affine, source.affine, atol=1e-4)

    direct = module.segment(patient["brains"])  # without the detour, then moved as the head was
    image = sitk.ReadImage(str(patient["brains"]["t1ce"]))
    label = sitk.GetImageFromArray(direct.classes.transpose(2, 1, 0).astype(np.uint8))
    label.CopyInformation(image)
    grid = sitk.ReadImage(str(patient["files"]["t1ce"]))
    moved = sitk.Resample(
        label, grid, patient["truth"]["t1ce"].GetInverse(), sitk.sitkNearestNeighbor, 0
    )
    a = sitk.GetArrayFromImage(moved).transpose(2, 1, 0) > 0
    b = np.asarray(segmented.dataobj) > 0
    assert a.sum() > 500
    assert 2 * (a & b).sum() / (a.sum() + b.sum()) >= 0.9


def test_a_refusal_tells_what_preprocessing_doubted(patient, ready, tmp_path, monkeypatch):
    doubted = replace(ready, notes=("the brain mask has 5 ml; give a better one.",))
    monkeypatch.setattr("pmixseg.inference.raw.preprocess_scans", lambda *_, **__: doubted)
    model = StudentModule(backbone=Bright(), fill="zero").eval()  # it knows no preparation
    with pytest.raises(InputError) as told:
        segment_raw(model, patient["files"], Outputs(tmp_path), name="x")
    assert str(told.value).endswith(" Before that: the brain mask has 5 ml; give a better one.")


@pytest.mark.slow
def test_everything_is_kept(patient, module, tmp_path):
    raw = RawSettings(brain=str(patient["mask"]), onto="flair")
    result = segment_raw(module, patient["files"], Outputs(tmp_path), raw=raw, name="x")
    assert nib.load(result.files["seg"]).shape == nib.load(patient["files"]["flair"]).shape
    home = tmp_path / "atlas" / "x"
    names = {p.name for p in home.iterdir()}
    for m in SCANS:
        assert {f"x_{m}.nii.gz", f"x_{m}.tfm"} <= names
        sitk.ReadTransform(str(home / f"x_{m}.tfm"))
    assert {"x_brain.nii.gz", "x_seg.nii.gz", "x_seg.json", "x_preprocess.json"} <= names
    assert json.loads((home / "x_preprocess.json").read_text())["centre"] == "t1ce"
    assert any("atlas space" in note for note in result.warnings)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"brain": "nowhere.nii.gz"}, "does not exist"),
        ({"brain": "hd-bet"}, "on the PATH"),
        ({"centre": "t2"}, "centre t2 is none of its"),
        ({"atlas": Path("nowhere.nii")}, "does not exist"),
    ],
)
def test_what_is_not_there_is_refused_in_a_sentence(patient, change, sentence, monkeypatch):
    monkeypatch.setenv("PATH", "")
    if "brain" in change:
        atlas = type("A", (), {"grid": None, "brain": None})
        with pytest.raises(InputError, match=sentence):
            brain_mask(None, change["brain"], atlas, (None, None))
        return
    with pytest.raises(InputError, match=sentence):
        preprocess_scans({"t1ce": patient["files"]["t1ce"]}, "x", **change)


def test_files_that_show_no_head(tmp_path):
    flat, vectors = tmp_path / "flat.nii.gz", tmp_path / "vectors.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4)), flat)
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8, 3), np.float32), np.eye(4)), vectors)
    (tmp_path / "text.nii.gz").write_text("no scan")
    (tmp_path / "half.img").write_bytes(bytes(9999))
    nib.save(nib.Nifti1Image(np.arange(128.0).reshape(8, 8, 2), np.eye(4)), tmp_path / "two.nii.gz")
    for path, sentence in (
        (flat, "shows no head"),
        (vectors, "one volume of three axes is needed"),
        (tmp_path / "text.nii.gz", "is not a NIfTI file"),
        (tmp_path / "none.nii.gz", "does not exist"),
        (tmp_path / "half.img", "one half of a pair, and half.hdr does not lie beside it; copy"),
        (tmp_path / "two.nii.gz", "has 2 slices along an axis, too few to be registered"),
    ):
        with pytest.raises(InputError, match=sentence):
            preprocess_scans({"t1": path}, "x")


@pytest.fixture
def still(tmp_path, monkeypatch):
    """A small head that lies in its atlas as it came; and a function that saves arrays there."""
    affine = np.array([[-4.0, 0, 0, 46], [0, 4, 0, -46], [0, 0, 4, -30], [0, 0, 0, 1]])  # as LAS
    rng = np.random.default_rng(0)
    near = np.linalg.norm(np.indices((24, 24, 16)).T - (11.5, 11.5, 7.5), axis=-1).T < 7
    head = (rng.integers(100, 900, near.shape) * near).astype(np.int16)
    brain = image_of(near.astype(np.uint8), affine)
    one = sitk.Euler3DTransform(), sitk.AffineTransform(3)
    monkeypatch.setattr(pipeline, "mni152", lambda: Atlas(brain, brain, brain))
    monkeypatch.setattr(pipeline, "place_in_atlas", lambda *_: one)

    def save(name, values=head, place=affine, unit="mm"):
        image = nib.Nifti1Image(values, place)
        image.header.set_zooms([4 * (0.001 if unit == "meter" else 1)] * 3)
        image.header.set_xyzt_units(unit)
        nib.save(image, tmp_path / name)
        return tmp_path / name

    return head, affine, save


def test_a_transform_does_not_depend_on_the_threads(still):
    head, affine, _ = still
    scan = image_of(head.astype(np.float32), affine)
    moved, _ = move(scan, (4, 0, 5), (3, -4, 2), (4.0, 4.0, 5.0))
    process = sitk.ProcessObject
    usual, made = process.GetGlobalDefaultNumberOfThreads(), set()
    try:
        for threads in (1, 2, 3, 5):
            process.SetGlobalDefaultNumberOfThreads(threads)
            made.add(register(scan, moved).GetParameters())
            assert process.GetGlobalDefaultNumberOfThreads() == threads
    finally:
        process.SetGlobalDefaultNumberOfThreads(usual)
    assert len(made) == 1


def test_scans_that_do_not_meet_are_named(still, monkeypatch):
    def fail(*_):
        raise RuntimeError(
            "in itkMetric.hxx:12:\nITK ERROR: Metric(0x55c): All samples map outside."
        )

    monkeypatch.setattr("pmixseg.preprocess.registration._score", fail)
    images = {"t1": still[2]("a.nii.gz"), "t1ce": still[2]("b.nii.gz")}
    words = r"^case 'x': t1 and t1ce cannot be registered \(All samples map outside\); check that"
    with pytest.raises(InputError, match=words):
        preprocess_scans(images, "x")


BRATS_2024 = {"codes": {"NCR": 1, "ED": 2, "ET": 3}, "ignored": (4,)}
PAEDIATRIC = {"codes": {"NCR": 2, "ED": 4, "ET": 1}, "also": {3: "NCR"}}


@pytest.mark.parametrize(
    ("coding", "expected", "told"),
    [
        (BRATS_2024, [0, 1, 2, 4, 0], "label value 4 is ignored, it becomes background: 1 voxel"),
        (PAEDIATRIC, [0, 4, 1, 1, 2], ""),
        ({**BRATS_2024, "unannotated": (4,)}, None, "nobody annotated"),
    ],
)
def test_labels_keep_their_meaning(still, tmp_path, coding, expected, told):
    """Numbers of the layout become those of the result's; float files leave noise on them."""
    head, _, save = still
    label = np.zeros(head.shape)
    label[10, 10, 4:9] = [0, 1.00002, 2.00007, 2.99995, 4]
    case = Case("x", {"t1": save("t1.nii.gz")}, save("seg.nii.gz", label), **coding)
    mask = save("m.nii", np.uint8(head > 0))
    (done,) = preprocess_cohort([case], tmp_path / "out", brain=mask, workers=0)
    assert done.problem is None and told in " ".join(done.notes[1:])  # after that on a small brain
    assert len(done.notes) == (2 if expected else 3) - (told == "")
    (made,) = find_cases(tmp_path / "out", BRATS)
    if expected is None:
        assert made.label is None
        return
    assert made.codes == {"NCR": 1, "ED": 2, "ET": 4}
    assert np.asarray(nib.load(made.label).dataobj)[10, 10, 4:9].tolist() == expected
    reader = ScanReader("x")
    assert reader.read(made.label, "label") and reader.read(made.images["t1"], "t1")
    assert not reader.predicted  # an annotation, and no result of this package


def test_a_result_in_the_place_of_a_label_becomes_no_annotation(still, tmp_path):
    head, affine, save = still
    drawn = nifti_image(np.uint8(head > 500), affine)
    nib.save(drawn, tmp_path / "seg.nii.gz")
    case = Case("x", {"t1": save("t1.nii.gz")}, tmp_path / "seg.nii.gz", codes=BRATS_2024["codes"])
    mask, out = save("m.nii", np.uint8(head > 0)), tmp_path / "out"
    (done,) = preprocess_cohort([case], out, brain=mask, workers=0)
    assert "its label is a result of pmixseg, so it is left without a label" in done.notes
    assert not [*out.rglob("*_seg.nii.gz")]
    save("t1.nii.gz", np.ones_like(head))
    (done,) = preprocess_cohort([case], out, brain=mask, workers=0)
    assert done.problem.endswith(f"no head. What an earlier run made of it stays in {out / 'x'}.")
    (out / "x" / "x_preprocess.json").unlink()  # then it may be of anybody
    (done,) = preprocess_cohort([case], out, brain=mask, workers=0)
    assert done.problem.endswith("no head.")


def test_every_format_unit_and_silence_is_read_as_elsewhere(still, module, tmp_path):
    head, affine, save = still
    mask = save("mask.nii", np.uint8(head > 0))
    force, raw = SegmentSettings(force=True), RawSettings(brain=str(mask))

    def segmented(path):
        folder = tmp_path / path.name.split(".")[0]
        return segment_raw(module, {"flair": path}, Outputs(folder), force, raw)

    usual = segmented(save("mm.nii.gz"))
    sitk.WriteImage(image_of(head, affine), str(tmp_path / "itk.mha"))
    voxels = np.asarray(nib.load(usual.files["seg"]).dataobj)
    assert (voxels == 2).any()
    metres = save("m.nii.gz", place=np.diag([0.001] * 3 + [1]) @ affine, unit="meter")
    for path, unit in ((tmp_path / "itk.mha", 1), (metres, 1000)):
        made = segmented(path)
        file = nib.load(made.files["seg"])
        np.testing.assert_array_equal(file.dataobj, voxels)
        np.testing.assert_allclose(file.affine * [[unit], [unit], [unit], [1]], affine, rtol=1e-6)
        assert unit_of(file.header) == unit
        assert made.volumes == pytest.approx(usual.volumes)
    assert "how they lie" not in " ".join(usual.warnings)
    silent = segmented(save("silent.nii.gz", place=None))
    assert "its scans flair do not say how they lie" in " ".join(silent.warnings)


def test_a_case_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    scan = sitk.GetImageFromArray(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    scan.SetSpacing((1, 2, 3))
    scan.SetOrigin((5, 6, 7))
    scan.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
    mask = sitk.Cast(scan > 3, sitk.sitkUInt8)
    one = sitk.Euler3DTransform()
    done = Preprocessed("x", {"t1": scan}, mask, "t1", {"t1": scan}, {"t1": one})
    # A shell starts what runs in the background with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as full:
        full.setattr(sitk, "WriteTransform", lambda _, path: Path(path).touch())
        with pytest.raises(InputError, match=r"x cannot be written \(No space left"):
            done.save(tmp_path, mask)
        full.setattr(cohort, "preprocess_scans", lambda *_, **__: done)
        cases = [Case(name, {"t1": tmp_path / "t1.nii"}, None, {}) for name in "xy"]
        with pytest.raises(InputError, match="No space left"):  # not once a case
            next(preprocess_cohort(cases, tmp_path, workers=0))
        full.setattr(sitk, "WriteTransform", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            done.save(tmp_path, mask)
    assert not [*tmp_path.iterdir()]
    files = done.save(tmp_path, mask)
    assert len([*(tmp_path / "x").iterdir()]) == 5
    (tmp_path / "x" / "mine.txt").write_text("kept")
    assert done.save(tmp_path) == files
    home = tmp_path / "x"
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and len([*home.iterdir()]) == 5
    assert not (home / "x_seg.nii.gz").exists()  # this run has none
    done.save(tmp_path, mask)
    before = (home / "x_brain.nii.gz").read_bytes()
    nib.save(nib.Nifti1Image(np.ones((4, 3, 2)), np.eye(4)), files["t1"])
    with pytest.raises(
        InputError, match=r"x_t1\.nii\.gz is there already and no result of pmixseg"
    ):
        done.save(tmp_path)  # a scan of somebody's own
    assert (home / "x_brain.nii.gz").read_bytes() == before and len([*home.iterdir()]) == 6
    files["t1"].unlink()
    done.save(tmp_path, mask)
    for path, image in ((files["t1"], scan), (home / "x_seg.nii.gz", mask)):
        back = sitk.ReadImage(str(path))
        np.testing.assert_array_equal(*map(sitk.GetArrayFromImage, (back, image)))
        for where in ("GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(back, where)(), getattr(image, where)(), atol=1e-6)


@pytest.mark.slow
def test_the_command_writes_a_cohort_and_tells_what_failed(patient, tmp_path, capsys):
    root = tmp_path / "raw"
    for case in ("BraTS2021_00001", "BraTS2021_00002"):
        (root / case).mkdir(parents=True)
    good = root / "BraTS2021_00001"
    (good / "BraTS2021_00001_t1ce.nii.gz").symlink_to(patient["files"]["t1ce"])
    (good / "BraTS2021_00001_seg.nii.gz").symlink_to(patient["mask"])
    bad = nib.Nifti1Image(np.ones((9, 9, 9), np.float32), np.eye(4))
    nib.save(bad, root / "BraTS2021_00002" / "BraTS2021_00002_t1.nii.gz")
    flags = ["--brain", str(patient["mask"])]
    command = ["preprocess", str(root), str(tmp_path / "out"), *flags]
    assert main([*command, "--part=1/2"]) == 0
    said = capsys.readouterr().out
    assert "1 case in" in said and "BraTS2021_00002" not in said
    assert main([*command, "--part=2/2"]) == 1
    said = capsys.readouterr().out
    assert "0 cases in" in said and "BraTS2021_00002" in said
    label = nib.load(tmp_path / "out/BraTS2021_00001/BraTS2021_00001_seg.nii.gz")
    brain = nib.load(tmp_path / "out/BraTS2021_00001/BraTS2021_00001_brain.nii.gz")
    np.testing.assert_array_equal(np.asarray(label.dataobj), np.asarray(brain.dataobj))
