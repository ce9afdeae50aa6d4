import json
from types import SimpleNamespace

import numpy as np
import pytest

from pmixseg.data.masks import CovariateMasks, MaskFile, RandomMasks, SiteMasks
from pmixseg.describe import build, describe
from pmixseg.errors import InputError
from pmixseg.task import BRATS

M = BRATS.modalities
ALL = (True,) * 4


def case(case_id, acquired=ALL, label=None):
    return SimpleNamespace(case_id=case_id, acquired=acquired, label=label)


def rate(allowed, cases, m):
    return 1 - np.mean([allowed[c.case_id][m] for c in cases])


def test_a_csv_file_of_passion_is_read(tmp_path):
    path = tmp_path / "mr2468.csv"
    path.write_text(
        "data_name,mask_id,mask,pos_mask_ids\n"
        'a,1,"[False, True, False, False]",[1]\n'
        'b,6,"[True, False, True, False]","[2, 3, 6]"\n'
    )
    allowed = MaskFile(path).allowed(
        [case("a"), case("b", (True, True, False, True)), case("c")], M
    )
    assert allowed == {
        "a": (False, True, False, False),
        "b": (True, False, False, False),
        "c": ALL,
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", "case_id,combination\na,t1+flair\n"),
        ("m.csv", 'case,mask\na,"[1, 0, 1, 0]"\n'),
        ("m.json", json.dumps({"a": "flair+t1"})),
        ("m.json", json.dumps({"a": ["t1", "flair"]})),
        ("m.csv", "\ufeffcase_id,combination\na,t1+flair\n"),  # as Excel writes it
        ("m.json", "\ufeff" + json.dumps({"a": "flair+t1"})),
    ],
)
def test_every_notation_says_the_same(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert MaskFile(tmp_path / name).allowed([case("a")], M) == {"a": (True, False, True, False)}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.json", json.dumps({"zz": "t1", "a": "t1", "b7": "t1"}), "b7, zz"),
        ("m.json", json.dumps({"a": "t1+pd"}), r"m.json, case 'a'.*pd"),
        ("m.json", json.dumps({"a": 3}), "case 'a'.*no combination"),
        ("m.json", json.dumps({"a": [True, False]}), "case 'a'.*no combination"),
        ("m.json", '{"a": "t1", "a": "t2"}', "names case 'a' twice"),
        ("m.json", "[1]", "list"),
        ("m.json", "{", "not JSON"),
        ("m.json", 10_000 * '{"a":', "not JSON"),
        ("m.csv", "x,y\n1,2\n", "columns"),
        ("m.csv", "", "columns"),
        ("m.csv", 'case,mask\na,"[1, 0, 1]"\n', "3 flags for the 4"),
        ("m.csv", "case,combination\na,t1\na,t2\n", "twice"),
        ("m.csv", "case,combination\na,t2\n", "without any"),
        ("m.csv", "case,combination\na\n", "row 1 lacks its 'case' or 'combination'"),
        ("m.csv", "combination,case\nt1\n", "row 1 lacks"),
        ("m.csv", 'case,combination\na,"' + 200_000 * "t", "not CSV"),
        ("m.csv", "\udcff", "cannot be read"),
        ("none.csv", None, "cannot be read"),
    ],
)
def test_faults_of_a_mask_file_are_named(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=words):
        MaskFile(tmp_path / name).allowed([case("a", (True, True, True, False))], M)


def test_random_masks_have_the_rates_and_stay():
    cases = [case(f"c{i}") for i in range(4000)]
    masks = RandomMasks({"t1": 0.2, "t1ce": 0.4, "flair": 0.6, "t2": 0.8}, seed=1)
    allowed = masks.allowed(cases, M)
    # All four would be missing in 0.2 * 0.4 * 0.6 * 0.8 = 3.84 %; the rest is conditioned on.
    for m, r in zip(M, (0.6, 0.4, 0.2, 0.8), strict=True):
        assert abs(rate(allowed, cases, M.index(m)) - (r - 0.0384) / (1 - 0.0384)) < 0.03
    assert all(any(a) for a in allowed.values())
    assert build(describe(masks)).allowed(cases[7:9], M) == {
        c.case_id: allowed[c.case_id] for c in cases[7:9]
    }
    assert RandomMasks({"t1": 0.5}, seed=2).allowed(cases, M) != RandomMasks(
        {"t1": 0.5}, seed=3
    ).allowed(cases, M)


def test_random_masks_never_give_what_is_not_acquired():
    acquired = (False, True, False, True)
    cases = [case(f"c{i}", acquired) for i in range(200)]
    for flags in RandomMasks(0.9).allowed(cases, M).values():
        assert any(flags)
        assert not flags[0] and not flags[2]


def test_each_site_has_rates_of_its_own():
    cases = [case(f"Brats18_{site}_{i}_1") for site in ("CBICA", "TCIA") for i in range(1000)]
    allowed = SiteMasks("Brats18_([A-Z]+)", {"TCIA": {"t1ce": 0.7}}).allowed(cases, M)
    assert rate(allowed, cases[:1000], 1) == 0
    assert abs(rate(allowed, cases[1000:], 1) - 0.7) < 0.05
    with pytest.raises(InputError, match="MIT"):
        SiteMasks("Brats18_([A-Z]+)", {"MIT": 0.5}).allowed(cases, M)
    with pytest.raises(InputError, match="no group"):
        SiteMasks("Brats18", {})
    with pytest.raises(InputError, match="wrong"):
        SiteMasks("(", {})
    with pytest.raises(InputError, match="wrong"):
        SiteMasks(f"(a){{{10**20}}}", {})


def test_covariate_masks_follow_tumour_size():
    cases = [case(f"c{i}", label=np.ones(10 if i % 2 else 1000, np.uint8)) for i in range(4000)]
    masks = CovariateMasks({"flair": 0.5}, {"flair": -2.0})
    allowed = masks.allowed(cases, M)
    # Two equal groups have z = +1 and -1: sigmoid(-2) and sigmoid(2).
    assert abs(rate(allowed, cases[::2], 0) - 0.119) < 0.03
    assert abs(rate(allowed, cases[1::2], 0) - 0.881) < 0.03
    assert rate(allowed, cases, 1) == 0


def test_covariate_masks_from_a_file(tmp_path):
    path = tmp_path / "quality.csv"
    path.write_text("case_id,snr\n" + "".join(f"c{i},{i % 2}\n" for i in range(2000)))
    cases = [case(f"c{i}") for i in range(2002)]
    masks = CovariateMasks({"t2": 0.5}, {"t2": 3.0}, path, "snr")
    allowed = masks.allowed(cases, M)
    assert abs(rate(allowed, cases[1:2000:2], 3) - 0.953) < 0.03
    with pytest.raises(InputError, match="'noise'"):
        CovariateMasks({"t2": 0.5}, {"t2": 3.0}, path, "noise").allowed(cases, M)
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")  # as Excel writes it
    assert masks.allowed(cases, M) == allowed
    path.write_bytes(b"case_id,snr\na,\xff\n")
    with pytest.raises(InputError, match="must be a CSV"):
        masks.allowed(cases, M)
    with pytest.raises(InputError, match="slope but no rate"):
        CovariateMasks({"t2": 0.5}, {"t1": 3.0})


def test_equal_covariates_change_nothing():
    cases = [case(f"c{i}", label=np.ones(5, np.uint8)) for i in range(300)]
    same = CovariateMasks({"flair": 0.5}, {"flair": 4.0}).allowed(cases, M)
    assert same == RandomMasks({"flair": 0.5}).allowed(cases, M)
