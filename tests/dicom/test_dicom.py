"""A study in DICOM: read, segmented, written as DICOM-SEG, and told without the patient."""

import gzip
import shutil
import warnings
from contextlib import contextmanager

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from highdicom.color import CIELabColor
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, generate_uid

from pmixseg.cli import main
from pmixseg.data.formats.colours import class_colours
from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
from pmixseg.dicom import is_dicom_folder, read_folder, recognise, write_segmentation
from pmixseg.dicom.example import (
    PROTOCOLS,
    Person,
    Protocol,
    decimals,
    header,
    write_series,
    write_study,
)
from pmixseg.dicom.recognition import choose
from pmixseg.errors import InputError
from pmixseg.inference.dicom import segment_study
from pmixseg.inference.outputs import Outputs
from pmixseg.task import BRATS
from tests.inference.tiny_models import Glance, save, tiny_student

PATIENT = Person("Doe^Jane", "PAT-4711", "19700101")
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"


def write_enhanced(path, values, affine, number, protocol, study, person):
    """Write all slices as one enhanced multi-frame object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / spacing
    ds = header(ENHANCED_MR, number, protocol, study, person)
    ds.SeriesInstanceUID, ds.FrameOfReferenceUID = generate_uid(), generate_uid()
    ds.InstanceNumber, ds.NumberOfFrames = 1, values.shape[2]
    ds.Rows, ds.Columns = values.shape[1], values.shape[0]
    organisation, index = Dataset(), Dataset()
    organisation.DimensionOrganizationUID = index.DimensionOrganizationUID = generate_uid()
    index.DimensionIndexPointer = 0x00200032
    index.FunctionalGroupPointer = 0x00209113
    ds.DimensionOrganizationSequence, ds.DimensionIndexSequence = [organisation], [index]
    shared, measures, orientation, echo, timing = (Dataset() for _ in range(5))
    measures.PixelSpacing = decimals([spacing[1], spacing[0]])
    measures.SliceThickness = decimals([spacing[2]])[0]
    orientation.ImageOrientationPatient = decimals([*axes[:, 0], *axes[:, 1]])
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    echo.EffectiveEchoTime, timing.RepetitionTime = protocol.echo, protocol.repetition
    shared.MREchoSequence, shared.MRTimingAndRelatedParametersSequence = [echo], [timing]
    if protocol.inversion is not None:
        modifier = Dataset()
        modifier.InversionTimes = protocol.inversion
        shared.MRModifierSequence = [modifier]
    ds.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for k in range(values.shape[2]):
        frame, position, content = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = decimals(lps @ [0, 0, k, 1])[:3]
        content.DimensionIndexValues = [k + 1]
        frame.PlanePositionSequence, frame.FrameContentSequence = [position], [content]
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    ds.PixelData = np.ascontiguousarray(values.transpose(2, 1, 0).astype(np.uint16)).tobytes()
    pydicom.dcmwrite(path, ds, enforce_file_format=True)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Modality -> NIfTI of a phantom brain of 4 mm."""
    root = tmp_path_factory.mktemp("phantom")
    write_cohort(root, 1, seed=4, settings=PhantomSettings(spacing=4.0))
    return {m: next(root.rglob(f"*_{m}.nii.gz")) for m in BRATS.modalities}


@pytest.fixture(scope="module")
def study(scans, tmp_path_factory):
    """All four sequences mixed in one folder, FLAIR enhanced; and a localiser."""
    folder = tmp_path_factory.mktemp("study")
    write_study(folder, {m: scans[m] for m in ("t1ce", "t1", "t2")}, PATIENT)
    (uid,) = {pydicom.dcmread(p).StudyInstanceUID for p in folder.iterdir()}
    image = nib.load(scans["flair"])
    values, flair = np.asarray(image.dataobj), PROTOCOLS["flair"]
    write_enhanced(folder / "f.dcm", values, image.affine, 5, flair, uid, PATIENT)
    few = values[:, :, :3]
    write_series(folder, few, image.affine, 1, Protocol("localizer"), uid, PATIENT)
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny_student(16, backbone=Glance())


