import json
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.phantom.cohort import (
    LABEL_CODES,
    PhantomSettings,
    case_name,
    make_case,
    write_cohort,
)
from pmixseg.data.phantom.contrast import Contrast, Scanner
from pmixseg.data.splits import WholeCohort
from pmixseg.data.store.store import Store, prepare
from pmixseg.errors import InputError
from pmixseg.modules.preparation import are_synthetic
from pmixseg.task import BRATS

COARSE = PhantomSettings(spacing=4.0)
TINY = PhantomSettings(spacing=6.0)


@pytest.fixture(scope="module")
def cases():
    return [make_case(3, index, COARSE) for index in range(14)]


def test_a_case_is_a_pure_function_of_seed_index_and_settings(cases):
    again = make_case(3, 5, COARSE)
    assert np.array_equal(again.label, cases[5].label)
    for modality, values in again.images.items():
        assert np.array_equal(values, cases[5].images[modality])
    other_seed, other_index = make_case(4, 5, COARSE), cases[6]
    assert not np.array_equal(again.label, other_seed.label)
    assert not np.array_equal(again.label, other_index.label)


def test_shape_type_and_affine_are_those_of_brats():
    whole = PhantomSettings(spacing=1.0).grid
    assert whole.shape == (240, 240, 155)
    assert np.array_equal(
        whole.affine(), [[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]]
    )
    case = make_case(0, 0)
    assert case.label.shape == (80, 80, 52) and case.label.dtype == np.uint8
    assert tuple(case.images) == BRATS.modalities
    for values in case.images.values():
        assert values.shape == (80, 80, 52) and values.dtype == np.int16
    assert nib.aff2axcodes(case.affine) == ("L", "P", "S")
    assert np.allclose(np.abs(np.diag(case.affine))[:3], 3.0)


def test_the_same_patient_at_every_voxel_size():
    coarse = make_case(1, 2, PhantomSettings(spacing=4.0))
    fine = make_case(1, 2, PhantomSettings(spacing=2.0))
    volumes = [
        [(case.label == c).sum() * spacing**3 / 1000 for c in (1, 2, 3)]
        for case, spacing in ((coarse, 4.0), (fine, 2.0))
    ]
    assert np.allclose(volumes[0], volumes[1], rtol=0.15, atol=1.0)
    centres = [
        nib.affines.apply_affine(case.affine, np.argwhere(case.label > 0).mean(axis=0))
        for case in (coarse, fine)
    ]
    assert np.linalg.norm(centres[0] - centres[1]) < 2.0


def test_a_smaller_shape_is_the_middle_of_the_whole_volume():
    whole = make_case(2, 1, COARSE)
    part = make_case(2, 1, PhantomSettings(spacing=4.0, shape=(40, 48, 39)))
    middle = tuple(slice(10, 50) if n == 60 else slice(None) for n in whole.label.shape)
    inner = whole.label[middle[0], 6:54, :]
    assert np.array_equal(part.label, inner)
    corner = nib.affines.apply_affine(part.affine, [0, 0, 0])
    assert np.allclose(corner, nib.affines.apply_affine(whole.affine, [10, 6, 0]))


def test_background_is_zero_and_the_brain_is_not(cases):
    for case in cases:
        masks = [values > 0 for values in case.images.values()]
        for values, mask in zip(case.images.values(), masks, strict=True):
            assert values.min() == 0
            assert np.array_equal(mask, masks[0])
        litres = masks[0].sum() * 4.0**3 / 1e6
        assert 1.1 < litres < 2.0
        assert not case.label[~masks[0]].any()


def test_both_grades_come_early_and_low_grade_never_enhances(cases):
    grades = [case.grade for case in cases]
    assert 1 <= grades.count("LGG") <= 4
    for case in cases:
        assert (case.label == 1).any() or (case.label == 3).any()
        assert (case.label == 2).any()
        if case.grade == "LGG":
            assert not (case.label == 3).any()
    assert any((case.label == 3).any() for case in cases)


def test_shares_of_grades_and_of_cores_without_enhancement_are_those_asked_for():
    often = replace(TINY, high_grade=0.6, not_enhancing=0.5)
    cases = [make_case(3, index, often) for index in range(10)]
    high = [case for case in cases if case.grade == "HGG"]
    assert 5 <= len(high) <= 7
    assert 2 <= sum(not (case.label == 3).any() for case in high) <= 5


