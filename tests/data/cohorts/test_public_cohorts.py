"""Cohorts as they are published, unpacked, converted and renamed."""

import gzip
import json

import nibabel as nib
import numpy as np
import pytest

from pmixseg.cli import main
from pmixseg.data.cohorts.inspection import inspect_cohort
from pmixseg.data.cohorts.layouts import find_cases, load_layout, search
from pmixseg.data.cohorts.patients import patient_of
from pmixseg.data.splits import Fractions, KFold
from pmixseg.data.store.store import Store, prepare
from pmixseg.errors import InputError
from pmixseg.task import BRATS
from tests.cli.presets import TINY, last_of_each
from tests.data.cohorts.layout_scenes import NEW, NEW_CODES, OLD_CODES, brats_files, check, describe

# ------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("stem", "layout"),
    [
        ("BraTS-GoAT-00003", "brats-goat"),
        ("BraTS-MET-00003-000", "brats2023"),
        ("BraTS-SSA-00003-000", "brats2023"),
        ("BraTS-MEN-00003-000", "brats2023"),
    ],
)
def test_challenges_of_2023_and_later(touch, stem, layout):
    check(find_cases(touch(*brats_files(stem, NEW, "-")), BRATS), layout, [stem], NEW_CODES)


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: n.replace(".nii.gz", ".NII.GZ"),
        lambda n: n.replace(".nii.gz", ".NII"),
        lambda n: n.replace(".nii.gz", ".mha"),
        lambda n: n.replace(".nii.gz", ".nrrd"),
        lambda n: n.replace("_flair", "_FLAIR").replace("_t1", "_T1").replace("_seg", "_Seg"),
        lambda n: n.replace("_t1ce", "_t1post"),
        lambda n: n.replace("_t1ce", "_T1_Gd"),
        lambda n: n.replace(".nii.gz", ".nii/0000012_brain.nii"),  # as some programs unpack
    ],
)
def test_other_spellings_of_files_are_read(make_case, tmp_path, rename):
    case = make_case("BraTS2021_00003")
    assert prepare([case], tmp_path / "a", BRATS, progress=False).prepared
    for path in [*case.images.values(), case.label]:
        other = path.parent / rename(path.name)
        other.parent.mkdir(exist_ok=True)
        if other.suffix in (".mha", ".nrrd"):
            itk = pytest.importorskip("SimpleITK")
            itk.WriteImage(itk.ReadImage(str(path)), str(other))
        elif not other.name.lower().endswith(".gz"):
            other.write_bytes(gzip.decompress(path.read_bytes()))
        if other != path and other.exists():
            path.unlink()
        else:
            path.rename(other)
    cohort = search(tmp_path / "cohort", BRATS)
    check(cohort.cases, "brats2021", ["BraTS2021_00003"], OLD_CODES)
    assert cohort.stray == [] and cohort.cases[0].label is not None
    assert prepare(cohort.cases, tmp_path / "b", BRATS, progress=False).prepared
    one, two = (Store.open(tmp_path / s).read(case.case_id) for s in "ab")
    np.testing.assert_array_equal(one.image, two.image)
    np.testing.assert_array_equal(one.label, two.label)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("IM0001.dcm", r"but IM0001\.dcm, which is DICOM: .* dcm2niix"),
        ("BraTS2021.tar", r"but BraTS2021\.tar, which is an archive: unpack it first"),
        ("p1/p1_seg.nii.gz", r"\(of layout 'brats' there are label maps and no scans\)"),
    ],
)
def test_files_that_are_not_read_are_named_as_the_cause(tmp_path, name, words):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=words):
        find_cases(tmp_path, BRATS)