def test_every_series_is_told_with_its_reason(study):
    told = {r.series.number: r for r in recognise(read_folder(study), BRATS.modalities)}
    assert [told[n].modality for n in (1, 2, 3, 4, 5)] == [None, "t1ce", "t1", "t2", "flair"]
    assert told[1].reason == "only 3 slices"
    assert "contrast agent" in told[2].reason
    assert "TI 2500" in told[5].reason
    assert is_dicom_folder(study)


def same(made, scan):
    """Whether two images have the same voxels at the same places, in whatever order of axes."""
    first, second = (nib.as_closest_canonical(image) for image in (made, scan))
    np.testing.assert_allclose(first.affine, second.affine, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))


def test_volumes_are_the_scans(study, scans):
    recognised = recognise(read_folder(study), BRATS.modalities)
    for m, s in choose(recognised, BRATS.modalities).items():
        same(s.volume().to_nibabel(), nib.load(scans[m]))


@pytest.mark.parametrize("write", [write_series, write_enhanced])
def test_oblique_and_anisotropic_volumes_keep_their_place(write, tmp_path):
    values = np.random.default_rng(0).integers(0, 999, (12, 10, 11))
    turn = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])  # a 7-24-25 triangle
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.9, 0.8, 5.0])
    affine[:3, 3] = 11.0, -20.0, 33.0
    place = tmp_path / "one.dcm" if write is write_enhanced else tmp_path
    write(place, values, affine, 4, PROTOCOLS["t2"], generate_uid(), PATIENT)
    (one,) = read_folder(tmp_path)
    same(one.volume().to_nibabel(), nib.Nifti1Image(values.astype(np.float32), affine))


@pytest.mark.parametrize("implicit", [True, False, None])
def test_files_without_a_preamble_are_read(scans, tmp_path, implicit):
    """As some archives write them, with or without what tells their encoding."""
    write_study(tmp_path, {"t2": scans["t2"]}, PATIENT)
    for path in tmp_path.iterdir():
        bare = Dataset()
        bare.update(pydicom.dcmread(path))
        if implicit is None:
            path.write_bytes(path.read_bytes()[132:])
        else:
            pydicom.dcmwrite(path, bare, implicit_vr=implicit, little_endian=True)
        assert path.read_bytes()[128:132] != b"DICM"
    (one,) = read_folder(tmp_path)
    same(one.volume().to_nibabel(), nib.load(scans["t2"]))
    write_segmentation(tmp_path / "x.dcm", np.uint8(one.volume().array > 0), BRATS, one, "x")


def enhanced(scans, path, change=lambda header: None):
    image = nib.load(scans["flair"])
    values, flair = np.asarray(image.dataobj), PROTOCOLS["flair"]
    write_enhanced(path, values, image.affine, 5, flair, "1.2.3.4.5", PATIENT)
    header = pydicom.dcmread(path)
    change(header)
    header.save_as(path)


def twice(header):
    header.NumberOfFrames *= 2
    header.PixelData *= 2
    header.PerFrameFunctionalGroupsSequence.extend([*header.PerFrameFunctionalGroupsSequence])


def shorten(header):
    header.PixelData = header.PixelData[2 * header.Rows * header.Columns :]
    header.NumberOfFrames -= 1
    del header.PerFrameFunctionalGroupsSequence[20]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (twice, r"\(39 slices of its 78 lie where others do\); keep one copy of each, or one time"),
        (shorten, r"\(its slices lie 4 mm apart, but once 8 mm\); see that all"),
        (None, r"\(2 of its files have several frames, where one is a volume\); convert it to"),
    ],
)
def test_frames_that_make_no_volume_say_why(scans, tmp_path, change, sentence):
    enhanced(scans, tmp_path / "one.dcm", change or (lambda header: None))
    if change is None:
        shutil.copy(tmp_path / "one.dcm", tmp_path / "two.dcm")
    (one,) = read_folder(tmp_path)
    with pytest.raises(InputError, match=sentence):
        one.volume()


