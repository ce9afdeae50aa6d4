import csv
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmixseg.errors import InputError
from pmixseg.evaluation.records import sidecar as sidecar_module
from pmixseg.evaluation.records.records import (
    FIRST_COLUMNS,
    Records,
    find_records,
    gather_rows,
    read_comparable,
)
from pmixseg.evaluation.records.sidecar import FORMAT, Sidecar, checkpoint_identity, git_state
from pmixseg.task import BRATS, Task
from tests.processes import Copy

ABOUT = Sidecar(BRATS, conventions={"hd95_rule": "pooled"})


def row(case="a", combination="t1", region="WT", dice=0.5, **more):
    return {"case": case, "combination": combination, "region": region, "dice": dice, **more}


def made(*rows, about=ABOUT, run="r"):
    return Records.from_rows(rows, run, about)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("dice", 1.2, "dice of case 'b', t1, WT is 1.2, which no Dice can be"),
        ("dice", -0.1, "dice of case 'b', t1, WT is -0.1"),
        ("dice", math.inf, "is inf"),
        ("hd95", -1, "hd95 of case 'b', t1, WT is -1, which no HD95 can be"),
        ("volume_ml", -3.0, "volume_ml of case 'b'"),
        ("asd", "x", "['asd'] hold other things than numbers"),
    ],
)
def test_numbers_that_no_test_writes_are_refused(tmp_path, column, value, words):
    """A signed error may be negative, and every measure may be lacking."""
    path = made(row(volume_error_ml=-2.0, hd95=math.nan), row("b")).write(tmp_path)
    table = pd.read_csv(path)
    Records.read(path)
    table[column] = [math.nan, value]
    table.to_csv(path, index=False)
    with pytest.raises(InputError, match=re.escape(words)):
        Records.read(path)


def test_a_damaged_note_of_a_parquet_file_is_one_sentence(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = made(row()).write(tmp_path / "records.parquet")
    table = parquet.read_table(path)
    notes = {k: v.replace(b"pandas_type", b"pandas_tyqe") for k, v in table.schema.metadata.items()}
    parquet.write_table(table.replace_schema_metadata(notes), path)
    with pytest.raises(InputError, match=r"records.parquet: cannot be read as a table"):
        Records.read(path)


def test_a_row_that_stands_twice_is_refused(tmp_path):
    path = made(row(), row("b")).write(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[-1].replace("0.5", "0.9")]))
    with pytest.raises(InputError, match=r"holds case 'b', t1, WT more than once, 1 row too many"):
        Records.read(path)


def test_columns_begin_as_documented_and_rows_follow_the_task():
    records = made(
        row("b", region="ET"),
        row("a", "t2+flair", volume=3.0),
        row("b", region="WT"),
        row("a", "t1"),
        row("a", "flair"),
    ).table
    assert tuple(records.columns) == (*FIRST_COLUMNS, "volume")
    assert list(zip(records["case"], records["combination"], records["region"], strict=True)) == [
        ("a", "flair", "WT"),
        ("a", "t1", "WT"),
        ("a", "flair+t2", "WT"),
        ("b", "t1", "WT"),
        ("b", "t1", "ET"),
    ]
    assert list(records["n_present"]) == [1, 1, 2, 1, 1]
    assert set(records["run"]) == {"r"}


text = st.text("0123456789aN_- ,\"'é", min_size=1, max_size=8)
share = st.floats(0, 1) | st.just(math.nan)
distance = st.floats(0, allow_infinity=True) | st.just(math.nan)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(text, share, distance), min_size=1, max_size=5))
def test_what_is_written_is_read_bit_for_bit(tmp_path, values):
    before = made(*(row(c, dice=d, hd95=h) for c, d, h in values))
    before.write(tmp_path / "records.csv")
    after = Records.read(tmp_path)
    pd.testing.assert_frame_equal(after.table, before.table, check_exact=True, check_dtype=False)
    assert after.sidecar.to_dict() == before.sidecar.to_dict()
    assert not after.altered


