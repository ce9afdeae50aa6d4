"""The campaign on the inputs of `inspect` and `prepare`: scans, descriptions, layouts, splits."""

import gzip
import json
import shutil
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pmixseg.cli.commands import read_task
from pmixseg.data.cohorts.layouts import find_cases, load_layout
from pmixseg.data.masks import MaskFile
from pmixseg.data.splits import SplitJson
from pmixseg.data.store.store import Store, prepare
from pmixseg.errors import InputError
from pmixseg.task import BRATS
from tests.campaign.judging import (
    Answer,
    Generator,
    Tally,
    asked,
    campaign,
    damage_text,
    flip_bits,
    run,
)

SEEDS = 250
NAME = "BraTS2021_00001"
SHAPE = (16, 14, 12)


def write_case(folder: Path) -> None:
    """A small healthy case."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for role in (*BRATS.modalities, "seg"):
        data = np.zeros(SHAPE, np.int16)
        data[2:14, 2:12, 2:10] = random.integers(50, 900, (12, 10, 8))
        if role == "seg":
            data = np.zeros(SHAPE, np.int16)
            data[5:9, 5:9, 4:8] = random.integers(0, 3, (4, 4, 4))
            data[6, 6, 5] = 4
        nib.save(nib.Nifti1Image(data, np.diag([-3.0, -3, 3, 1])), folder / f"{NAME}_{role}.nii.gz")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healthy")
    write_case(folder / NAME)
    return folder / NAME


def prepared(root: Path, store: Path, **search: object) -> int:
    """As `pmixseg prepare`, without its printing: the sentence of the first case left out."""
    try:
        report = prepare(find_cases(root, BRATS, **search), store, BRATS, progress=False)
    except InputError as error:
        print(error)  # noqa: T201  # as the command does
        return 1
    print(*report.failed.values())  # noqa: T201
    return 1 if report.failed else 0


class Scans(Generator):
    """A header or a stream of one file, damaged."""

    name = "nifti"
    fields = ((40, "8h"), (70, "h"), (72, "h"), (76, "8f"), (108, "f"), (112, "ff"), (123, "B"),
              (252, "hh"), (256, "6f"), (280, "12f"), (344, "4B"))  # fmt: skip
    values = (0, 1, -1, 2, 3, 4, 16, 64, 127, 255, 300, 512, 32767, -32768, 1e-30, 1e-3, 1e3, 1e30)

    def __init__(self, healthy: Path) -> None:
        self.healthy = healthy

    def damage(self, folder, random):
        shutil.copytree(self.healthy, folder / "c" / NAME)
        files = sorted((folder / "c" / NAME).iterdir())
        path = files[int(random.integers(len(files)))]
        kind = int(random.integers(5))
        packed = path.read_bytes()
        raw = bytearray(gzip.decompress(packed))
        if kind <= 1:
            offset, form = self.fields[int(random.integers(len(self.fields)))]
            count, letter = int(form[:-1] or 1) if form[:-1].isdigit() else len(form), form[-1]
            value = self.values[int(random.integers(len(self.values)))]
            at = offset + int(random.integers(count)) * struct.calcsize(letter)
            if letter == "f":
                value = float("nan") if random.random() < 0.15 else float(value)
            else:
                bounds = {"h": (-32768, 32767), "B": (0, 255)}[letter]
                value = int(np.clip(int(value), *bounds))
            struct.pack_into(f"<{letter}", raw, at, value)
            path.write_bytes(gzip.compress(bytes(raw)))
            return f"{path.name} byte {at} := {value}"
        if kind == 2:
            path.write_bytes(gzip.compress(flip_bits(bytes(raw), random, 352)))
            return f"{path.name} bits of the header"
        if kind == 3:
            path.write_bytes(flip_bits(packed, random))
            return f"{path.name} bits of the stream"
        path.write_bytes(packed[: int(random.integers(len(packed)))])
        return f"{path.name} cut"

    def use(self, folder):
        return run(lambda: prepared(folder / "c", folder / "s"))

    def is_right(self, folder):
        """An independent reader says the same of every file."""
        stored = Store.open(folder / "s").read(NAME)
        numbers = np.array([0, 1, 2, 4])[stored.native_label()]
        label = np.squeeze(nib.load(folder / "c" / NAME / f"{NAME}_seg.nii.gz").get_fdata())
        if numbers.shape != label.shape or not np.allclose(numbers, label, atol=1e-3):
            return False
        for index, modality in enumerate(BRATS.modalities):
            image = nib.load(folder / "c" / NAME / f"{NAME}_{modality}.nii.gz")
            data = np.squeeze(image.get_fdata())
            box = stored.geometry.box()
            back = stored.geometry.to_source(np.array(stored.image[index]), box, order=1)
            # An intercept of 1e-38 leaves a background of 0, a slope of 1e-10 leaves signal.
            inside = np.abs(data) > 1e-6 * min(1, np.abs(data).max())
            scores = (data - data[inside].mean()) / data[inside].std() * inside
            if not np.allclose(back, scores, atol=5e-3):
                return False
        return True


class Stores(Generator):
    """A file of a prepared store: cut, with flipped bits, gone, or another case's."""

    name = "store"

    def __init__(self, root: Path) -> None:
        self.healthy, self.truth = root, self.read(Store.open(root))

    def read(self, store):
        cases = {name: store.read(name, prove=True) for name in store.cases}
        return {name: (c.image.tobytes(), c.label.tobytes()) for name, c in cases.items()}

    def damage(self, folder, random):
        shutil.copytree(self.healthy, folder / "store")
        files = sorted(p for p in (folder / "store").rglob("*") if p.is_file())
        path = files[int(random.integers(len(files)))]
        raw = path.read_bytes()
        kind = ("cut", "bits", "gone", "other")[int(random.integers(4))]
        if kind == "gone":
            path.unlink()
        elif kind == "cut":
            path.write_bytes(raw[: int(random.integers(len(raw)))])
        elif kind == "bits":
            path.write_bytes(flip_bits(raw, random))
        else:
            alike = [p for p in files if p.name == path.name]
            path.write_bytes(alike[int(random.integers(len(alike)))].read_bytes())
        return f"{path.name} {kind}"

    def use(self, folder):
        def ask():
            store = Store.open(folder / "store")
            self.found = self.read(store)
            if store.unlisted:
                raise InputError(f"{store.unlisted} left out")  # as a training warns

        return asked(ask)

    def is_right(self, folder):
        return self.found == self.truth