def test_an_enhanced_image_says_what_it_is_in_groups_of_its_own(scans, tmp_path):
    def change(header):
        (shared,) = header.SharedFunctionalGroupsSequence
        for frame in header.PerFrameFunctionalGroupsSequence:
            frame.MREchoSequence = shared.MREchoSequence
        del shared.MREchoSequence, header.SeriesDescription
        agent = Dataset()
        agent.CodeMeaning = "gadobutrol"
        header.ContrastBolusAgentSequence = [agent]
        header.AcquisitionContrast = "FLUID_ATTENUATED"

    enhanced(scans, tmp_path / "one.dcm", change)
    (one,) = read_folder(tmp_path)
    assert (one.echo, one.repetition, one.inversion, one.agent) == (120, 9000, 2500, True)
    assert "fluid_attenuated" in one.kind


@pytest.mark.parametrize(
    ("agent", "volume", "expected"),
    [
        ("Gadovist", None, True),
        ("NO CONTRAST", None, False),
        ("W/O", "7.5", False),
        ("", "7.5", True),
        ("", "0", False),
    ],
)
def test_whether_a_contrast_agent_was_given(study, tmp_path, agent, volume, expected):
    header = pydicom.dcmread(next(study.glob("4_*.dcm")))
    header.ContrastBolusAgent, header.ContrastBolusVolume = agent, volume
    header.save_as(tmp_path / "one.dcm")
    (one,) = read_folder(tmp_path)
    assert one.agent is expected


def test_series_of_two_visits_are_told_without_their_dates(scans, model, tmp_path):
    write_study(tmp_path / "in", {m: scans[m] for m in ("t1", "t2", "flair")}, PATIENT)
    days = {"2": ("AcquisitionDate", "2020.03.01"), "3": ("AcquisitionDateTime", "20190301235959")}
    for path in (tmp_path / "in").iterdir():
        header = pydicom.dcmread(path)
        setattr(header, *days.get(path.name[0], ("AcquisitionDate", "unknown")))
        with pydicom_lets_pass():
            header.save_as(path)
    result = segment_study(model, tmp_path / "in", Outputs(tmp_path), name="x")
    (told,) = (warning for warning in result.warnings if "days apart" in warning)
    assert told == (
        "case 'x': series 3 't2_tse_tra' and series 2 'T1w pre' were acquired 366 days apart; see "
        "that they are of one visit."
    )
    assert result.problem is None and result.files["dicom"].is_file()


def test_series_that_are_no_scan_stand_beside_the_others(study, tmp_path):
    for path in study.glob("[34]_*.dcm"):
        header = pydicom.dcmread(path)
        if path.name.startswith("4"):
            header.Modality = "" if header.InstanceNumber % 2 else "PT"
            header.SeriesInstanceUID += "." + str(header.InstanceNumber % 2)
        header.save_as(tmp_path / path.name)
    reasons = [r.reason for r in recognise(read_folder(tmp_path), BRATS.modalities)]
    assert reasons[0].startswith("description")
    assert sorted(r.rpartition("is ")[2] for r in reasons[1:]) == ["PT", "not told"]


def test_patients_and_studies_are_not_mixed(scans, tmp_path):
    values = np.asarray(nib.load(scans["t1"]).dataobj)[:, :, :12]
    for n in (1, 2):
        write_series(tmp_path, values, np.eye(4), n, PROTOCOLS["t1"], generate_uid(), PATIENT)
    with pytest.raises(InputError, match="2 studies"):
        read_folder(tmp_path)
    with pytest.raises(InputError, match="no MR images"):
        read_folder(tmp_path / "none")
    for path in tmp_path.glob("1_*.dcm"):  # a series whose export lost both is no second patient
        made = pydicom.dcmread(path)
        del made.PatientID
        made.StudyInstanceUID = ""
        pydicom.dcmwrite(path, made, enforce_file_format=False)
    assert len(read_folder(tmp_path)) == 2


