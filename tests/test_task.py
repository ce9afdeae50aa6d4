import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmixseg.errors import InputError
from pmixseg.task import (
    BRATS,
    Task,
    all_combinations,
    format_combination,
    parse_combination,
    presence,
)


def test_brats_has_the_fifteen_combinations_of_the_papers():
    combinations = BRATS.combinations()
    assert len(combinations) == 15
    assert combinations[0] == ("flair",)
    assert combinations[-1] == BRATS.modalities
    assert [len(c) for c in combinations] == [1] * 4 + [2] * 6 + [3] * 4 + [4]


def test_regions_are_unions_of_class_indices():
    assert BRATS.region_classes("WT") == (1, 2, 3)
    assert BRATS.region_classes("TC") == (1, 3)
    assert BRATS.region_classes("ET") == (3,)


def test_task_survives_its_own_dictionary():
    again = Task.from_dict(BRATS.to_dict())
    assert again == BRATS
    assert again.to_dict() == BRATS.to_dict()


@given(st.sets(st.sampled_from(BRATS.modalities), min_size=1), st.randoms())
def test_parse_is_the_inverse_of_format_in_any_order(names, random):
    shuffled = list(names)
    random.shuffle(shuffled)
    parsed = parse_combination(format_combination(shuffled), BRATS.modalities)
    assert parsed == tuple(m for m in BRATS.modalities if m in names)
    assert presence(parsed, BRATS.modalities) == tuple(m in names for m in BRATS.modalities)


@pytest.mark.parametrize(
    ("text", "word"),
    [("flair+adc", "adc"), ("", "''"), ("FLAIR", "FLAIR"), ("t1+t1", "one modality twice")],
)
def test_unknown_modality_is_named(text, word):
    with pytest.raises(InputError, match=word):
        parse_combination(text, BRATS.modalities)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": 5}, "name is 5; give a text"),
        ({"modalities": ("a", "a")}, "different names"),
        ({"modalities": ()}, "one or more"),
        ({"labels": ("x+y",)}, "without '\\+'"),
        ({"regions": {}}, "no region"),
        ({"regions": {"R": ("z",)}}, "union of"),
        ({"modalities": "t1"}, "modalities is 't1', not a list of names"),
        ({"labels": "x"}, "labels is 'x', not a list of names"),
        ({"regions": {"R": "x"}}, "region 'R' is 'x', not a list"),
        ({"modalities": [1, 2]}, r"modalities is \[1, 2\], not a list of names"),
        ({"labels": [True]}, "labels .* in quotes"),
        ({"labels": 3}, "labels is 3, not a list"),
        ({"regions": {"R": [None]}}, "region 'R' .* not a list of names"),
        ({"regions": ["R"]}, "regions is .* not a mapping"),
        ({"regions": {False: ["x"]}}, "regions is .* not a mapping"),
        ({"display": "t1"}, "display is 't1', not a mapping"),
    ],
)
def test_impossible_tasks_are_refused_in_words(change, words):
    fields = {"name": "t", "modalities": ("a",), "labels": ("x",), "regions": {"R": ("x",)}}
    with pytest.raises(InputError, match=words):
        Task(**{**fields, **change})


def test_an_unknown_region_is_named_beside_those_that_there_are():
    with pytest.raises(InputError, match=r"no region 'XT'; use one of .*'WT'"):
        BRATS.region_classes("XT")


def test_combinations_of_any_number_of_modalities_are_listed():
    assert len(all_combinations(tuple("abcdef"))) == 63
    assert all_combinations(("ct",)) == [("ct",)]
