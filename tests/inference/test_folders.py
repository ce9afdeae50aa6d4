"""A patient's folder under any name: every scan is used, or refused, or left out and named."""

import shutil

import numpy as np
import pydicom
import pytest

from pmixseg.cli import main
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.dicom.example import write_study
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.scans import SegmentSettings
from pmixseg.inference.folders import scans_in
from pmixseg.inference.outputs import Outputs
from pmixseg.inference.segment import segment_files, segment_folder
from pmixseg.task import BRATS, Task
from tests.inference.tiny_models import tiny_student

PLAIN = Task("plain", ("flair", "t1"), ("tumour",), {"all": ("tumour",)})


@pytest.fixture
def patient(case, tmp_path):
    """A folder with scans under names of one's own."""

    def make(folder: str = "patient", /, **names: str):
        made = tmp_path / folder
        made.mkdir(parents=True)
        for modality, name in names.items():
            source = case.label if modality == "label" else case.images[modality]
            shutil.copy(source, made / f"{name}.nii.gz")
        return made

    return make


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """The command on a folder: exit code and what it said."""

    def call(folder, *flags: str):
        arguments = [str(checkpoint), str(folder), "-o", str(tmp_path / "out"), "--device=cpu"]
        code = main(["segment", *arguments, *flags])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, " ".join((said.out + said.err).split())

    return call


def test_scans_in_other_formats_beside_dicom(patient, run, case):
    folder = patient("p", t2="T2")
    write_study(folder / "dicom", {"flair": case.images["flair"]})
    code, said = run(folder)  # which of both is meant is not known
    assert code == 1
    assert "holds MR series in DICOM and T2.nii.gz; name a folder of one of both" in said
    for path in (folder / "dicom").iterdir():  # a result in DICOM makes no study
        header = pydicom.dcmread(path)
        header.Modality = "SEG"
        header.save_as(path)
    code, said = run(folder)
    assert code == 0 and "t2 T2.nii.gz" in said


def test_a_result_of_other_scans_is_not_replaced_without_a_word(patient, run, tmp_path, case):
    """Folders of two patients may have one name, as that of a visit."""
    first, second = patient("a/visit", flair="FLAIR"), patient("b/visit", t1="T1")
    assert "replaces" not in run(first)[1]
    assert "replaces" not in run(first)[1]
    shutil.copy(case.images["t2"], first / "T2.nii.gz")
    assert "replaces" not in run(first)[1]  # a scan more, of the same patient
    code, said = run(second)
    assert code == 0 and "replaces the result of other scans (FLAIR.nii.gz, T2.nii.gz)" in said
    (tmp_path / "out/visit_seg.json").write_text("[1]")  # of somebody's own
    assert "replaces" not in run(first)[1]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("FLAIR.nii", "T1.nii.gz", "notes.txt"), {"flair": "FLAIR.nii", "t1": "T1.nii.gz"}),
        (("a-t1-b.nii", "a-t2.nii.gz", "a-seg.nii"), {"t1": "a-t1-b.nii", "t2": "a-t2.nii.gz"}),
        (("T1C.nii", "T1.NII.GZ"), {"t1ce": "T1C.nii", "t1": "T1.NII.GZ"}),
        (("._T1.nii", "T2.nii", "out/x_seg.nii", "out/x_entropy.nii"), {"t2": "T2.nii"}),
        (("scan.nii", "dwi.nii"), {}),  # no folder of this kind
    ],
)
def test_scans_told_by_their_names(tmp_path, files, expected):
    (tmp_path / "out").mkdir()
    for name in files:
        (tmp_path / name).touch()
    images, _ = scans_in(tmp_path, BRATS)
    assert {m: p.name for m, p in images.items()} == expected


@pytest.mark.parametrize(
    ("files", "task", "says"),
    [
        (("T1.nii", "T1_CE.nii"), PLAIN, r"T1_CE.nii \(it is contrast-enhanced T1\) is to this"),
        (("t1.nii", "dwi.nii", "adc.nii"), BRATS, r"adc.nii \(its name .*dwi.nii .* are to this"),
        (("t1.nii", "x_t1.nii"), BRATS, r"t1.nii and x_t1.nii may both be its t1; .*--t1 FILE"),
        (("t1_to_t2.nii", "flair.nii"), BRATS, "names more than one sequence"),
        (("t1.nii", "more/t1ce.nii"), BRATS, r"more/t1ce.nii \(it lies in a folder of its own"),
        (("t2.nii", "post_t1.nii"), BRATS, "'post' may mean contrast agent"),
    ],
)
def test_files_of_which_nobody_knows_what_they_are(tmp_path, files, task, says):
    (tmp_path / "more").mkdir()
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=says):
        scans_in(tmp_path, task)
    if "both" in says:
        with pytest.raises(InputError, match=says):
            scans_in(tmp_path, task, force=True)
    else:
        images, notes = scans_in(tmp_path, task, force=True)
        assert len(images) == 1
        assert "left out because of force" in notes[0]


