import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmixseg.data.parts import PUBLISHED, Split, deal, hash_cases
from pmixseg.data.splits import (
    Fractions,
    KFold,
    SplitFiles,
    SplitJson,
    SplitLists,
    WholeCohort,
    divided_patients,
)
from pmixseg.describe import build, describe
from pmixseg.errors import InputError

LISTS = Path(__file__).parents[2] / "../shared/splits"


def case(case_id, grade=None, patient=None):
    return SimpleNamespace(case_id=case_id, grade=grade, patient=patient or case_id)


def cohort(hgg=30, lgg=12):
    return [case(f"h{i:03}", "HGG") for i in range(hgg)] + [
        case(f"l{i:03}", "LGG") for i in range(lgg)
    ]


def test_hash_by_hand():
    assert hash_cases(["abc"]) == "ba7816bf8f01cfea"  # FIPS 180-2, appendix B.1


@pytest.mark.skipif(not LISTS.exists(), reason="../shared/splits is not there")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_published_lists_are_recognised(number):
    files = {p: LISTS / f"brats2018_split{number}_{p}.txt" for p in ("train", "val", "test")}
    everyone = [case(i) for f in files.values() for i in f.read_text().split()]
    split = SplitFiles(**files).split(everyone)
    assert (len(split.train), len(split.val), len(split.test)) == (199, 29, 57)
    assert split.published == f"BraTS 2018 split {number} (199/29/57)"
    assert split.name == split.published
    changed = Split(split.train[1:], split.val, split.test)
    assert changed.published is None and changed.name == changed.hash != split.hash
    assert len(PUBLISHED) == 3


def test_folders_of_a_store_name_their_cases(tmp_path):
    split = SplitLists([tmp_path / "a"], val=["b"], test=(Path("st/cases/c"),))
    assert split.split([case(name) for name in "abc"]) == Split(("a",), ("b",), ("c",))


def test_hash_ignores_order_and_tells_parts_apart():
    assert Split(("a", "b"), ("c",)).hash == Split(("b", "a"), ("c",)).hash
    assert Split(("a", "b"), ("c",)).hash != Split(("a", "b"), (), ("c",)).hash


def test_a_split_is_read_from_lists_of_cases(tmp_path):
    (tmp_path / "train.txt").write_text("\ufeffb\na  # the first\n\n# comment\n", encoding="utf-8")
    (tmp_path / "test.txt").write_text("c\r\nd\r\n")
    plan = SplitFiles(tmp_path / "train.txt", test=tmp_path / "test.txt")
    assert plan.split([case(c) for c in "abcde"]) == Split(("b", "a"), (), ("c", "d"))
    with pytest.raises(
        InputError,
        match=r"names 2 of 4 cases that the cohort lacks: a, d; .*skip; --data.split.missing",
    ):
        plan.split([case(c) for c in "bc"])
    (tmp_path / "test.txt").write_text("c\na\n")
    with pytest.raises(InputError, match="'a' is in train and again in test"):
        plan.split([case(c) for c in "abcde"])
    with pytest.raises(InputError, match=r"none.txt cannot be read"):
        SplitFiles(tmp_path / "none.txt").split([])
    with pytest.raises(InputError, match=r"no file of case names; give --data\.split\.train FILE"):
        SplitFiles().split([case("a")])


def test_names_with_a_hash_are_read_whole(tmp_path):
    (tmp_path / "t.txt").write_text("x#1\np 0 #2\n#3\n# p4\n#p5\np6\t# last\n", encoding="utf-8")
    names = ["x#1", "p 0 #2", "#3", "p4", "p5", "p6", "x", "p 0"]
    split = SplitFiles(tmp_path / "t.txt").split([case(c) for c in names])
    assert split.train == ("x#1", "p 0 #2", "#3", "p6")
    with pytest.raises(InputError, match=r"names 1 of 4 cases that the cohort lacks: x#1;"):
        SplitFiles(tmp_path / "t.txt").split([case(c) for c in names[1:]])