class Texts(Generator):
    """A text file, damaged; ``ask`` reads it and returns an exit code, whose 0 is believed."""

    def __init__(self, name: str, text: str, suffix: str, ask) -> None:
        self.name, self.text, self.suffix, self.ask = name, text, suffix, ask

    def damage(self, folder, random):
        made = damage_text(self.text, random)
        (folder / f"input{self.suffix}").write_bytes(made)
        return repr(made[:200])

    def use(self, folder):
        return asked(lambda: self.ask(folder / f"input{self.suffix}"))

    def is_right(self, folder):
        return True  # what could be read says what it says; numbers have no checksum


DATASET = json.dumps(
    {
        "channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "Flair"},
        "labels": {"background": 0, "edema": 1, "necrosis": 2, "enhancing tumor": 3},
        "file_ending": ".nii.gz",
    }
)
LAYOUT = """base: brats2021
images:
  flair: "{patient}-{visit}/F.nii.gz"
  t1: ["{patient}-{visit}/T1.nii"]
  t1ce: "{patient}-{visit}/C.nii.gz"
  t2: "{patient}-{visit}/T2.nii.gz"
label: "{patient}-{visit}/seg.nii.gz"
case: "{patient}-{visit}"
codes: {NCR: 1, ED: 2, ET: 3}
ignored: [4]
fields: {visit: "[0-9]+"}
patient: "(.+)-[0-9]+"
"""
TASK = """name: t
modalities: [flair, t1]
labels: [A, B]
regions: {all: [A, B], b: [B]}
display: {flair: FLAIR}
"""
SPLIT = json.dumps({"train": ["a", "b"], "val": ["c"], "test": ["d"]})
MASKS = "case_id,combination\na,flair+t1ce+t2\nb,t1ce+t1+t2\n"


class _Case:
    grade, acquired, label = None, (True,) * 4, None

    def __init__(self, case_id: str) -> None:
        self.case_id = self.patient = case_id


CASES = [_Case(name) for name in "abcd"]


