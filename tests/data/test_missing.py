import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmixseg.data.keys import make_key
from pmixseg.data.missing import (
    Bernoulli,
    Dependent,
    FixedList,
    Protocols,
    UniformCombinations,
    UniformSizes,
)
from pmixseg.describe import build, describe
from pmixseg.errors import InputError
from pmixseg.task import BRATS

M = BRATS.modalities
N = 20_000
KEYS = torch.tensor([make_key(0, 0, i) for i in range(N)])
SAMPLERS = [
    UniformCombinations(),
    UniformSizes(),
    Bernoulli({"flair": 0.2, "t1": 0.9, "t2": 0.5}),
    FixedList(["flair+t1", "t1ce", "t1+t2"], [1, 2, 3]),
    Protocols({"no contrast agent": "flair+t1+t2", "old scanner": "t1+t2"}),
    Dependent({"flair": 0.3, "t1": 0.4, "t1ce": 0.1}, {"t1ce": {"t1": 0.9, "flair": 0.5}}),
]


def frequencies(sampler, acquired=(True,) * 4):
    drawn = sampler.draw(KEYS, torch.tensor([acquired]).expand(N, -1), M)
    return {c: n / N for c, n in Counter(map(tuple, drawn.tolist())).items()}


def assert_frequencies(sampler, expected, acquired=(True,) * 4):
    """``expected`` maps flags to probabilities; 5 standard errors are allowed (draws are fixed)."""
    shares = frequencies(sampler, acquired)
    assert set(shares) <= {c for c, p in expected.items() if p > 0}
    for c, p in expected.items():
        assert abs(shares.get(c, 0) - p) < 5 * math.sqrt(p * (1 - p) / N) + 1e-12, c


def subsets(acquired=(True,) * 4):
    flags = itertools.product([False, True], repeat=4)
    return [
        c for c in flags if any(c) and all(a or not s for a, s in zip(acquired, c, strict=True))
    ]


def normalised(weights):
    return {c: w / sum(weights.values()) for c, w in weights.items()}


@pytest.mark.parametrize(
    "acquired", [(True,) * 4, (True, False, True, True), (False, True, False, False)]
)
def test_uniform_combinations_are_equally_frequent(acquired):
    each = subsets(acquired)
    assert_frequencies(UniformCombinations(), dict.fromkeys(each, 1 / len(each)), acquired)


@pytest.mark.parametrize("acquired", [(True,) * 4, (False, True, True, True)])
def test_uniform_sizes_are_equally_frequent(acquired):
    n = sum(acquired)
    expected = {c: 1 / n / math.comb(n, sum(c)) for c in subsets(acquired)}
    assert_frequencies(UniformSizes(), expected, acquired)


@pytest.mark.parametrize("acquired", [(True,) * 4, (False, False, True, True)])
def test_bernoulli_is_conditioned_on_not_being_empty(acquired):
    rates = {"flair": 0.2, "t1ce": 0.0, "t1": 0.9, "t2": 0.5}
    if not acquired[1]:
        rates["t1ce"] = 0.3
    weights = {
        c: math.prod(
            (1 - rates[m] if shown else rates[m]) if a else 1.0
            for m, shown, a in zip(M, c, acquired, strict=True)
        )
        for c in subsets(acquired)
    }
    assert_frequencies(Bernoulli(rates), normalised(weights), acquired)


def test_bernoulli_drops_each_at_its_rate():
    weights = {c: 0.7 ** sum(c) * 0.3 ** (4 - sum(c)) for c in subsets()}
    assert_frequencies(Bernoulli(0.3), normalised(weights))


def test_a_fixed_list_follows_its_weights():
    sampler = FixedList(["flair+t1", "t1ce"], [1, 3])
    assert_frequencies(
        sampler, {(True, False, True, False): 0.25, (False, True, False, False): 0.75}
    )