def test_a_split_is_read_from_json(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": ["a"], "val": ["b"], "test": ["c"]}))
    assert SplitJson(path).split([case(c) for c in "abc"]) == Split(("a",), ("b",), ("c",))
    path.write_text(json.dumps([{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]))
    assert SplitJson(path, fold=1).split([case(c) for c in "ab"]) == Split(("b",), ("a",))
    with pytest.raises(InputError, match="2 folds"):
        SplitJson(path, fold=2).split([])
    with pytest.raises(InputError, match="lacks: b"):
        SplitJson(path).split([case("a")])
    for wrong in ('{"train": "a"}', '{"training": []}', "3", '{"train": [1]}'):
        path.write_text(wrong)
        with pytest.raises(InputError, match="lists of case ids"):
            SplitJson(path).split([])
    path.write_text('{"train": ["a"], "train": ["b"]}')
    with pytest.raises(InputError, match=r"split.json names a part twice \(train, train\)"):
        SplitJson(path).split([case(c) for c in "ab"])
    path.write_text('{"train": ["a", "b", "a"]}')
    with pytest.raises(InputError, match=r"split.json: split: case 'a' is twice in train; name"):
        SplitJson(path).split([case(c) for c in "ab"])
    path.write_text('{"train": ["a"], "test": ["b"]}')
    with pytest.raises(InputError, match="holds one split and no list of folds, so there is no"):
        SplitJson(path, fold=3).split([case(c) for c in "ab"])
    path.write_bytes("{}".encode("utf-16"))
    for odd in (path, tmp_path, tmp_path / "none.json"):
        with pytest.raises(InputError, match=r"cannot be read \([^:]+(: [^:]+)?\); correct it\.$"):
            SplitJson(odd).split([])
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        SplitJson(path).split([])


@pytest.mark.parametrize("seed", [0, 1])
def test_folds_test_every_case_once_and_keep_the_grades_balanced(seed):
    cases = cohort()
    splits = [KFold(k, 5, 0.1, seed).split(cases) for k in range(5)]
    assert Counter(c for s in splits for c in s.test) == Counter(c.case_id for c in cases)
    for split in splits:
        assert sorted(split.train + split.val + split.test) == [c.case_id for c in cases]
        assert sum(c.startswith("h") for c in split.test) == 6
        assert sum(c.startswith("l") for c in split.test) in (2, 3)
        assert 3 <= len(split.val) <= 4


def test_deal_depends_on_seed_not_on_order():
    cases = cohort()
    assert KFold(1).split(cases) == KFold(1).split(cases[::-1])
    assert KFold(1).split(cases) != KFold(1, seed=1).split(cases)
    assert Fractions().split(cases).hash == build(describe(Fractions())).split(cases).hash


def test_the_deal_is_the_same_in_every_version():
    # The deal must not change between versions: results would no longer be comparable.
    split = Fractions(0.5, 0.25, 0.25, seed=3).split([case(f"c{i}") for i in range(8)])
    assert split == Split(("c1", "c3", "c5", "c7"), ("c0", "c4"), ("c2", "c6"))


@pytest.mark.parametrize("patients", [4, 5, 6, 7])
def test_a_small_cohort_leaves_no_part_empty(patients):
    cases = [case(f"s{i}", None, f"p{i % patients}") for i in range(2 * patients)]
    parts = Fractions().split(cases)
    assert all((parts.train, parts.val, parts.test))
    assert sorted(parts.train + parts.val + parts.test) == sorted(c.case_id for c in cases)
    assert divided_patients(parts, cases) == []
    assert len(parts.train) >= max(len(parts.val), len(parts.test))
    fold = KFold(0, 2, 0.1).split(cases)
    assert fold.val and fold.train and divided_patients(fold, cases) == []


def test_the_test_part_is_what_the_others_leave():
    assert Fractions(0.5, 0.2).shares == Fractions(0.5, 0.2, 0.3).shares
    assert Fractions().shares == {"train": 0.7, "val": 0.1, "test": 0.2}
    with pytest.raises(InputError, match="sum to 1"):
        Fractions(0.8, 0.3)


@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from(["HGG", "LGG", None])),
        min_size=8,
        max_size=60,
    ),
    st.integers(2, 4),
    st.integers(0, 5),
)
def test_patients_stay_together(rows, folds, seed):
    cases = [case(f"s{i}", g, f"p{p}") for i, (p, g) in enumerate(rows)]
    parts = deal(cases, [1 / folds] * folds, seed)
    assert sorted(c.case_id for part in parts for c in part) == sorted(c.case_id for c in cases)
    homes = [{c.patient for c in part} for part in parts]
    assert sum(len(h) for h in homes) == len({c.patient for c in cases})