def test_case_ids_stay_text(tmp_path):
    made(row("00014"), row("NA"), row("1e3")).write(tmp_path / "records.csv")
    assert list(Records.read(tmp_path).table["case"]) == ["00014", "1e3", "NA"]


def test_a_full_disk_leaves_the_old_table_whole(tmp_path, monkeypatch):
    path = tmp_path / "records.csv"
    made(row("a")).write(path)
    old = path.read_bytes()

    def full(self, to, **_):
        Path(to).write_text("half a ta")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(InputError, match="No space left"):
        made(row("b")).write(path)
    assert path.read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["records.csv", "records.json"]


def test_a_table_changed_by_hand_is_noticed(tmp_path):
    path = made(row("a", dice=0.25)).write(tmp_path / "records.csv")
    path.write_text(path.read_text().replace("0.25", "0.95"))
    assert Records.read(path).altered


def test_sidecar_tells_what_the_rows_mean(tmp_path):
    weights = tmp_path / "best.ckpt"
    weights.write_bytes(b"abc")
    about = Sidecar(
        BRATS,
        conventions={"hd95_rule": "pooled"},
        postprocess=("fill_holes",),
        checkpoint=checkpoint_identity(weights),
        split="brats2018-split1",
        config={"seed": 3, "out": Path("x")},
    ).stamped()
    made(row(), about=about).write(tmp_path)
    raw = json.loads((tmp_path / "records.json").read_text())
    assert raw["format"] == FORMAT
    assert raw["task"]["modalities"] == ["flair", "t1ce", "t1", "t2"]
    # SHA-256 of "abc", FIPS 180-2 appendix B.1.
    assert raw["checkpoint"]["sha256"].startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")
    assert raw["versions"]["pmixseg"]
    assert raw["table"]["rows"] == 1
    assert raw["config"] == {"seed": 3, "out": "x"}
    assert raw["created"].endswith("+00:00")
    assert Records.read(tmp_path).sidecar.to_dict() == about.to_dict()


def test_git_state_names_the_commit_and_sees_changes(tmp_path):
    assert git_state(tmp_path) is None

    def git(*args):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *args], check=True, capture_output=True)

    git("init")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-m", "x")
    assert git_state(tmp_path)["dirty"] is False
    assert len(git_state(tmp_path)["commit"]) == 40
    (tmp_path / "f").write_text("2")
    assert git_state(tmp_path)["dirty"] is True


FORMAT_1 = {
    "format": 1,
    "task": {
        "name": "two",
        "modalities": ["ct", "pet"],
        "labels": ["lesion"],
        "regions": {"lesion": ["lesion"]},
        "display": {},
    },
    "conventions": {"hd95_rule": "pooled"},
    "postprocess": [],
    "checkpoint": None,
    "split": None,
    "part": "test",
    "phantom": None,
    "config": {},
    "versions": {"pmixseg": "0.1.0"},
    "git": None,
    "created": "2025-01-01T00:00:00+00:00",
    "table": {"file": "records.csv", "rows": 1, "sha256": "0"},
}


def test_format_1_stays_readable(tmp_path):
    (tmp_path / "records.csv").write_text(
        "run,case,combination,n_present,region,dice,hd95\nr,c,ct+pet,2,lesion,0.5,1.5\n"
    )
    (tmp_path / "records.json").write_text(json.dumps(FORMAT_1))
    records = Records.read(tmp_path)
    assert records.task.modalities == ("ct", "pet")
    assert records.table["dice"].tolist() == [0.5]
    assert records.altered


def test_an_older_format_passes_through_every_step(monkeypatch):
    steps = dict(sidecar_module.UPGRADES)
    monkeypatch.setattr(sidecar_module, "FORMAT", FORMAT + 1)
    steps[FORMAT] = lambda raw: {**raw, "format": FORMAT + 1, "part": raw["part"].upper()}
    monkeypatch.setattr(sidecar_module, "UPGRADES", steps)
    assert Sidecar.from_dict(FORMAT_1).part == "TEST"


