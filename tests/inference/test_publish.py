"""Checkpoints to published folders and back."""

import json
from dataclasses import replace

import pytest
import torch

import pmixseg
from pmixseg.cli import main
from pmixseg.errors import InputError
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.records.sidecar import Sidecar, checkpoint_identity
from pmixseg.inference.publish import Facts, as_checkpoint, publish, results_of
from pmixseg.task import BRATS
from pmixseg.weights.published import CARD, DESCRIPTION, WEIGHTS
from tests.inference.tiny_models import save, tiny_student


@pytest.fixture
def checkpoint(tmp_path):
    return save(tiny_student(), tmp_path / "best.ckpt")


def records_of(dice, checkpoint, phantom=True):
    rows = [
        {"case": case, "combination": combination, "region": region, "dice": value, "hd95": 3.0}
        for case, combination, region, value in dice
    ]
    about = Sidecar(BRATS, {"hd95": "pooled"}, checkpoint=checkpoint, phantom=phantom)
    return Records.from_rows(rows, "demo", about)


def test_a_published_model_answers_as_its_checkpoint(checkpoint, tmp_path):
    folder = publish(checkpoint, tmp_path / "model", Facts(title="Tiny", licence="CC-BY-4.0"))
    back = as_checkpoint(folder, tmp_path / "back.ckpt")
    image, shown = torch.randn(1, 4, 32, 32, 32), torch.tensor([[True, False, True, False]])
    expected = pmixseg.load(checkpoint)(image, shown).logits
    for source in (folder, back):
        module = pmixseg.load(source)
        assert torch.equal(module(image, shown).logits, expected)
        assert module.preparation == pmixseg.load(checkpoint).preparation


def test_terms_of_the_training_stay_behind(tmp_path):
    module = tiny_student()
    module.terms["align"] = torch.nn.Linear(2, 2)
    folder = publish(save(module, tmp_path / "x.ckpt"), tmp_path / "model")
    assert pmixseg.load(folder).terms.keys() == set()


def test_no_case_and_no_folder_is_published(tmp_path):
    path = save(tiny_student(), tmp_path / "x.ckpt")
    content = torch.load(path, weights_only=True)
    content["pmixseg"]["cases"] = {"store": "home/doe", "train": {"Doe_Jane": "0"}}
    torch.save(content, path)
    (tmp_path / "model").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pmixseg.inference.publish.read_checkpoint", lambda source: content)
        folder = publish(path, tmp_path / "model")
    text = "".join((folder / name).read_text() for name in (CARD, DESCRIPTION))
    assert "doe" not in text.lower()


def test_no_file_of_another_project_is_replaced(checkpoint, tmp_path):
    (tmp_path / CARD).write_text("# my project")
    with pytest.raises(InputError, match=r"README\.md is there already and of no published model"):
        publish(checkpoint, tmp_path)
    assert (tmp_path / CARD).read_text() == "# my project"
    for _ in range(2):  # a model that was published there is
        publish(checkpoint, tmp_path / "model")


def test_no_file_of_a_published_model_is_a_pickle(checkpoint, tmp_path):
    folder = publish(checkpoint, tmp_path / "model")
    assert sorted(p.name for p in folder.iterdir()) == sorted([CARD, DESCRIPTION, WEIGHTS])
    length = int.from_bytes((folder / WEIGHTS).read_bytes()[:8], "little")
    header = json.loads((folder / WEIGHTS).read_bytes()[8 : 8 + length])
    assert "backbone.heads.0.weight" in header
    json.loads((folder / DESCRIPTION).read_text(), parse_constant=pytest.fail)  # no NaN


def test_changed_weights_are_refused(checkpoint, tmp_path):
    folder = publish(checkpoint, tmp_path / "model")
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-5] ^= 4
    (folder / WEIGHTS).write_bytes(bytes(data))
    with pytest.raises(InputError, match="SHA-256 differs"):
        pmixseg.load(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=f"{WEIGHTS} is missing; fetch or publish"):
        pmixseg.load(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1, "about": {}}'])