def test_fixed_list_on_an_incomplete_case():
    sampler = FixedList(["flair+t1", "t1ce", "t1ce+t2"], [1, 1, 2])
    # Without T1ce and T1: 'flair' remains of the first, nothing of the second, 't2' of the third.
    acquired = (True, False, False, True)
    expected = {(True, False, False, False): 1 / 3, (False, False, False, True): 2 / 3}
    assert_frequencies(sampler, expected, acquired)
    only_t2 = (False, False, False, True)
    assert frequencies(FixedList(["flair+t1", "t1ce"]), only_t2) == {only_t2: 1.0}


def test_protocols_are_a_weighted_list():
    protocols = {"all": "flair+t1ce+t1+t2", "emergency": "flair+t1"}
    expected = {(True,) * 4: 0.75, (True, False, True, False): 0.25}
    assert_frequencies(Protocols(protocols, {"all": 3}), expected)


@pytest.mark.parametrize("acquired", [(True,) * 4, (True, True, False, True)])
def test_dependent_rates_follow_what_is_missing(acquired):
    def weight(c):
        flair, t1ce, t1, t2 = c
        p = 0.7 if flair else 0.3
        p *= (0.6 if t1 else 0.4) if acquired[2] else 1.0
        rate = max([0.1] * (flair and t1) + [0.5] * (not flair) + [0.9] * (not t1))
        p *= (1 - rate) if t1ce else rate
        return p * (1.0 if t2 else 0.0)

    sampler = Dependent({"flair": 0.3, "t1": 0.4, "t1ce": 0.1}, {"t1ce": {"t1": 0.9, "flair": 0.5}})
    assert_frequencies(sampler, normalised({c: weight(c) for c in subsets(acquired)}), acquired)


rows = st.lists(st.booleans(), min_size=4, max_size=4).filter(any)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
@given(acquired=st.lists(rows, min_size=1, max_size=5), key=st.integers(0, 2**63 - 6))
def test_never_empty_within_acquired_and_row_by_row(sampler, acquired, key):
    acquired = torch.tensor(acquired)
    keys = key + torch.arange(len(acquired))
    drawn = sampler.draw(keys, acquired, M)
    assert drawn.dtype == torch.bool and drawn.shape == acquired.shape
    assert drawn.any(1).all()
    assert not (drawn & ~acquired).any()
    alone = [sampler.draw(keys[i : i + 1], acquired[i : i + 1], M) for i in range(len(keys))]
    assert torch.equal(drawn, torch.cat(alone))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_a_sampler_rebuilt_from_its_description_draws_alike(sampler):
    again = build(describe(sampler))
    acquired = torch.ones(50, 4, dtype=torch.bool)
    assert torch.equal(again.draw(KEYS[:50], acquired, M), sampler.draw(KEYS[:50], acquired, M))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Bernoulli(1.0), r"\[0, 1\)"),
        (lambda: Bernoulli({"t1": -0.1}), "t1"),
        (lambda: FixedList([]), "no combination"),
        (lambda: FixedList(["t1"], [1, 2]), "weights"),
        (lambda: Protocols({"a": "t1"}, {"b": 1}), "'b'"),
        (lambda: Dependent(0.5, {"t1": {"t2": 0.5}, "t2": {"flair": 0.1}}), "in turn"),
        (lambda: Bernoulli({"pd": 0.5}).draw(KEYS[:1], torch.ones(1, 4).bool(), M), "'pd'"),
        (lambda: FixedList(["pd"]).draw(KEYS[:1], torch.ones(1, 4).bool(), M), "pd"),
    ],
)
def test_impossible_rates_and_unknown_modalities_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_one_modality_is_always_shown():
    acquired = torch.ones(20, 1, dtype=torch.bool)
    for sampler in (UniformCombinations(), UniformSizes(), Bernoulli(0.9)):
        assert sampler.draw(KEYS[:20], acquired, ("ct",)).all()