def test_a_contrast_enhanced_scan_is_not_plain(patient, run, model, case, tmp_path):
    folder = patient("pat", t1ce="a_T1_CE", t2="a_T2")
    code, said = run(folder)
    assert code == 0
    assert "t1ce+t2" in said
    assert "(t1ce a_T1_CE.nii.gz, t2 a_T2.nii.gz)" in said
    (result,) = segment_folder(model, folder, Outputs(tmp_path / "two"))
    assert result.combination == ("t1ce", "t2")
    code, said = run(patient("both", t1="T1", t1ce="T1C"))
    assert (code, "t1ce+t1" in said) == (0, True)


def test_a_scan_of_an_unknown_sequence_is_refused_or_left_out_by_force(patient, run):
    folder = patient(t1="T1", t2="DWI")
    code, said = run(folder)
    assert code == 1
    assert "DWI.nii.gz (its name tells no sequence)" in said
    assert "--force" in said
    code, said = run(folder, "--force")
    assert code == 0
    assert "DWI.nii.gz left out because of force" in said


def test_a_scan_beside_those_of_a_layout(patient, run, model, tmp_path):
    """The folder of a BraTS case by its name, with one scan that is named otherwise."""
    folder = patient("x7", t1="x7_t1", t2="x7_t2", t1ce="x7_T1_KM", label="x7_seg")
    assert find_cases(folder, BRATS)[0].layout == "brats"
    (result,) = segment_folder(model, folder, Outputs(tmp_path / "two"))
    assert "x7_T1_KM.nii.gz seems to be its t1ce" in result.problem
    assert run(folder)[0] == 1
    for flags in (["--force"], ["--layout", "brats"]):
        code, said = run(folder, *flags)
        assert code == 0
        assert "x7_T1_KM.nii.gz not read" in said
    (folder / "x7_T1_KM.nii.gz").rename(folder / "x7_swi.nii.gz")
    code, said = run(folder)
    assert code == 0
    assert "x7_swi.nii.gz not read, for layout 'brats' has no such name" in said


def test_scans_that_a_dedicated_student_does_not_read_are_named(patient, case, tmp_path):
    module = tiny_student(combination="t1")
    folder = patient(t1="anatomy_T1", flair="anatomy_FLAIR")
    (result,) = segment_folder(module, folder, Outputs(tmp_path), SegmentSettings())
    assert result.combination == ("t1",)
    assert any("does not read anatomy_FLAIR.nii.gz" in w for w in result.warnings)
    direct = module.segment({"t1": case.images["t1"]})
    assert np.isclose(result.volumes["WT"], direct.volumes["WT"])
    (result,) = segment_folder(module, patient("other", t2="T2"), Outputs(tmp_path))
    assert "has t2, but this model reads t1" in result.problem


def test_a_flag_that_a_files_name_contradicts_is_told(patient, model, tmp_path):
    folder = patient(t1ce="x7_T1_KM", flair="x7_T2_FLAIR", t2="scan")
    names = {"t1": "x7_T1_KM", "flair": "x7_T2_FLAIR", "t2": "scan"}
    images = {m: folder / f"{name}.nii.gz" for m, name in names.items()}
    result = segment_files(model, images, Outputs(tmp_path), name="x7")
    (told,) = [w for w in result.warnings if "its name says" in w]
    assert told == "case 'x7': x7_T1_KM.nii.gz is given as t1, but its name says t1ce."


def test_parts_of_a_cohort_join_to_the_whole(run, cropped_root, tmp_path):
    whole = {p.name for p in cropped_root.glob("*/*") if p.is_dir()}
    written = []
    for part in ("1/3", "2/3", "3/3"):
        code, said = run(cropped_root, f"--part={part}")
        assert code == 0, said
        now = {p.name.removesuffix("_seg.nii.gz") for p in (tmp_path / "out").glob("*_seg.nii.gz")}
        written.append(now - set().union(*written))
    assert set().union(*written) == whole and [len(w) for w in written] == [1, 1, 0]
    assert "this part of the cohort has no case" in said


def test_a_part_of_one_patient_is_refused(run, patient):
    folder = patient(flair="x_FLAIR", t1="x_T1")
    assert run(folder, "--part=1/2")[0] == 1
    code, said = run(folder / "x_FLAIR.nii.gz", "--channels=flair", "--part=1/2")
    assert code == 1 and "--part divides a cohort" in said