# ------------------------------------------------------------------- other containers


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_itk_formats_are_read_as_nifti_is(make_case, tmp_path, ending):
    itk = pytest.importorskip("SimpleITK")
    case = make_case()
    assert prepare([case], tmp_path / "a", BRATS, progress=False).prepared
    for path in [*case.images.values(), case.label]:
        itk.WriteImage(itk.ReadImage(str(path)), str(path).replace(".nii.gz", ending))
        path.unlink()
    (same,) = find_cases(tmp_path / "cohort", BRATS)
    assert prepare([same], tmp_path / "b", BRATS, progress=False).prepared
    one, two = (Store.open(tmp_path / s).read(case.case_id) for s in "ab")
    np.testing.assert_array_equal(one.image, two.image)
    np.testing.assert_array_equal(one.label, two.label)
    np.testing.assert_allclose(one.geometry.affine, two.geometry.affine, atol=1e-5)
    damaged = tmp_path / "cohort" / case.case_id / f"{case.case_id}_t1{ending}"
    damaged.write_bytes(damaged.read_bytes()[:200])
    report = prepare([same], tmp_path / "b", BRATS, progress=False)
    assert f"_t1{ending} " in report.failed[case.case_id]


def as_nrrd(path, unit, place):
    """Rewrite a NIfTI file as NRRD by hand; ITK writes neither units nor files without a space."""
    image = nib.load(path)
    data = np.asarray(image.dataobj).astype("<i2")
    text = f"NRRD0005\ntype: short\ndimension: 3\nsizes: {' '.join(map(str, data.shape))}\n"
    text += "endian: little\nencoding: raw\n"
    if place:
        factor = {"mm": 1, "cm": 0.1, "m": 1e-3}.get(unit, 1)
        columns = (np.diag([-1, -1, 1, 1]) @ image.affine).T[:, :3] * factor
        *axes, origin = (f"({','.join(map(repr, c.tolist()))})" for c in columns)
        text += f"space: left-posterior-superior\nspace directions: {' '.join(axes)}\n"
        text += f'space origin: {origin}\nspace units: "{unit}" "{unit}" "{unit}"\n'
    path.with_name(path.name.replace(".nii.gz", ".nrrd")).write_bytes(
        text.encode() + b"\n" + data.tobytes(order="F")
    )
    path.unlink()


@pytest.mark.parametrize("unit", ["mm", "cm", "m"])
def test_units_of_nrrd_are_honoured(make_case, tmp_path, unit):
    pytest.importorskip("SimpleITK")
    case = make_case()
    for path in (*case.images.values(), case.label):
        as_nrrd(path, unit, place=True)
    (facts,) = inspect_cohort(tmp_path / "cohort", BRATS).cases
    assert facts.problems == () and facts.spacing == pytest.approx((1, 1, 1))


def test_an_unknown_unit_and_a_file_that_does_not_say_how_it_lies(make_case, tmp_path):
    pytest.importorskip("SimpleITK")
    case, silent = make_case(), make_case("BraTS2021_00002", labelled=False)
    make_case("BraTS2021_00003")
    as_nrrd(case.images["t2"], "furlong", place=True)
    for path in silent.images.values():
        as_nrrd(path, "mm", place=False)
    unit, lost = inspect_cohort(tmp_path / "cohort", BRATS).problems
    assert "t2.nrrd cannot be read (its space units are" in unit and "furlong" in unit
    assert "its scans do not say how they lie" in lost and "BraTS2021_00002" in lost


def test_without_itk_the_extra_is_named(make_case, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "SimpleITK", None)
    case = make_case()
    path = case.images["t1"]
    path.unlink()
    path.with_name(path.name.replace(".nii.gz", ".mha")).write_bytes(b"ObjectType = Image")
    (problem,) = inspect_cohort(tmp_path / "cohort", BRATS).problems
    assert "pip install 'pmixseg[itk]'" in problem