def tilt(header):
    x, y, z = map(float, header.ImagePositionPatient)
    header.ImagePositionPatient = decimals([x, y + 0.3 * z, z])


def spoil(header):
    header.PixelData = encapsulate([b"\xff\x4f\xff\x51" + bytes(60)])
    header.file_meta.TransferSyntaxUID = JPEG2000Lossless


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (None, r"\(its slices lie 4 mm apart, but once 8 mm\); see that all of its slices are th"),
        ("copy", r"\(1 slice of its 40 lie where others do\); keep one copy of each, or one ti"),
        (tilt, r"\(each of its slices is shifted against .* gantry\); convert it to NIfTI"),
        (lambda h: delattr(h, "ImagePositionPatient"), r"\(its slices do not say their ImagePosit"),
        (
            lambda h: setattr(h, "ImagePositionPatient", [0, 0, h.InstanceNumber**1.05]),
            r"\(its slices lie 1\.\d* to 1\.\d* mm apart\); convert it to NIfTI",
        ),
        (
            lambda h: setattr(h, "ImagePositionPatient", [0, 0, h.InstanceNumber, 0]),
            r"\(the places of its slices are no numbers\); export",
        ),
        (lambda h: delattr(h, "FrameOfReferenceUID"), r"not say their FrameOfReferenceUID\); exp"),
        (lambda h: delattr(h, "PixelSpacing"), r"do not say their PixelSpacing\); export the ser"),
        (
            lambda h: setattr(h, "PhotometricInterpretation", "MONOCHROME1"),
            r"its voxels are dark where the signal is strong \(PhotometricInterpretation MONOCHR",
        ),
        (lambda h: setattr(h, "PhotometricInterpretation", "RGB"), r"its voxels are colours \(Pho"),
        (spoil, r"compressed as JPEG 2000 .*, or damaged\); pip install pylibjpeg"),
    ],
)
def test_slices_that_make_no_volume_say_why(study, tmp_path, change, sentence):
    paths = sorted(study.glob("4_*.dcm"))
    for path in paths:
        header = pydicom.dcmread(path)
        if callable(change):
            change(header)
        if change is not None or path != paths[10]:
            header.save_as(tmp_path / path.name)
    if change == "copy":
        header.save_as(tmp_path / "again.dcm")
    (one,) = read_folder(tmp_path)
    with pytest.raises(InputError, match=sentence):
        one.volume()


def test_times_and_descriptions_may_hold_anything(study, tmp_path):
    (path,) = sorted(study.glob("4_*.dcm"))[:1]
    header = pydicom.dcmread(path)
    header.EchoTime, header.SeriesDescription = [10, 90], "t2 \x1b[31m red"
    header[0x00180080] = DataElement(0x00180080, "LO", "short")
    header[0x00200011] = DataElement(0x00200011, "LO", "third")
    header.ImageType = "DERIVED"
    header.save_as(tmp_path / path.name, implicit_vr=False, little_endian=True)
    (one,) = read_folder(tmp_path)
    assert (one.number, one.kind) == (0, ("derived",))
    assert (one.echo, one.repetition, one.told) == (10.0, None, "t2 [31m red")
    for number in (b"1e999", b"Jane  "):
        whole = path.read_bytes()
        start = whole.index(b"\x20\x00\x11\x00IS") + 6
        spoilt = len(number).to_bytes(2, "little") + number + whole[start + 4 :]
        (tmp_path / path.name).write_bytes(whole[:start] + spoilt)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # pydicom's quote the header
            assert read_folder(tmp_path)[0].number == 0
    (tmp_path / path.name).write_bytes(path.read_bytes()[:400])
    with pytest.raises(InputError, match="no MR images in DICOM that can be read"):
        read_folder(tmp_path)