def test_extra_contrasts_and_any_number_of_modalities():
    names = ("flair", "t1ce", "t1", "t2", "pd", "adc")
    labels = []
    for count in (1, 2, 3, 5, 6):
        case = make_case(0, 1, PhantomSettings(spacing=6.0, modalities=names[:count]))
        assert tuple(case.images) == names[:count]
        labels.append(case.label)
    assert all(np.array_equal(label, labels[0]) for label in labels)
    own = PhantomSettings(
        spacing=6.0,
        modalities=("swi",),
        contrasts={"swi": Contrast(1.0, 0.9, 0.5, oedema=0.1, core=-0.4)},
    )
    assert make_case(0, 1, own).images["swi"].max() > 0


def test_a_modality_keeps_its_voxels_when_others_join():
    # Without private signal, which is divided among the modalities of the task.
    scanner = Scanner(private_signal=0.0)
    two = make_case(0, 3, PhantomSettings(6.0, modalities=("t1", "t2"), scanner=scanner))
    three = make_case(0, 3, PhantomSettings(6.0, modalities=("t2", "pd", "t1"), scanner=scanner))
    for modality in ("t1", "t2"):
        assert np.array_equal(two.images[modality], three.images[modality])


def test_cohort_is_written_in_the_layout_of_brats_2018(tmp_path):
    settings, told = TINY, []
    names = write_cohort(tmp_path / "c", 4, 3, settings, progress=lambda *p: told.append(p))
    assert names == [f"Brats18_PHANTOM_{i:03d}_1" for i in range(4)]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    entries = sorted(p.name for p in (tmp_path / "c").iterdir())
    assert entries == ["HGG", "LGG", "phantom.json"]
    assert "no patient" in json.loads((tmp_path / "c" / "phantom.json").read_text())["about"]
    for index, name in enumerate(names):
        case = make_case(3, index, settings)
        folder = tmp_path / "c" / case.grade / name
        kinds = [*BRATS.modalities, "seg"]
        assert {p.name for p in folder.iterdir()} == {f"{name}_{kind}.nii.gz" for kind in kinds}
        for kind in kinds:
            image = nib.load(folder / f"{name}_{kind}.nii.gz")
            assert image.get_data_dtype() == np.int16
            assert np.array_equal(image.affine, case.affine)
            assert b"synthetic" in image.header["descrip"].item()
            values = np.asarray(image.dataobj)
            if kind != "seg":
                assert np.array_equal(values, case.images[kind])
                continue
            for position, label in enumerate(BRATS.labels, start=1):
                assert np.array_equal(values == LABEL_CODES[label], case.label == position)
            assert set(np.unique(values)) <= {0, 1, 2, 4}


def test_complete_cases_are_reused_and_more_can_be_added(tmp_path):
    settings = TINY
    write_cohort(tmp_path, 1, 0, settings)
    first = next(tmp_path.glob("*GG/*/*_flair.nii.gz"))
    before = first.stat().st_mtime_ns
    assert len(write_cohort(tmp_path, 3, 0, settings, workers=2)) == 3
    assert first.stat().st_mtime_ns == before
    written = {p.name: p for p in tmp_path.glob("*GG/*/*.nii.gz")}
    assert len(written) == 15
    # A case does not depend on how many are made, nor on which process makes it.
    alone = make_case(0, 2, settings)
    stored = nib.load(written[f"{case_name(2)}_t1ce.nii.gz"])
    assert np.array_equal(np.asarray(stored.dataobj), alone.images["t1ce"])


def test_fewer_than_no_processes_are_none(tmp_path):
    assert len(write_cohort(tmp_path, 1, 0, TINY, workers=-1)) == 1


def test_an_interrupted_case_leaves_nothing_behind(tmp_path, monkeypatch):
    import pmixseg.data.phantom.cohort as phantom

    real_save, calls = nib.save, []

    def full_disk(image, path):
        calls.append(path)
        if len(calls) == 8:
            raise OSError(28, "No space left on device")
        real_save(image, path)

    monkeypatch.setattr(phantom.nib, "save", full_disk)
    with pytest.raises(InputError, match=r"No space left on device.*free space"):
        write_cohort(tmp_path, 2, 0, TINY)
    assert len(list(tmp_path.glob("*GG/*"))) == 1
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    monkeypatch.undo()
    write_cohort(tmp_path, 2, 0, TINY)
    assert len(list(tmp_path.glob("*GG/*/*.nii.gz"))) == 10