def test_vectors_as_itk_writes_them(make_case, save, tmp_path):
    case = make_case()
    channels = [np.asarray(nib.load(case.images[m]).dataobj) for m in ("flair", "t1", "t1ce", "t2")]
    affine = nib.load(case.label).affine
    root = tmp_path / "msd"
    save(root / "imagesTr" / "a.nii.gz", np.stack(channels, -1)[..., None, :], affine)
    save(root / "labelsTr" / "a.nii.gz", np.asarray(nib.load(case.label).dataobj) % 4, affine)
    describe(root, modality={"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}, labels=MSD_LABELS)
    assert prepare(find_cases(root, BRATS), tmp_path / "b", BRATS, progress=False).prepared
    prepare([case], tmp_path / "a", BRATS, progress=False)
    one, two = (Store.open(tmp_path / s) for s in "ab")
    np.testing.assert_array_equal(one.read(case.case_id).image, two.read("a").image)


# ------------------------------------------------------------------- dataset.json

MSD_LABELS = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}
CHANNELS = {"0": "T1", "1": "T1ce", "2": "T2", "3": "Flair"}
FILES = [f"imagesTr/c_000{i}.nii.gz" for i in range(4)] + ["labelsTr/c.nii.gz"]


@pytest.mark.parametrize(
    ("labels", "codes", "also"),
    [
        ({"background": "0", "edema": "1", "necrosis": "2", "enhancing tumor": "3"}, (2, 1, 3), {}),
        ({"Necrotic core": 1, "Peritumoral edema": 2, "GD-enhancing tumor": 4}, (1, 2, 4), {}),
        ({"necrotic and non-enhancing tumor core": 1, "Oedema": 2, "Enhancing": 3}, (1, 2, 3), {}),
        (
            {"whole_tumor": [1, 2, 3, 4], "tumor_core": [1, 2, 3], "enhancing_tumor": 1},
            (2, 4, 1),
            {3: "NCR"},
        ),
        ({"whole tumor": [1, 2, 3], "tumor core": ["2", 3], "enhancing tumor": 3}, (2, 1, 3), {}),
    ],
)
def test_usual_spellings_of_labels_are_read(touch, labels, codes, also):
    root = describe(touch(*FILES), channel_names=CHANNELS, labels={"background": 0, **labels})
    (case,) = find_cases(root, BRATS)
    assert tuple(case.codes[n] for n in ("NCR", "ED", "ET")) == codes and case.also == also


@pytest.mark.parametrize(
    "channels", [list(CHANNELS.values()), {v: int(k) for k, v in CHANNELS.items()}]
)
def test_channels_as_a_list_or_the_other_way_round(touch, channels):
    root = touch(*FILES)
    text = json.dumps({"channel_names": channels, "labels": {"NCR": 1, "ED": 2, "ET": 3}})
    (root / "dataset.json").write_text(text, encoding="utf-8-sig")  # with a byte order mark
    (case,) = find_cases(root, BRATS)
    numbers = {m: int(p.name[-8]) for m, p in case.images.items()}
    assert numbers == {"flair": 3, "t1ce": 1, "t1": 0, "t2": 2}


@pytest.mark.parametrize(
    "content",
    [
        {"channel_names": CHANNELS, "labels": {"a": None}},
        {"channel_names": CHANNELS, "labels": {"a": [[1]]}},
        {"channel_names": CHANNELS, "labels": {"a": []}},
        {"channel_names": CHANNELS, "labels": [1, 2]},
        {"channel_names": CHANNELS, "labels": {"a": 1.5}},
        {"channel_names": {"x": "y"}, "labels": {}},
        {"channel_names": {"0": None}, "labels": {}},
        {"channel_names": "T1", "labels": {}},
        [1],
        {"channel_names": CHANNELS, "labels": {"a": 1, "b": 1, "c": 1}},
    ],
)
def test_damaged_descriptions_are_told_once(touch, content):
    root = touch(*FILES)
    (root / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as told:
        find_cases(root, BRATS)
    assert str(told.value).count("dataset.json") == 1


def test_the_ignore_label_of_nnunet_is_read_or_made_background(touch):
    labels = {"background": 0, "edema": 1, "necrosis": 2, "enhancing tumor": 3, "ignore": 4}
    root = describe(touch(*FILES), channel_names=CHANNELS, labels=labels)
    (case,) = find_cases(root, BRATS)
    assert case.ignored == case.unannotated == (4,)
    names = {"NCR": "necrosis", "ED": "edema", "ET": "enhancing tumor"}
    (case,) = find_cases(root, BRATS, labels=names)
    assert case.codes == {"NCR": 2, "ED": 1, "ET": 3} and case.ignored == (4,)
    assert not case.unannotated


def test_labels_can_be_named_by_hand(make_case, touch, tmp_path, capsys):
    root = describe(touch(*FILES), channel_names=CHANNELS, labels={"bg": 0, "x": 1, "y": 2, "z": 7})
    with pytest.raises(InputError, match=r"cannot be matched .* --labels NCR=x"):
        find_cases(root, BRATS)
    (case,) = find_cases(root, BRATS, labels={"NCR": "x", "ED": 2, "ET": "z"})
    assert case.codes == {"NCR": 1, "ED": 2, "ET": 7}
    with pytest.raises(InputError, match=r"'w' is given for ET; give a number, or one of x"):
        find_cases(root, BRATS, labels={"NCR": "x", "ED": 2, "ET": "w"})
    case = make_case(name="BraTS2021_00009")
    image = nib.load(case.label)
    data = np.array(image.dataobj)
    table = np.array([0, 5, 2, 0, 6], np.uint8)
    nib.save(nib.Nifti1Image(table[data], image.affine), case.label)
    here = str(case.label.parents[1] / case.case_id)
    with pytest.raises(InputError, match=r"^these labels: nothing is given for ET; give a number"):
        find_cases(here, BRATS, labels={"NCR": 5, "ED": 2})
    flags = ["--labels", "NCR=5", "ED=2", "ET=6"]
    assert main(["inspect", here]) == 1 and "label values 5, 6" in capsys.readouterr().out
    assert main(["inspect", here, *flags]) == 0
    assert main(["prepare", here, str(tmp_path / "s"), "--workers", "0", *flags]) == 0
    label = Store.open(tmp_path / "s").read(case.case_id).native_label()
    np.testing.assert_array_equal(label, np.array([0, 1, 2, 0, 3])[data])
    by_hand = tmp_path / "labels.yaml"
    by_hand.write_text("data: {labels: {NCR: 5, ED: 2, ET: [6]}}")
    for how, extra in {
        "flag": ["--data.labels={NCR: 5, ED: 2, ET: 6}"],
        "yaml": [f"--config={by_hand}"],
    }.items():
        fit = ["fit", f"--data.root={here}", f"--data.store={tmp_path / how}", f"--run={tmp_path}"]
        nothing = ["--data.split.train=1", "--data.split.val=0", "--data.split.test=0"]
        assert main(last_of_each([*fit, *extra, *TINY, *nothing, "--trainer.max_epochs=0"])) == 0
        other = Store.open(tmp_path / how).read(case.case_id).native_label()
        np.testing.assert_array_equal(other, label)
    assert main(["inspect", here, "--labels", "NCR"]) == 1
    assert "not of the form LABEL=NAME" in capsys.readouterr().err


# ------------------------------------------------------------------- patients


def visits_of(layout, touch):
    ids = [f"BraTS-GLI-{p:05d}-{v}" for p in range(10) for v in (100, 101)]
    if layout == "brats2024":
        return touch(*(f for i in ids for f in brats_files(i, NEW, "-")))
    if layout == "msd":
        root = touch(*(f"imagesTr/{i}.nii.gz" for i in ids))
        return describe(root, modality={v: k for k, v in CHANNELS.items()}, labels=MSD_LABELS)
    root = touch(*(f"imagesTr/{i}_{c:04d}.nii.gz" for i in ids for c in range(4)))
    return describe(root, channel_names=CHANNELS, labels={"NETC": 1, "SNFH": 2, "ET": 3, "RC": 4})


@pytest.mark.parametrize("plan", [Fractions(), Fractions(seed=3), KFold(1)], ids="abc")
@pytest.mark.parametrize("layout", ["brats2024", "msd", "nnunet"])
def test_visits_of_a_patient_stay_together(touch, layout, plan):
    cohort = search(visits_of(layout, touch), BRATS)
    assert {c.layout for c in cohort.cases} == {layout} and cohort.remarks == ()
    split = plan.split(cohort.cases)
    parts = [
        {name.rsplit("-", 1)[0] for name in part} for part in (split.train, split.val, split.test)
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 10


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("BraTS-MET-00005-001", "BraTS-MET-00005"),
        ("Brats18_CBICA_AAB_1", "Brats18_CBICA_AAB"),
        ("UPENN-GBM-00002_21", "UPENN-GBM-00002"),
        ("PatientID_0003_Timepoint_2", "PatientID_0003"),
        ("sub-anna_ses-1", "sub-anna"),
        ("sub-01_ses-preop_run-2", "sub-01"),
        ("P001_3months", "P001"),
        ("p12_post-RT", "p12"),
        ("p12_recurrence", "p12"),
        ("HGG12_M12", "HGG12_M12"),
        ("P07-2019-03-12", "P07"),
        ("pat12_baseline", "pat12"),
        ("x7_v1", "x7"),
        ("UCSF-PDGM-0541_FU007d", "UCSF-PDGM-0541"),
        ("Patient-001_week-000-1", "Patient-001"),
        ("s01_ses-02_run-1", "s01"),
        # numbers of patients, not of visits
        ("BRATS_001", "BRATS_001"),
        ("phantom_007", "phantom_007"),
        ("my_scan_12", "my_scan_12"),
        ("MR_20451234", "MR_20451234"),
        ("BraTS2021_00000", "BraTS2021_00000"),
        ("BraTS20_Training_001", "BraTS20_Training_001"),
    ],
)
def test_patients_by_the_names_of_cases(name, patient):
    assert patient_of(name) == patient


@pytest.mark.parametrize("visits", ["1 2", "post pre", "m06 m12", "MR1 MR2", "BL FU2b"])
def test_names_that_look_like_visits_are_remarked_upon(touch, visits):
    names = [f"p{p}_{visit}" for p in range(3) for visit in visits.split()]
    (remark,) = search(touch(*(f for n in names for f in brats_files(n))), BRATS).remarks
    assert f"{names[0]}, {names[1]} may be visits of one" in remark


def test_names_that_tell_no_patient_are_remarked_upon(touch, capsys):
    names = [
        f"imagesTr/p{p}-{v}_{c:04d}.nii.gz" for p in range(3) for v in (1, 2) for c in range(4)
    ]
    root = describe(touch(*names), channel_names=CHANNELS, labels={"NCR": 1, "ED": 2, "ET": 3})
    (remark,) = search(root, BRATS).remarks
    assert "p0-1, p0-2 may be visits of one" in remark and "name the patient" in remark
    assert main(["inspect", str(root)]) == 1  # empty files
    assert "patients are not recognised" in capsys.readouterr().out
    assert main(["prepare", str(root), str(root.parent / "s"), "--workers", "0"]) == 1
    assert "patients are not recognised" in capsys.readouterr().out
    layout = root.parent / "own.yaml"
    layout.write_text("base: nnunet\npatient: '(p.*)-.*'\n")
    cohort = search(root, BRATS, layout)
    assert {c.patient for c in cohort.cases} == {"p0", "p1", "p2"} and cohort.remarks == ()


@pytest.mark.parametrize("pattern", ["(", "p.*", "(a" * 3])
def test_patterns_that_name_no_patient(tmp_path, pattern):
    path = tmp_path / "own.yaml"
    path.write_text(f"base: nnunet\npatient: '{pattern}'\n")
    with pytest.raises(InputError, match="patient"):
        load_layout(path)
