"""Every protocol of docs/method/missingness.md from YAML, at training and at test."""

import json
import re
import shlex
import shutil

import pandas as pd
import pytest
import yaml

from pmixseg.callbacks.protocols import frequencies, protocol_scores
from pmixseg.cli import main
from pmixseg.data.missing import FixedList, UniformCombinations
from pmixseg.data.store.store import Store
from pmixseg.modules import StudentModule, load
from pmixseg.task import BRATS
from tests.cli.presets import EXPERIMENTS, SMALL_UNET, fit, last_of_each, score

README = (EXPERIMENTS / "missingness" / "README.md").read_text()
ROWS = [shlex.split(row) for row in re.findall(r"^\| `(.+?)` \| (?:sampler|mask) \|", README, re.M)]
PROTOCOLS = {words[0].partition("=")[2] or words[0]: words for words in ROWS}
"""Class or file of each row of the table -> its flags, or the file."""
SAMPLERS = {
    **{name: name for name in ("UniformCombinations", "UniformSizes", "Bernoulli", "FixedList")},
    "structured.yaml": "Protocols",
    "Dependent": "Dependent",
}
MASKS = ["masks.csv", *(f"pmixseg.data.masks.{n}Masks" for n in ("Random", "Site", "Covariate"))]
STUDENT = ["brats2018/student.yaml", *SMALL_UNET]


@pytest.fixture
def seen(monkeypatch):
    """What every training sample had and was shown: lists of (case, acquired, present)."""
    rows, draw = [], StudentModule.draw_present

    def spy(self, batch):
        present = draw(self, batch)
        rows.extend(
            zip(batch["case_id"], batch["acquired"].tolist(), present.tolist(), strict=True)
        )
        return present

    monkeypatch.setattr(StudentModule, "draw_present", spy)
    return rows


@pytest.mark.parametrize("name", SAMPLERS)
def test_protocols_that_are_drawn_anew_in_every_step(name, seen, phantom_store, tmp_path):
    flags = [w if w.startswith("--") else f"missingness/{w}" for w in PROTOCOLS[name]]
    flags += ["--data.patches_per_case=4", "--trainer.limit_train_batches=8"]
    assert fit(phantom_store, tmp_path, *STUDENT, *flags) == 0
    sampler = load(tmp_path / "checkpoints" / "last.ckpt").sampler
    assert type(sampler).__name__ == SAMPLERS[name]
    allowed = set(frequencies(sampler, BRATS.modalities, BRATS.modalities, 4096))
    shown = {
        "+".join(m for m, flag in zip(BRATS.modalities, present, strict=True) if flag)
        for _, _, present in seen
    }
    assert len(seen) == 16
    assert len(shown) > 1
    assert shown <= allowed


def masked(name, store, tmp_path):
    """Flags of a mask, fitted to the phantom's names."""
    if name == "masks.csv":
        (tmp_path / "m.csv").write_text(
            "data_name,mask_id,mask,pos_mask_ids\n"
            + "".join(f'{c},1,"[True, False, False, True]",[1]\n' for c in Store.open(store).cases)
        )
        return [f"--data.mask_file={tmp_path / 'm.csv'}"]
    sites = ["--data.masks.rates={PHANTOM: {t1ce: 0.7}}"] if "Site" in name else []
    return last_of_each([*PROTOCOLS[name], *sites])


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_stay_with_a_case_in_training_and_at_test(
    name, seen, phantom_store, tmp_path, capsys
):
    flags = masked(name, phantom_store, tmp_path)
    assert fit(phantom_store, tmp_path / "run", *STUDENT, *flags) == 0
    assert any(not all(acquired) for _, acquired, _ in seen)
    for _, acquired, present in seen:
        assert not any(p and not a for p, a in zip(present, acquired, strict=True))
    few = "--trainer.limit_test_batches=3"
    assert score(phantom_store, tmp_path / "run", few, *flags) == 0
    records = pd.read_csv(tmp_path / "run" / "records.csv")
    per_case = records.groupby("case")["combination"].nunique()
    assert (per_case < 15).any()
    if name == "masks.csv":
        assert set(records["combination"]) == {"flair", "t2", "flair+t2"}


def test_a_json_file_says_what_each_case_lacks(seen, phantom_store, tmp_path):
    listed = {case: ["t1ce", "t1"] for case in Store.open(phantom_store).cases}
    (tmp_path / "m.json").write_text(json.dumps(listed))
    flags = [f"--data.mask_file={tmp_path / 'm.json'}"]
    assert fit(phantom_store, tmp_path / "run", *STUDENT, *flags) == 0
    assert all(acquired == [False, True, True, False] for _, acquired, _ in seen)