def _described(path: Path) -> None:
    root = path.parent / "root"
    for index in range(4):
        file = root / "imagesTr" / f"c_{index:04d}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    path.rename(root / "dataset.json")
    find_cases(root, BRATS)


def _laid_out(path: Path) -> None:
    root = path.parent / "p-1"
    root.mkdir()
    (root / "F.nii.gz").touch()
    find_cases(path.parent, BRATS, load_layout(path))


TEXTS = [
    Texts("dataset.json", DATASET, ".json", _described),
    Texts("layout YAML", LAYOUT, ".yaml", _laid_out),
    Texts("task YAML", TASK, ".yaml", read_task),
    Texts("split JSON", SPLIT, ".json", lambda p: SplitJson(p, missing="skip").split(CASES)),
    Texts("mask CSV", MASKS, ".csv", lambda p: MaskFile(p).allowed(CASES, BRATS.modalities)),
]


def check(tally: Tally, keep: Path) -> None:
    print("\n" + tally.table())  # noqa: T201  # what the campaign is run for
    assert not tally.faults, f"inputs are kept in {keep}:\n" + "\n".join(tally.faults[:20])


@pytest.mark.parametrize("generator", TEXTS, ids=lambda g: g.name)
def test_what_is_not_damaged_is_taken(tmp_path, generator):
    (tmp_path / f"input{generator.suffix}").write_text(generator.text)
    assert generator.use(tmp_path) == Answer(0, "")


def test_a_case_that_is_not_damaged_is_taken(healthy, tmp_path):
    """Else every damage would be refused for the same reason, and a campaign would try nothing."""
    scans = Scans(healthy)
    shutil.copytree(healthy, tmp_path / "c" / NAME)
    answer = scans.use(tmp_path)
    assert (answer.code, answer.text.strip()) == (0, "") and scans.is_right(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_damaged_scans_cause_no_fault(healthy, tmp_path, part):
    tally = Tally()
    seeds = range(part * SEEDS, (part + 1) * SEEDS)
    campaign(Scans(healthy), seeds, tmp_path / "work", tmp_path / "faults", tally)
    check(tally, tmp_path / "faults")


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(10), id="few"),
        pytest.param(range(10, 2 * SEEDS), id="many", marks=pytest.mark.slow),
    ],
)
def test_damaged_stores_cause_no_fault(healthy, tmp_path, seeds):
    cohort = tmp_path / "cohort"
    for number in range(3):
        name = f"BraTS2021_0000{number}"
        for file in healthy.iterdir():
            (cohort / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, cohort / name / file.name.replace(NAME, name))
        flair = cohort / name / f"{name}_flair.nii.gz"
        scan = nib.load(flair)
        voxels = np.asarray(scan.dataobj)
        voxels[5, 5, 5 : 6 + number] += 100  # no two patients have one scan
        nib.save(nib.Nifti1Image(voxels, scan.affine), flair)
    assert prepared(cohort, tmp_path / "store") == 0
    tally = Tally()
    campaign(Stores(tmp_path / "store"), seeds, tmp_path / "work", tmp_path / "faults", tally)
    check(tally, tmp_path / "faults")


@pytest.mark.slow
@pytest.mark.parametrize("generator", TEXTS, ids=lambda g: g.name)
def test_damaged_texts_cause_no_fault(tmp_path, generator):
    tally = Tally()
    campaign(generator, range(SEEDS), tmp_path / "work", tmp_path / "faults", tally)
    check(tally, tmp_path / "faults")


def test_the_campaign_itself_tells_right_from_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.campaign.judging.TOTAL", Tally())  # no fault of the product

    def crash(path: Path) -> None:
        raise KeyError("a fault")

    def refuse(path: Path) -> None:
        raise InputError("a sentence.")

    tally = Tally()
    for ask in (crash, refuse, lambda path: None):
        campaign(
            Texts("x", "some text", ".txt", ask), range(5), tmp_path / "w", tmp_path / "f", tally
        )
    assert tally.counts == {("x", "fault"): 5, ("x", "sentence"): 5, ("x", "right"): 5}
    assert len(tally.faults) == 5 and "KeyError: 'a fault'" in tally.faults[0]
    assert len(list((tmp_path / "f").iterdir())) == 1, "one input of a kind is kept"
    assert run(lambda: 0) == Answer(0, "")