def test_a_segmentation_lies_on_its_series(study, model, tmp_path):
    result = segment_study(model, study, Outputs(tmp_path), name="x")
    labels = np.asarray(nib.load(result.files["seg"]).dataobj)
    assert labels.any()
    made = highdicom.seg.segread(result.files["dicom"])
    (about,) = made.ReferencedSeriesSequence
    referenced = {str(i.ReferencedSOPInstanceUID) for i in about.ReferencedInstanceSequence}
    (source,) = [s for s in read_folder(study) if s.uid == about.SeriesInstanceUID]
    assert referenced <= {str(d.SOPInstanceUID) for d in source.datasets()}
    assert "Research use only" in made.ContentDescription
    assert "Research use only" in made.SeriesDescription
    assert str(made.PatientID) == PATIENT.number
    for number in made.segment_numbers:
        about = made.get_segment_description(number)
        assert about.segmented_property_type.scheme_designator in ("SCT", "NCIt")
    seen = made.get_volume(combine_segments=True)
    order = [
        BRATS.labels.index(made.get_segment_description(n).segment_label) + 1
        for n in made.segment_numbers
    ]
    volume = source.volume()
    back = seen.match_geometry(volume).array
    expected = np.zeros_like(labels)
    for number, index in zip(made.segment_numbers, order, strict=True):
        expected[back == number] = index
    np.testing.assert_array_equal(expected, labels)


def written(study, folder):
    """The DICOM-SEG of a study's last series, in which a cube of each label is marked."""
    one = read_folder(study)[-1]
    labels = np.zeros(one.volume().shape, int)
    for index in (1, 2, 3):
        labels[4 + index, 5:8, 5:8] = index
    return highdicom.seg.segread(write_segmentation(folder / "x.dcm", labels, BRATS, one, "x"))


@pytest.mark.filterwarnings("ignore:Unknown encoding")
@pytest.mark.parametrize(
    ("letters", "name"),
    [
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
        ("ISO_IR 144", "Иванов^Иван"),
        ("ISO_IR 999", "Doe^Jane"),
    ],
)
def test_patients_keep_their_names_in_any_letters(scans, tmp_path, letters, name):
    write_study(tmp_path / "study", {"t2": scans["t2"]}, PATIENT)
    for path in (tmp_path / "study").iterdir():
        header = pydicom.dcmread(path)
        header.SpecificCharacterSet, header.PatientName = letters, name
        header.save_as(path)
    assert str(written(tmp_path / "study", tmp_path).PatientName) == name


def test_scans_that_were_made_anonymous_get_their_object(scans, tmp_path):
    gone = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID")
    write_study(tmp_path / "study", {"t2": scans["t2"]}, PATIENT)
    for path in (tmp_path / "study").iterdir():
        header = pydicom.dcmread(path)
        for tag in (*gone, "AccessionNumber", "StudyDate", "StudyTime", "ReferringPhysicianName"):
            delattr(header, tag)
        header.save_as(path)
    made = written(tmp_path / "study", tmp_path)
    assert not any(made[tag].value for tag in gone)


def test_segments_have_the_colours_of_the_other_files(study, tmp_path):
    for about, colour in zip(
        written(study, tmp_path).SegmentSequence, class_colours(3), strict=True
    ):
        shown = CIELabColor.from_dicom_value(about.RecommendedDisplayCIELabValue).to_rgb()
        assert "#" + bytes(shown).hex() == colour


def test_nothing_segmented_is_no_object(study, tmp_path):
    one = read_folder(study)[1]
    with pytest.raises(InputError, match="nothing was segmented"):
        write_segmentation(tmp_path / "x.dcm", np.zeros(one.volume().shape, int), BRATS, one, "x")
    with pytest.raises(InputError, match=r"has \(2, 2, 2\) voxels, .* onto the grid of that"):
        write_segmentation(tmp_path / "x.dcm", np.ones((2, 2, 2), int), BRATS, one, "x")