@given(st.integers(6, 80), st.integers(0, 40), st.integers(0, 3))
def test_fractions_are_met_within_one_case_per_grade(hgg, lgg, seed):
    cases = cohort(hgg, lgg)
    shares = [0.7, 0.1, 0.2]
    for share, part in zip(shares, deal(cases, shares, seed), strict=True):
        assert abs(len(part) - share * len(cases)) <= 2
        assert abs(sum(c.grade == "LGG" for c in part) - share * lgg) <= 2


def test_impossible_plans_are_refused():
    with pytest.raises(InputError, match="leave test without"):
        KFold(2, 3, 0).split([case("a"), case("b")])
    with pytest.raises(InputError, match="2 cases leave"):
        Fractions().split([case("a"), case("b")])
    with pytest.raises(InputError, match="sum to 1"):
        Fractions(0.5, 0.1, 0.1)
    with pytest.raises(InputError, match="fold 5 of 5"):
        KFold(5, 5)


def test_share_zero_gets_nothing():
    split = Fractions(0.8, 0.0, 0.2).split(cohort())
    assert split.val == () and len(split.test) in (8, 9)
    assert KFold(0, 5, 0.0).split(cohort()).val == ()


def test_a_whole_cohort_is_one_share():
    assert WholeCohort().split([case("b"), case("a")]) == Split(test=("a", "b"))


def split_file(folder, **parts):
    path = folder / "split.json"
    path.write_text(json.dumps(parts))
    return path


def test_many_lacking_cases_are_a_count_and_the_first_five(tmp_path):
    ids = [f"c{i:02}" for i in range(20)]
    path = split_file(tmp_path, train=ids[:18], val=["v"], test=["t"])
    with pytest.raises(InputError) as told:
        SplitJson(path).split([case("c00"), case("v"), case("t")])
    assert (
        "names 17 of 20 cases that the cohort lacks: c01, c02, c03, c04, c05 and 12 more;"
        in str(told.value)
    )


@pytest.mark.parametrize("kind", ["files", "json"])
def test_lacking_cases_can_be_skipped_and_are_recorded(tmp_path, kind):
    if kind == "json":
        path = split_file(tmp_path, train=["a", "b"], val=["c"], test=["d", "e"])
        plan, strict = SplitJson(path, missing="skip"), SplitJson(path)
    else:
        files = {}
        for part, names in (("train", "a\nb"), ("val", "c"), ("test", "d\ne")):
            files[part] = tmp_path / f"{part}.txt"
            files[part].write_text(names)
        plan, strict = SplitFiles(**files, missing="skip"), SplitFiles(**files)
    assert build(describe(plan, "split")).split([case(c) for c in "abcde"]).lacking == ()
    split = plan.split([case(c) for c in "acd"])
    assert split == Split(("a",), ("c",), ("d",), lacking=("b", "e"))
    assert split.name == f"{split.hash}, 2 cases lacking"
    with pytest.raises(InputError, match="the cohort has none of the cases of val;"):
        plan.split([case(c) for c in "ad"])
    with pytest.raises(InputError, match="names 2 of 5"):
        strict.split([case(c) for c in "acd"])


def test_patients_in_two_parts_of_a_split_file_are_named():
    cases = [case(f"p{p}-{v}", patient=f"p{p}") for p in range(3) for v in (1, 2)]
    split = Split(("p0-1", "p0-2", "p1-1"), ("p1-2",), ("p2-1",))
    assert divided_patients(split, cases) == ["p1"]
    assert divided_patients(Fractions(0.5, 0.0, 0.5).split(cases), cases) == []