def test_a_case_without_a_file_is_never_imputed(seen, phantom_root, tmp_path):
    """The file of one sequence is gone: acquired says so, and no record claims the sequence."""
    root = tmp_path / "cohort"
    for folder in sorted(p.parent for p in phantom_root.rglob("*_t1ce.nii.gz"))[:2]:
        shutil.copytree(folder, root / folder.parent.name / folder.name)
    (lost, *_) = sorted(root.rglob("*_t1ce.nii.gz"))
    lost.unlink()
    name = lost.name.removesuffix("_t1ce.nii.gz")
    store = tmp_path / "store"
    assert main(["prepare", str(root), str(store), "--workers", "0"]) == 0
    run = tmp_path / "run"
    whole = ["--data.split.part=train", "--trainer.limit_train_batches=4"]
    split = "--data.split=pmixseg.data.splits.WholeCohort"
    assert fit(store, run, *STUDENT, split, *whole) == 0
    for case, acquired, present in seen:
        assert acquired == [True, case != name, True, True]
        assert acquired[1] or not present[1]
    assert name in {case for case, _, _ in seen}
    assert score(store, run) == 0
    table = pd.read_csv(run / "records.csv").groupby("case")["combination"].unique()
    assert not [c for c in table[name] if "t1ce" in c.split("+")]
    assert len(table[name]) == 7
    assert all(len(table[case]) == 15 for case in table.index if case != name)


def test_every_protocol_of_the_readme_is_tested():
    assert list(PROTOCOLS) == [*SAMPLERS, *MASKS]
    files = {path.name for path in (EXPERIMENTS / "missingness").glob("*.yaml")}
    assert files == {"structured.yaml", "test-protocols.yaml"}


def test_protocols_beside_the_full_table_at_test(phantom_store, tmp_path):
    flags = ["--data.split=pmixseg.data.splits.WholeCohort", "--data.split.part=train"]
    assert fit(phantom_store, tmp_path, *STUDENT, *flags) == 0
    path = EXPERIMENTS / "missingness" / "test-protocols.yaml"
    config, few = f"--config={path}", "--trainer.limit_test_batches="
    assert score(phantom_store, tmp_path, config, f"{few}2") == 0
    scores = pd.read_csv(tmp_path / "protocols.csv").set_index(["protocol", "region"])
    raw = yaml.safe_load(path.read_text())["trainer"]["callbacks+"][0]
    assert set(scores.index.get_level_values(0)) == set(raw["init_args"]["protocols"])
    records = pd.read_csv(tmp_path / "records.csv")
    for region, table in records.groupby("region"):
        one = table[table["combination"] == "flair+t1+t2"]["dice"].mean()
        assert scores.loc[("no-contrast-agent", region), "dice"] == pytest.approx(one)
        uniform = scores.loc[("uniform", region), "dice"]
        assert uniform == pytest.approx(table["dice"].mean(), abs=0.05)
    assert (scores["cases"] == 2).all()
    # Records are written after it: they must not be lost with it.
    (tmp_path / "protocols.csv").unlink()
    (tmp_path / "protocols.csv").mkdir()
    (tmp_path / "records.csv").unlink()
    with pytest.warns(UserWarning, match=r"protocols\.csv cannot be written \(Is a directory\)"):
        assert score(phantom_store, tmp_path, config, f"{few}1") == 0
    assert (tmp_path / "records.csv").is_file()
    assert not list(tmp_path.glob(".*.csv"))


def test_scores_by_hand():
    rows = [
        {"case": "a", "combination": c, "region": "WT", "dice": d}
        for c, d in (("flair", 0.2), ("t1", 0.4), ("flair+t1", 0.9))
    ]
    rows.append({"case": "b", "combination": "t1", "region": "WT", "dice": 0.5})
    sampler = FixedList(["flair", "flair+t1"], [1, 3])
    scores = protocol_scores(rows, sampler, BRATS.modalities, 20000)
    # a: ¼ · 0.2 + ¾ · 0.9 = 0.725; b has T1 alone: 0.5.
    assert scores["dice"].item() == pytest.approx((0.725 + 0.5) / 2, abs=0.005)
    assert scores["cases"].item() == 2
    odds = frequencies(UniformCombinations(), ("t1", "t2"), BRATS.modalities, 20000)
    assert odds == pytest.approx({"t1": 1 / 3, "t2": 1 / 3, "t1+t2": 1 / 3}, abs=0.02)