def test_the_command_tells_what_was_taken_for_what_and_no_patient(study, model, tmp_path, capsys):
    checkpoint = save(tiny_student(16), tmp_path / "x.ckpt")
    out = tmp_path / "out"
    assert main(["segment", str(checkpoint), str(study), "-o", str(out)]) == 0
    captured = capsys.readouterr()
    for text in ("t1ce", "contrast agent", "not used"):
        assert text in captured.out
    no_secret_in(out, captured, secrets_of(study))
    (seg,) = out.glob("*.dcm")
    assert pydicom.dcmread(seg).PatientName == PATIENT.name


def secrets_of(study):
    """Whatever of the headers tells the patient or the study: names, numbers, dates, UIDs."""
    secrets = set(vars(PATIENT).values())
    for path in study.rglob("*.dcm"):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        values = (e.value for e in header.iterall() if e.VR in ("UI", "DA", "PN", "DT"))
        secrets |= {str(v) for v in values if v and not str(v).startswith("1.2.840.10008")}
        secrets |= {f"{header.PatientID}", *f"{header.PatientName}".split("^")}
    return {secret for secret in secrets if len(secret) > 2}


def no_secret_in(out, captured, secrets):
    """Neither in what was printed, nor in names of files, nor in files that are no DICOM."""
    said = [captured.out.encode(), captured.err.encode()]
    for path in out.rglob("*"):
        said.append(path.relative_to(out).as_posix().encode())
        if path.is_file() and path.suffix != ".dcm":
            raw = path.read_bytes()
            said.append(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    assert len(said) > 6
    for secret in secrets:
        assert not any(secret.lower().encode() in text.lower() for text in said), secret


@pytest.mark.parametrize("day", ["20200101", "1 Jan 2020"])
def test_headers_that_break_the_rules_or_name_the_patient(scans, tmp_path, capsys, day):
    """Libraries quote what they complain of; people type names into descriptions."""
    study, out = tmp_path / "study", tmp_path / "out"
    write_study(study, {m: scans[m] for m in ("t1", "t2")}, PATIENT)
    with pydicom_lets_pass():
        for path in study.rglob("*.dcm"):
            header = pydicom.dcmread(path)
            header.PatientBirthDate, header.StudyDate = "born 01/01/1970", day
            header.PatientName = "Quixote^Jane"
            header.SeriesDescription = f"{header.SeriesDescription} JANE quixote"
            header.save_as(path)
    checkpoint = save(tiny_student(16), tmp_path / "x.ckpt")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        code = main(["segment", str(checkpoint), str(study), "-o", str(out), "--png"])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    made = (out / "study_seg.dcm").is_file()
    assert code == (not made) and (out / "study_seg.nii.gz").is_file()
    assert "volumes in ml" in captured.out  # what was made is told all the same
    assert ("has a header that DICOM does not allow" in captured.out) is not made
    secrets = {"quixote", "jane", "born 01", "01/01", day, PATIENT.number}
    assert not any(s in str(w.message).lower() for s in secrets for w in told)
    no_secret_in(out, captured, secrets)


@contextmanager
def pydicom_lets_pass():
    settings = pydicom.config.settings
    before = settings.writing_validation_mode
    settings.writing_validation_mode = pydicom.config.IGNORE
    yield
    settings.writing_validation_mode = before


def test_a_broken_volume_names_no_study(scans, tmp_path):
    study = tmp_path / "study"
    write_study(study, {"t1": scans["t1"]}, PATIENT)
    next(study.rglob("*.dcm")).unlink()
    paths = sorted(study.rglob("*.dcm"))
    paths[len(paths) // 2].unlink()
    (one,) = read_folder(study)
    with pytest.raises(InputError) as told:
        one.volume()
    assert not any(secret in str(told.value) for secret in secrets_of(study))
