"""Case folders, cohorts, single files: what is found, and what is written."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from pmixseg.cli import main
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.scans import SegmentSettings
from pmixseg.files import file_hash
from pmixseg.inference.outputs import Outputs
from pmixseg.inference.segment import channels_of, segment_files, segment_folder
from pmixseg.task import BRATS
from tests.inference.tiny_models import save, tiny_student


@pytest.fixture(scope="module")
def cases(phantom_root):
    return find_cases(phantom_root, BRATS)


@pytest.fixture(scope="module")
def small_root(cases, tmp_path_factory):
    """Three cases: complete, with two scans, damaged."""
    root = tmp_path_factory.mktemp("small")
    for case in cases[:3]:
        folder = next(iter(case.images.values())).parent
        shutil.copytree(folder, root / "HGG" / folder.name)
    for modality in ("t1", "flair"):
        (root / "HGG" / cases[1].case_id / f"{cases[1].case_id}_{modality}.nii.gz").unlink()
    (root / "HGG" / cases[2].case_id / f"{cases[2].case_id}_t2.nii.gz").write_bytes(b"no scan")
    return root


def test_a_cohort_is_segmented_case_by_case(model, cases, small_root, tmp_path):
    told = []
    outputs = Outputs(tmp_path / "out")
    results = list(segment_folder(model, small_root, outputs, progress=lambda *n: told.append(n)))
    assert [r.name for r in results] == [c.case_id for c in cases[:3]]
    assert [r.combination for r in results] == [BRATS.modalities, ("t1ce", "t2"), ()]
    assert "not a NIfTI" in results[2].problem
    assert all(r.problem is None for r in results[:2])
    shares = [done / total for done, total in told]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(2 / 3)  # the third one failed

    written = nib.load(results[1].files["seg"])
    truth = nib.load(cases[1].label)
    assert written.shape == truth.shape
    np.testing.assert_allclose(written.affine, truth.affine)
    direct = model.segment({m: cases[1].images[m] for m in ("t1ce", "t2")})
    table = np.array([0, 1, 2, 4])  # BraTS 2018 writes enhancing tumour as 4
    assert np.array_equal(written.dataobj, table[direct.classes])
    assert "research use only" in str(written.header["descrip"])


def test_a_patients_folder_under_any_name(model, cases, tmp_path, checkpoint, capsys):
    """A layout wants the case's name twice; a person's folder is called as it is called."""
    case = cases[0]
    folder, out = tmp_path / "Mrs X", tmp_path / "out"
    folder.mkdir()
    for modality, name in (("t1ce", "x7 T1CE.nii.gz"), ("flair", "x7_flair.nii.gz")):
        shutil.copy(case.images[modality], folder / name)
    shutil.copy(case.label, folder / "x7_mask.nii.gz")
    assert main(["segment", str(checkpoint), str(folder), "-o", str(out), "--device=cpu"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "flair+t1ce" in said
    assert "recognised by their names (flair x7_flair.nii.gz, t1ce x7 T1CE.nii.gz)" in said
    assert "and the labels are numbered NCR 1, ED 2, ET 3" in said
    assert "x7_mask.nii.gz taken for no scan" in said
    direct = model.segment({m: case.images[m] for m in ("flair", "t1ce")})
    assert np.array_equal(nib.load(out / "x7_seg.nii.gz").dataobj, direct.labels)

    (folder / "y_t1ce.nii.gz").write_bytes(b"")  # two files of one modality: not ours to choose
    assert main(["segment", str(checkpoint), str(folder), "-o", str(out), "--device=cpu"]) == 1
    assert "may both be its t1ce" in capsys.readouterr().err
    assert main(["segment", str(checkpoint), str(tmp_path / "no"), "-o", str(out)]) == 1


def test_files_that_may_be_of_two_patients_are_named(model, cases, tmp_path):
    mixed = {"flair": cases[0].images["flair"], "t1": cases[1].images["t1"]}
    force = SegmentSettings(force=True)  # whatever their voxels say
    result = segment_files(model, mixed, Outputs(tmp_path), force)
    assert "make sure that they are of one patient" in result.warnings[0]
    for path in mixed.values():
        assert path.name in result.warnings[0]
    assert result.warnings[0] in json.loads(result.files["json"].read_text())["warnings"]
    named = segment_files(model, mixed, Outputs(tmp_path), force, name="x7")
    alone = segment_files(model, {"t1": mixed["t1"]}, Outputs(tmp_path), force)
    together = {m: cases[0].images[m] for m in ("flair", "t1")}
    for sure in (named, alone, segment_files(model, together, Outputs(tmp_path), force)):
        assert not any("one patient" in w for w in sure.warnings)


def test_the_folder_of_one_case(model, cases, small_root, tmp_path):
    folder = small_root / "HGG" / cases[0].case_id
    (result,) = segment_folder(model, folder, Outputs(tmp_path))
    assert result.name == cases[0].case_id


def test_everything_that_can_be_written(model, cases, tmp_path, checkpoint):
    outputs = Outputs(tmp_path, probabilities=True, entropy=True, compress=False)
    images = {m: cases[0].images[m] for m in ("t2", "flair")}
    result = segment_files(model, images, outputs, SegmentSettings(overlap=0.25), name="me")
    assert {k: p.name for k, p in result.files.items()} == {
        "seg": "me_seg.nii",
        "slicer": "me_seg.ctbl",
        "itksnap": "me_seg_itksnap.txt",
        "probabilities": "me_probabilities.nii",
        "entropy": "me_entropy.nii",
        "json": "me_seg.json",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        p.name for p in result.files.values()
    )
    segmented = model.segment(images, SegmentSettings(overlap=0.25))
    probabilities = np.asarray(nib.load(result.files["probabilities"]).dataobj)
    assert probabilities.shape == (*segmented.classes.shape, 4)
    assert np.array_equal(probabilities, np.moveaxis(segmented.probabilities, 0, -1))
    assert np.array_equal(nib.load(result.files["entropy"]).dataobj, segmented.entropy)
    for key in ("seg", "probabilities", "entropy"):
        assert "research use only" in str(nib.load(result.files[key]).header["descrip"])

    facts = json.loads(result.files["json"].read_text())
    assert facts["notice"].startswith("Research use only")
    assert facts["combination"] == "flair+t2"
    assert facts["volumes_ml"] == {k: round(v, 4) for k, v in segmented.volumes.items()}
    assert facts["checkpoint"] == {"file": "tiny.ckpt", "sha256": file_hash(checkpoint)}
    assert facts["inputs"]["t2"] == {
        "file": cases[0].images["t2"].name,
        "sha256": file_hash(cases[0].images["t2"]),
    }
    assert facts["settings"]["overlap"] == 0.25
    assert facts["settings"]["window"] == [32, 32, 32]


def test_what_an_earlier_result_leaves_beside_a_new_one_is_told(model, cases, tmp_path):
    """Names and numbers that lie there are of the new label map, and the old one has others."""
    images = {"t2": cases[0].images["t2"]}
    every = Outputs(tmp_path, probabilities=True, entropy=True, png=True)

    def said(outputs):
        return " ".join(segment_files(model, images, outputs, name="me").warnings)

    assert "stay there" not in said(every)
    assert "stay there" not in said(every)
    old = "me_entropy.nii.gz, me_probabilities.nii.gz, me_seg.nii.gz, me_seg.png"
    assert f"case 'me': {old} in {tmp_path} stay there" in said(Outputs(tmp_path, compress=False))
    assert "me_seg.nii, me_seg.png in" in said(Outputs(tmp_path, plain=True))
    assert "me.nii.gz, me_seg.png in" in said(Outputs(tmp_path))


@pytest.mark.parametrize("plain", [False, True])
def test_no_result_replaces_a_volume_that_is_none(model, cases, tmp_path, plain):
    """A folder of the experts' label maps, or a patient's other scan, must not be lost."""
    scans = {"flair": cases[0].images["flair"]}
    drawn = tmp_path / ("p0.nii.gz" if plain else "p0_seg.nii.gz")
    shutil.copy(cases[0].label, drawn)
    before = file_hash(drawn)
    outputs = Outputs(tmp_path, plain=plain)
    with pytest.raises(InputError, match=rf"{drawn} is there already and no result of pmixseg"):
        segment_files(model, scans, outputs, name="p0")
    made = model.segment(scans, name="p0")
    with pytest.raises(InputError, match="choose another output folder or name, or remove it"):
        made.save(tmp_path, plain=plain)
    assert file_hash(drawn) == before
    drawn.unlink()
    for _ in range(2):  # its own are replaced
        segment_files(model, scans, outputs, name="p0")
    image = nib.load(drawn)
    image.header["descrip"] = b"ITK-SNAP"  # somebody has corrected it
    nib.save(image, drawn)
    with pytest.raises(InputError, match="or was changed since"):
        segment_files(model, scans, outputs, name="p0")


def test_no_result_takes_the_place_of_a_label(model, cases, small_root):
    folder = small_root / "HGG" / cases[0].case_id
    label = (folder / f"{cases[0].case_id}_seg.nii.gz").read_bytes()
    (result,) = segment_folder(model, folder, Outputs(folder))
    assert "would be taken for its label; choose another output folder" in result.problem
    assert (folder / f"{cases[0].case_id}_seg.nii.gz").read_bytes() == label


def test_a_result_may_lie_beside_scans_of_no_cohort(model, cases, tmp_path):
    scan = shutil.copy(cases[0].images["flair"], tmp_path / "x7_flair.nii.gz")
    result = segment_files(model, {"flair": scan}, Outputs(tmp_path))
    assert tmp_path / "x7_seg.nii.gz" in result.files.values()
    taken = shutil.copy(scan, tmp_path / "x8_seg.nii.gz")
    with pytest.raises(InputError, match="is read here and would be replaced"):
        segment_files(model, {"flair": taken}, Outputs(tmp_path), name="x8")


def test_no_result_becomes_the_label_of_a_case_without_one(model, cases, tmp_path):
    folder = tmp_path / cases[0].case_id
    folder.mkdir()
    for source in cases[0].images.values():
        (folder / source.name).write_bytes(source.read_bytes())
    before = sorted(folder.iterdir())
    (result,) = segment_folder(model, folder, Outputs(folder))
    assert "would be taken for its label" in result.problem
    assert sorted(folder.iterdir()) == before


def test_a_student_of_one_scan_leaves_the_others_out(cases, small_root, tmp_path):
    module = tiny_student(combination="t1")
    results = list(segment_folder(module, small_root, Outputs(tmp_path)))
    assert [r.combination for r in results] == [("t1",), (), ("t1",)]
    assert "has t1ce, t2, but this model reads t1" in results[1].problem


def test_every_channel_of_a_4d_file_is_named(model, tmp_path):
    path = tmp_path / "four.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4, 4), np.float32), np.eye(4)), path)
    with pytest.raises(InputError, match=r"has 4 channels, but 'flair,t1' names 2; name all"):
        channels_of(path, "flair,t1", model)
    assert len(channels_of(path, "flair,t1,-,-", model)) == 2


def test_channels_must_be_named(model, tmp_path):
    path = tmp_path / "x.nii.gz"
    path.touch()
    for names in ("t2, -,flair", " t2 - flair "):
        assert channels_of(path, names, model) == {"t2": (path, 0), "flair": (path, 2)}
    for wrong in ("t1,t1", "-,-", "t1 t1"):
        with pytest.raises(InputError, match="different modalities"):
            channels_of(path, wrong, model)


def test_the_one_channel_of_a_file_of_three_axes(model, cases):
    path = cases[0].images["t1"]
    assert channels_of(path, "t1", model) == {"t1": path}
    with pytest.raises(InputError, match="has 1 channel, but"):
        channels_of(path, "t1,t2", model)


# ------------------------------------------------------------------- command line


def test_command_with_a_flag_per_modality(checkpoint, model, cases, tmp_path, capsys):
    images = {m: cases[0].images[m] for m in ("t1ce", "t1")}
    flags = [f for m, p in images.items() for f in (f"--{m}", str(p))]
    codes = ["--codes", "NCR=1,ED=2", "ET=4"]
    assert main(["segment", str(checkpoint), *flags, *codes, "-o", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    result = model.segment(images)
    for region, volume in result.volumes.items():
        assert region in said
        assert f"{volume:.2f}" in said
    assert "research use only" in said
    written = nib.load(tmp_path / f"{cases[0].case_id}_seg.nii.gz")
    assert np.array_equal(written.dataobj, np.array([0, 1, 2, 4])[result.classes])


def test_codes_of_any_size_arrive_as_they_were_given(checkpoint, model, cases, tmp_path, capsys):
    scan = str(cases[0].images["t1"])
    classes = model.segment({"t1": scan}).classes
    for codes in ((1, 2, 40000), (-3, 300, 70000), (1, -5, 4)):
        pairs = ",".join(f"{n}={c}" for n, c in zip(BRATS.labels, codes, strict=True))
        arguments = ["--t1", scan, "--codes", pairs, "-o", str(tmp_path), "--name=x"]
        assert main(["segment", str(checkpoint), *arguments]) == 0
        written = np.asarray(nib.load(tmp_path / "x_seg.nii.gz").dataobj)
        assert np.array_equal(written, np.array([0, *codes])[classes])
        direct = model.segment({"t1": scan}, codes=dict(zip(BRATS.labels, codes, strict=True)))
        assert np.array_equal(direct.to_nifti().dataobj, written)
    arguments = ["--t1", scan, "--codes", "NCR=1,ED=2,ET=3000000000", "-o", str(tmp_path / "no")]
    assert main(["segment", str(checkpoint), *arguments]) == 1
    assert "whole numbers from -2147483648 to 2147483647" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "no").exists()


def test_command_on_a_cohort_goes_on_after_a_bad_case(checkpoint, small_root, tmp_path, capsys):
    arguments = ["segment", str(checkpoint), str(small_root), "-o", str(tmp_path / "out")]
    assert main(arguments) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "problem: case 'Brats18_PHANTOM_002_1'" in said
    assert "8 files in" in said


def test_command_on_a_four_dimensional_file(checkpoint, model, cases, tmp_path, capsys):
    scans = [nib.load(cases[0].images[m]) for m in ("t2", "t1")]
    stacked = np.stack([np.asarray(s.dataobj) for s in (*scans, scans[0])], axis=-1)
    path = tmp_path / "both.nii.gz"
    nib.save(nib.Nifti1Image(stacked, scans[0].affine), path)
    out = ["-o", str(tmp_path / "out")]
    assert main(["segment", str(checkpoint), str(path), *out]) == 1
    assert "--channels" in capsys.readouterr().err
    assert main(["segment", str(checkpoint), str(path), "--channels", "t2,t1,-", *out]) == 0
    image = nib.load(tmp_path / "out" / "both_seg.nii.gz")
    expected = model.segment({m: cases[0].images[m] for m in ("t1", "t2")})
    assert np.array_equal(image.dataobj, expected.labels)


def test_command_says_what_is_wrong(checkpoint, cases, tmp_path, capsys):
    scan, out = str(cases[0].images["t1"]), ["-o", str(tmp_path / "out")]
    for arguments, words in (
        ([str(checkpoint), *out], "either a folder or 4-D file"),
        ([str(checkpoint), str(tmp_path), "--t1", scan, *out], "either a folder or 4-D file"),
        ([str(checkpoint), str(tmp_path / "none"), *out], "does not exist"),
        ([str(checkpoint), "--t1", scan, "--codes", "ET", *out], "NCR=1,ED=2,ET=4"),
        ([str(checkpoint), "--t1", scan, "--device", "abacus", *out], "use cpu"),
        ([str(checkpoint), "--t1", scan, "--layout=msd", *out], "--layout would be of no use"),
        ([str(checkpoint), "--t1", scan, "--series=t1=2", "--brain=m.nii", *out], "them out"),
        ([str(checkpoint), "--t1", scan, "--raw", "--channels=t1", *out], "is raw scans; leave it"),
        ([str(checkpoint), str(tmp_path), "--name=x", *out], "is a folder without --raw; leave it"),
        ([str(checkpoint), scan, "--atlas=m.nii", *out], "is a 4-D file without --raw; leave it"),
        ([str(checkpoint), "--t3", scan, *out], "'--t3' is neither an option nor a scan"),
        ([str(checkpoint), "--t1", scan, "--overlap", "1", *out], "give 0 or more, below 1"),
        ([str(checkpoint), "--t1", scan, "--postprocess", "fill_holes,polish", *out], "'polish'"),
        ([str(tmp_path / "none.ckpt"), "--t1", scan, *out], "does not exist"),
        (["--t1", scan, str(checkpoint), *out], "the checkpoint comes first"),
    ):
        assert main(["segment", *arguments]) == 1, words
        said = capsys.readouterr().err
        assert words in said
        assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_help_knows_the_modalities_of_the_task(tmp_path, capsys):
    for arguments in ([], ["--help"]):
        with pytest.raises(SystemExit) as stop:
            main(["segment", *arguments])
        assert stop.value.code == 0
        assert "--t1ce" in capsys.readouterr().out


def test_a_task_of_other_modalities_has_other_flags(tmp_path, capsys):
    from pmixseg.task import Task

    task = Task("knee", ("pd", "t2fs"), ("effusion",), {"all": ("effusion",)})
    module = tiny_student(task=task)
    path = save(module, tmp_path / "knee.ckpt")
    with pytest.raises(SystemExit):
        main(["segment", str(path), "--help"])
    said = capsys.readouterr().out
    assert "--t2fs FILE" in said
    assert "--t1ce" not in said


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", ".."])
def test_a_name_that_leads_out_of_the_folder_is_refused(checkpoint, cases, tmp_path, capsys, name):
    out = tmp_path / "out"
    scan = f"--t1={cases[0].images['t1']}"
    code = main(["segment", str(checkpoint), scan, f"--name={name}", f"-o{out}", "--device=cpu"])
    assert code == 1
    assert "cannot name a file" in capsys.readouterr().err
    assert list(tmp_path.rglob("*.nii*")) == []


def test_a_layout_whose_cases_lead_out_of_the_folder_is_refused(
    checkpoint, cases, tmp_path, capsys
):
    root = tmp_path / "in" / "p1"
    root.mkdir(parents=True)
    shutil.copy(cases[0].images["t1"], root / "p1_t1.nii.gz")
    layout = tmp_path / "layout.yaml"
    files = ", ".join(f'{m}: "{{p}}/{{p}}_{m}.nii.gz"' for m in BRATS.modalities)
    codes = "{NCR: 1, ED: 2, ET: 3}"
    layout.write_text(f'name: up\ncase: "../{{p}}"\nimages: {{{files}}}\ncodes: {codes}\n')
    out = tmp_path / "out"
    folder = str(root.parent)
    flags = [f"--layout={layout}", f"-o{out}", "--device=cpu"]
    assert main(["segment", str(checkpoint), folder, *flags]) == 1
    said = capsys.readouterr()
    assert "case '../p1' cannot name a file" in " ".join((said.out + said.err).split())
    assert not out.exists() or list(out.iterdir()) == []
    assert list(tmp_path.glob("*.nii*")) == []