def test_a_bare_table_of_any_code_is_read(tmp_path):
    table = tmp_path / "theirs" / "records.csv"
    table.parent.mkdir()
    table.write_text("case,combination,region,dice\n1,t1ce+flair,WT,0.5\n")
    records = Records.read(table)
    assert records.task == BRATS
    assert records.table["combination"].tolist() == ["flair+t1ce"]
    assert records.table["run"].tolist() == ["theirs"]
    assert math.isnan(records.table["hd95"][0])
    assert records.sidecar.conventions == {"source": "not stated"}
    table.write_text("case,combination,region,dice\n1,ct+pet,tumour,0.5\n")
    assert Records.read(table).task.modalities == ("ct", "pet")
    own = Task("own", ("pet", "ct"), ("tumour",), {"tumour": ("tumour",)})
    assert Records.read(table, own).table["combination"].tolist() == ["pet+ct"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("records.csv", "", "cannot be read as a table"),
        ("records.csv", "a,b\n1,2\n", "lacks the columns"),
        ("records.csv", "case,combination,region,dice\n", "holds no row"),
        ("records.csv", "run,case,combination,region,dice\nr,1,t9,WT,1\n", "names"),
        ("records.csv", "run,case,combination,region,dice\nr,1,t1,XX,1\n", "regions"),
        (
            "records.csv",
            "run,case,combination,region,dice\nr,1,t1,WT,1\ns,1,t1,WT,1\n",
            r"holds rows of 2 runs \(r, s\); give each",
        ),
        ("records.csv", "case,combination,region,dice\n1,t1,WT,good\n", r"\['dice'\] hold other"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    (tmp_path / "records.json").write_text(json.dumps({**FORMAT_1, "task": BRATS.to_dict()}))
    with pytest.raises(InputError, match=words) as caught:
        Records.read(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "no JSON object"),
        ('{"format": 99}', "format 99 is not known"),
        ('{"format": 1}', r"records\.json cannot be read \(a task is a mapping"),
        ({"config": 3}, r"\(Sidecar: config is 3; give a mapping\); restore the file"),
        ({"git": 3}, "git is 3; give a mapping or null"),
        ({"conventions": [1]}, r"conventions is \[1\]; give a mapping"),
        ({"conventions": {"a": []}}, r"conventions holds \[\]; give a text or a number or null"),
        ({"checkpoint": {"sha256": 3}, "git": {"commit": 1}}, r"256, git\.commit cannot be read"),
        ({"config": {"evaluation": 3}}, r"config\.evaluation cannot be read"),
        (
            {"config": {"evaluation": {"temperatures": {"1": "x"}}}},
            r"config\.evaluation\.temperatures\.\* cannot be read",
        ),
    ],
)
def test_a_damaged_sidecar_is_named(tmp_path, content, words):
    made(row()).write(tmp_path)
    if isinstance(content, dict):
        content = json.dumps({"format": 1, "task": BRATS.to_dict(), **content})
    (tmp_path / "records.json").write_text(content)
    with pytest.raises(InputError, match=words):
        Records.read(tmp_path)


def test_a_folder_without_records_is_named(tmp_path):
    with pytest.raises(InputError, match=r"holds no records\.csv"):
        find_records(tmp_path)
    with pytest.raises(InputError, match=r"\.csv or \.parquet"):
        made(row()).write(tmp_path / "records.xlsx")


def test_parquet_without_its_package_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # an import of None is an ImportError
    with pytest.raises(InputError, match=r"needs the package pyarrow.*pmixseg\[parquet\]"):
        made(row("00014")).write(tmp_path / "records.parquet")
    assert not list(tmp_path.iterdir())


def test_parquet_is_written_and_read_like_csv(tmp_path):
    pytest.importorskip("pyarrow", reason="needs pmixseg[parquet]")
    path = tmp_path / "records.parquet"
    before = made(row("00014", dice=0.1), row("b", "flair+t2", hd95=2.0))
    before.write(path)
    after = Records.read(tmp_path)
    assert not after.altered
    pd.testing.assert_frame_equal(after.table, before.table, check_dtype=False)