def test_damaged_descriptions_are_one_sentence(checkpoint, tmp_path, text):
    folder = publish(checkpoint, tmp_path / "model")
    (folder / DESCRIPTION).write_text(text)
    with pytest.raises(InputError, match=DESCRIPTION):
        pmixseg.load(folder)


def test_a_description_cannot_name_code(checkpoint, tmp_path):
    folder = publish(checkpoint, tmp_path / "model")
    raw = json.loads((folder / DESCRIPTION).read_text())
    raw["description"]["init_args"]["criterion"] = {"class_path": "os.system", "init_args": {}}
    (folder / DESCRIPTION).write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"os\.system"):
        pmixseg.load(folder)


def test_results_by_hand(checkpoint):
    rows = [("a", "t1", "WT", 0.2), ("b", "t1", "WT", 0.4), ("a", "flair", "WT", 0.8)]
    rows += [(c, m, r, 0.5) for c, m, _, _ in rows for r in ("TC", "ET")]
    results = results_of(records_of(rows, None), BRATS)
    first = results[0]  # a: (0.2 + 0.8) / 2, b: 0.4
    assert (first.combination, first.region, first.mean, first.cases) == (
        "mean of all",
        "WT",
        45.0,
        2,
    )
    assert (first.low, first.high) == (40.0, 50.0)  # all that two cases can be drawn to
    alone = next(r for r in results if r.combination == "flair" and r.region == "WT")
    assert (alone.mean, alone.low, alone.high, alone.cases) == (80.0, None, None, 1)


def test_the_card_says_what_was_measured_and_on_what(checkpoint, tmp_path):
    rows = [(c, "t1", r, d) for c, d in (("a", 0.2), ("b", 0.4)) for r in BRATS.regions]
    path = records_of(rows, checkpoint_identity(checkpoint)).write(tmp_path / "records.csv")
    folder = publish(checkpoint, tmp_path / "model", Facts("Tiny", "MIT", "a phantom"), path)
    card = (folder / CARD).read_text()
    for text in ("Research use only", "| t1 | WT | 30.0 |", "synthetic", "license: MIT", "pooled"):
        assert text in card
    about = json.loads((folder / DESCRIPTION).read_text())["about"]
    assert about["results"][0]["mean"] == 30.0


def test_the_card_says_that_the_model_knew_cases_and_that_others_were_not_scored(
    checkpoint, tmp_path
):
    records = records_of([("a", "t1", "WT", 0.9)], checkpoint_identity(checkpoint))
    about = replace(records.sidecar, seen=("a",), part="test", part_size=3)
    path = replace(records, sidecar=about).write(tmp_path / "records.csv")
    card = (publish(checkpoint, tmp_path / "model", records=path) / CARD).read_text()
    assert "**1 of these cases were used to train or select the model, so its scores are" in card
    assert "**1 of 3 cases of the part were scored.**" in card


def test_records_of_another_checkpoint_are_refused(checkpoint, tmp_path):
    other = {"file": "other.ckpt", "sha256": "0" * 64}
    path = records_of([("a", "t1", "WT", 0.5)], other).write(tmp_path / "records.csv")
    with pytest.raises(InputError, match="another checkpoint"):
        publish(checkpoint, tmp_path / "model", records=path)


def test_a_model_is_published_and_imported_by_command(checkpoint, tmp_path, capsys):
    folder, back = tmp_path / "model", tmp_path / "back.ckpt"
    assert main(["publish", str(checkpoint), str(folder), "--title", "Tiny"]) == 0
    assert main(["import", "pmixseg", str(folder), "-o", str(back)]) == 0
    assert pmixseg.load(back).task == BRATS
    assert main(["models"]) == 0
    assert "rfnet-brats2020" in capsys.readouterr().out
    assert main(["import", "pmixseg", str(checkpoint), "-o", str(back)]) == 1
    assert "no folder of a published model" in capsys.readouterr().err


def test_a_disk_that_refuses_the_weights_is_one_sentence(checkpoint, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        code = main(["publish", str(checkpoint), str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert f"{WEIGHTS} cannot be written (File too large)" in capsys.readouterr().err
