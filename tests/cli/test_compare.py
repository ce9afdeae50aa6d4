"""``pmixseg compare`` from run folders to what a person reads."""

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from pmixseg.cli import main
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.records.sidecar import Sidecar
from pmixseg.task import BRATS, format_combination
from tests.evaluation.made_up import figures_left_empty

WHERE = Sidecar(BRATS, conventions={"percentile": "pooled"})


def write_run(root, name, seed, gain=0.0, known=True, checkpoint=None, split=None):
    """Records of a training with this seed; less Dice with fewer sequences."""
    rng = np.random.default_rng((seed, len(name), ord(name[0])))
    rows = []
    for case in range(6):
        for combination in BRATS.combinations():
            for region in BRATS.regions:
                dice = 0.5 + 0.05 * len(combination) + gain + rng.normal(0, 0.02)
                row = {"case": f"c{case}", "combination": format_combination(combination)}
                rows.append({**row, "region": region, "dice": dice, "hd95": 90 * (1 - dice)})
    digest = {"file": "best.ckpt", "sha256": checkpoint or name}
    config = {"seed": {"everything": 0, "data": seed}, "split": split} if known else {}
    about = replace(WHERE, checkpoint=digest, config=config)
    Records.from_rows(rows, name, about).write(root / name / "records.csv")
    return str(root / name)


@pytest.fixture
def arms(tmp_path):
    a = [write_run(tmp_path, f"a{s}", s, gain=0.1) for s in range(3)]
    return a, [write_run(tmp_path, f"b{s}", s) for s in range(3)]


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr("pmixseg.cli.commands.console.width", 80)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_row_of_the_table_is_one_line_of_80_characters(arms, narrow, monkeypatch, encoding):
    a, b = arms
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    assert main(["compare", "--a", *a, "--b", *b]) == 0
    sys.stdout.flush()
    said = sys.stdout.buffer.getvalue().decode(encoding).splitlines()
    assert max(map(len, said)) <= 80
    rows = [line for line in said if line.split()[:1] in (["WT"], ["TC"], ["ET"])]
    assert len(rows) == 45
    assert all(len(row.split()) == 11 for row in rows)  # "low to high" is three words
    text = " ".join(" ".join(said).split())
    assert "Two methods: A = a0, a1, a2; B = b0, b1, b2" in text
    assert "A is better" in text
    assert "different seeds" not in text


def test_another_measure_and_everything_as_json(arms, tmp_path, capsys):
    a, b = arms
    out = tmp_path / "new" / "found.json"
    command = ["compare", "--a", *a, "--b", *b, "--measure", "hd95", "-o", str(out)]
    assert main(command) == 0
    assert "EXPLORATORY: HD95 (mm) per" in capsys.readouterr().out
    comparison = json.loads(out.read_text())
    assert comparison["exploratory"]["measure"] == "hd95"
    assert comparison["primary"]["difference"] == pytest.approx(0.1, abs=0.01)
    assert main([*command[:-1], str(tmp_path / "a0" / "records.csv" / "x.json")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert main(["compare", "--a", *a, "--b", *b, "--measure", "nds"]) == 1
    assert "nds" in capsys.readouterr().err


def test_one_training_is_not_counted_twice(arms, tmp_path, capsys):
    a, b = arms
    again = write_run(tmp_path, "copy", 0, checkpoint="a0")
    assert main(["compare", "--a", *a, again, "--b", *b, b[0]]) == 1
    assert "'a0' and 'copy' of A were scored with the same checkpoint" in capsys.readouterr().err


def test_pairs_of_different_seeds_are_named(arms, tmp_path, capsys):
    a, b = arms
    later = write_run(tmp_path, "b5", 5)
    assert main(["compare", "--a", *a, "--b", b[0], later, b[1]]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Runs of different seeds are paired, as they are named: a1 (data 1, " in said
    assert "a1 (data 1, everything 0) with b5 (data 5, everything 0)" in said
    assert "a0 (" not in said
    # Runs of older code do not say their seed: nothing is claimed about them.
    older = write_run(tmp_path, "older", 5, known=False)
    assert main(["compare", "--a", a[0], "--b", older]) == 0
    assert "different seeds" not in capsys.readouterr().out


def test_pairs_trained_on_other_cases_are_named(arms, tmp_path, capsys):
    a = arms[0][:2]
    x = [write_run(tmp_path, f"x{seed}", seed, split="x") for seed in range(2)]
    y = [write_run(tmp_path, f"y{seed}", seed, split="x" if seed else "y") for seed in range(2)]
    told = "Runs of different splits are paired, as they are named: x0 (split x) with y0 (split y)."
    for one, other, known in ((x, y, True), (x, a, False), (a, x, False)):
        assert main(["compare", "--a", *one, "--b", *other]) == 0
        assert (told in " ".join(capsys.readouterr().out.split())) is known


def test_runs_are_paired_by_seed_in_whatever_order_they_are_named(arms, tmp_path, capsys):
    a, b = arms
    found = []
    for named in (b, [b[2], b[0], b[1]]):
        assert main(["compare", "--a", *a, "--b", *named, "-o", str(tmp_path / "x.json")]) == 0
        found.append(json.loads((tmp_path / "x.json").read_text()))
    assert found[0] == found[1] and found[1]["runs_b"] == ["b0", "b1", "b2"]
    assert "different seeds" not in capsys.readouterr().out
    # One seed in two runs of a side pairs nothing by itself: the order that was named stays.
    b[2] = write_run(tmp_path, "again", 1)
    assert main(["compare", "--a", *a, "--b", *b[::-1]]) == 0
    assert "different seeds" in capsys.readouterr().out


def test_folds_share_no_case_and_are_told_how_to_be_compared(arms, tmp_path, capsys):
    sides = []
    for side in arms:
        for i, folder in enumerate(side):
            fold = Records.read(folder)
            fold.table["case"] = f"fold {i} " + fold.table["case"]
            sides.append(str(fold.write(tmp_path / f"fold-{len(sides)}" / "records.csv").parent))
    assert main(["compare", "--a", *sides[:3], "--b", *sides[3:]]) == 1
    said = capsys.readouterr().err
    assert "no case, combination and region has 'dice' in every run" in said
    assert "join the folds of each seed" in said


def test_seeds_and_marks_of_another_form_are_left_out(arms, tmp_path):
    a, b = arms
    for run in (*a, *b):
        path = tmp_path / run / "records.json"
        told = {"config": {"seed": 3}, "checkpoint": {"file": "x"}, "git": {"dirty": True}}
        path.write_text(json.dumps({**json.loads(path.read_text()), **told}))
    assert main(["compare", "--a", *a, "--b", *b]) == 0
    page = str(tmp_path / "page.html")
    with figures_left_empty():
        assert main(["report", *a, "-o", page, "--no-images"]) == 0