def test_of_two_tables_the_one_written_last_is_read(tmp_path):
    pytest.importorskip("pyarrow", reason="needs pmixseg[parquet]")
    for name, case in (("records.csv", "old"), ("records.parquet", "new"), ("records.csv", "last")):
        made(row(case)).write(tmp_path / name)
        assert Records.read(tmp_path).table["case"].tolist() == [case]


def test_runs_that_were_scored_in_other_ways_are_not_compared(tmp_path):
    about = Sidecar(BRATS, conventions={"percentile": "pooled"})
    paths = [tmp_path / name for name in "abc"]
    made(row(), about=replace(about, checkpoint={"sha256": "1"})).write(paths[0])
    made(row(), about=replace(about, checkpoint={"sha256": "2"})).write(paths[1])
    made(row(), about=replace(about, postprocess=("fill_holes",))).write(paths[2])
    assert len(read_comparable(paths[:2])) == 2
    with pytest.raises(InputError, match=r"c and .*a were scored in different ways \(postp"):
        read_comparable(paths)
    (paths[1] / "records.json").unlink()
    with pytest.raises(InputError, match=r"ways \(conventions\), or one has no records.json"):
        read_comparable(paths[:2])


def test_gathering_alone_drops_repeats():
    rows = [row("b"), row("a"), row("b"), row("a", "flair")]
    assert gather_rows(rows) == [row("a"), row("a", "flair"), row("b")]


def gather(rank, folder):
    place = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    cases = [["a", "c", "e"], ["b", "d", "a"]][rank]  # the sampler repeats "a" on rank 1
    rows = [row(c, k, rank=rank) for c in cases for k in ("flair", "t1")]
    (folder / f"{rank}.json").write_text(json.dumps(gather_rows(rows)))
    dist.destroy_process_group()


@pytest.mark.ddp
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_ranks_give_every_case_once(tmp_path):
    ranks = [Copy(gather, rank, tmp_path) for rank in range(2)]
    assert [rank.join() for rank in ranks] == [(0, "")] * 2
    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2))
    assert first == second
    assert [r["case"] for r in first] == ["a", "a", "b", "b", "c", "c", "d", "d", "e", "e"]
    assert {r["rank"] for r in first if r["case"] == "a"} == {0}


def write_often(name, path, barrier):
    barrier.wait(60)
    for i in range(12):
        Records.from_rows([row(f"{name}{i}")], "r", Sidecar(BRATS)).write(path)


@pytest.mark.skipif(os.name == "nt", reason="writing is locked on POSIX only")
def test_two_processes_may_write_at_once(tmp_path):
    path = tmp_path / "records.csv"
    barrier = multiprocessing.get_context("fork").Barrier(2)
    writers = [Copy(write_often, name, path, barrier) for name in ("a", "b")]
    assert [writer.join()[0] for writer in writers] == [0, 0]
    records = Records.read(path)  # table and sidecar of one write, whichever was last
    assert len(records.table) == 1
    assert not records.altered
    assert sorted(p.name for p in tmp_path.iterdir()) == ["records.csv", "records.json"]


ODD_NAMES = ["=HYPERLINK(1)", "+x", "-x", "@x", "'=x", "'x", "-7", "a,b", 'a"b', "a\nb", "ü", "NA"]


def test_odd_names_come_back_and_no_spreadsheet_runs_them(tmp_path):
    row = {"combination": "t1", "region": "WT", "dice": 0.5, "hd95": 9.0}
    rows = [{"case": name, **row} for name in ODD_NAMES]
    path = Records.from_rows(rows, "=run()", ABOUT).write(tmp_path / "records.csv")
    with path.open(newline="") as stream:
        cells = [cell for line in csv.reader(stream) for cell in line]
    acting = [c for c in cells if c[:1] in tuple("=+-@") and c != "-7"]
    assert len(cells) > len(ODD_NAMES) and not acting
    back = Records.read(path).table
    assert sorted(back["case"]) == sorted(ODD_NAMES)
    assert set(back["run"]) == {"=run()"}
