"""Shares of a cohort: every case in exactly one, whoever asks, and in whatever order."""

import random

import pytest

from pmixseg.data.cohorts.shares import Share
from pmixseg.errors import InputError


@pytest.mark.parametrize(("cases", "total"), [(8, 3), (1, 4), (7, 7), (20, 1), (0, 2)])
def test_shares_divide_a_cohort_without_loss(cases, total):
    names = [f"case{n:03d}" for n in range(cases)]
    shares = []
    for number in range(1, total + 1):
        random.Random(number).shuffle(names)  # machines may list a folder in different orders
        shares.append(Share(number, total).of(names))
    assert sorted(name for share in shares for name in share) == sorted(names)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_share_by_hand():
    assert Share.parse("2/3").of(["e", "a", "d", "b", "c"]) == ["b", "e"]
    assert str(Share.parse(" 2/3 ")) == "2/3"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0/3", "count from 1/3 to 3/3"),
        ("4/3", "count from 1/3 to 3/3"),
        ("1/0", "count from 1/1 to 1/1"),
        ("2", "not of the form 2/8"),
        ("-1/3", "not of the form 2/8"),
        ("a/b", "not of the form 2/8"),
        ("", "not of the form 2/8"),
    ],
)
def test_no_such_share(text, says):
    with pytest.raises(InputError, match=says):
        Share.parse(text)