def test_another_cohort_or_a_foreign_folder_is_not_touched(tmp_path):
    settings = TINY
    write_cohort(tmp_path / "a", 1, 0, settings)
    with pytest.raises(InputError, match="another seed or other settings"):
        write_cohort(tmp_path / "a", 1, 1, settings)
    with pytest.raises(InputError, match="another seed or other settings"):
        write_cohort(tmp_path / "a", 1, 0, PhantomSettings(spacing=5.0))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.doc").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write_cohort(tmp_path / "b", 1, 0, settings)
    (tmp_path / "a" / "phantom.json").write_text("{")
    with pytest.raises(InputError, match="another seed or other settings"):
        write_cohort(tmp_path / "a", 1, 0, settings)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"modalities": ("t1", "t7")}, "t7"),
        ({"modalities": ("t1", "t1")}, "different names"),
        ({"modalities": ()}, "different names"),
        ({"high_grade": 1.5}, "high_grade is 1.5"),
        ({"spacing": 0.5}, "spacing is 0.5"),
        ({"shape": (300, 80, 50)}, "three numbers of voxels"),
        ({"shape": (40, 40)}, "give a list of 3 or null"),
    ],
)
def test_wrong_settings_get_a_sentence(wrong, sentence):
    with pytest.raises(InputError, match=sentence):
        PhantomSettings(**wrong)


def test_a_scanner_refuses_what_is_no_share():
    with pytest.raises(InputError, match=r"Scanner: dependence is -0\.1; give 0 to 1"):
        Scanner(dependence=-0.1)


def test_wrong_numbers_of_cases_and_seeds_get_a_sentence(tmp_path):
    with pytest.raises(InputError, match="0 cases"):
        write_cohort(tmp_path, 0)
    with pytest.raises(InputError, match="seed -1"):
        make_case(-1, 0)


def test_settings_survive_json(tmp_path):
    described = PhantomSettings(spacing=2.0).to_dict()
    assert json.loads(json.dumps(described)) == described
    assert set(described["contrasts"]) == set(BRATS.modalities)


@pytest.mark.slow
def test_a_case_of_1_mm_has_the_size_of_brats():
    case = make_case(0, 0, PhantomSettings(spacing=1.0))
    assert case.label.shape == (240, 240, 155)
    assert set(np.unique(case.label)) == {0, 1, 2, 3}


def test_a_phantom_is_known_by_its_files_whatever_they_are_called(
    make_case, phantom_root, tmp_path
):
    found = find_cases(phantom_root, BRATS)[:2]
    renamed = [replace(case, case_id=f"patient{k}") for k, case in enumerate(found)]
    patients = [make_case("Brats18_PHANTOM_001_1"), make_case("PHANTOM_x")]
    prepare([*renamed, *patients], tmp_path / "mixed", BRATS, progress=False)
    store = Store.open(tmp_path / "mixed")
    synthetic = {name: store.read(name).synthetic for name in store.cases}
    assert synthetic == {
        "patient0": True,
        "patient1": True,
        "Brats18_PHANTOM_001_1": False,
        "PHANTOM_x": False,
    }
    names = [case.case_id for case in renamed], [case.case_id for case in patients]
    for test, said in ((names[0], True), (names[1], False), ([*names[0], *names[1]], False)):
        data = SimpleNamespace(store=store, parts=SimpleNamespace(test=test))
        assert are_synthetic(data, "test") is said
    assert are_synthetic(SimpleNamespace(split_name="x"), "test") is None
    with pytest.warns(UserWarning, match=r"2 cases are of a phantom \(patient0, patient1\), the"):
        BraTSDataModule(tmp_path / "mixed", split=WholeCohort()).setup("test")
    # Stores of before know names alone.
    for name, said in (("Brats18_PHANTOM_001_1", True), ("PHANTOM_x", False)):
        case = store.read(name)
        meta = {k: v for k, v in case.meta.items() if k != "synthetic"}
        assert replace(case, meta=meta).synthetic is said
