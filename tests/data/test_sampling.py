from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmixseg.data.sampling import CaseSampler, EpochSampler

sizes = st.integers(1, 12)


def all_ranks(cases, per_case, batch, world, epoch=0, seed=0):
    samplers = [EpochSampler(cases, per_case, batch, seed, r, world) for r in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(s) for s in samplers]


@given(cases=sizes, per_case=st.integers(1, 4), batch=st.integers(1, 5), world=st.integers(1, 4))
def test_no_sample_is_lost_or_repeated(cases, per_case, batch, world):
    ranks = all_ranks(cases, per_case, batch, world)
    lengths = {len(r) for r in ranks}
    assert len(lengths) == 1 and lengths.pop() % batch == 0
    indices = [i for r in ranks for _, i in r]
    assert len(set(indices)) == len(indices)
    assert set(range(cases * per_case)) <= set(indices)
    assert 0 <= len(indices) - cases * per_case < batch * world
    seen = Counter(i % cases for i in indices)
    assert len(seen) == cases and max(seen.values()) - min(seen.values()) <= 1


@given(cases=sizes, per_case=st.integers(1, 4), batch=st.integers(1, 3))
def test_two_ranks_share_the_batches_of_one_process(cases, per_case, batch):
    one = all_ranks(cases, per_case, 2 * batch, 1)[0]
    two = all_ranks(cases, per_case, batch, 2)
    steps = range(0, len(one), 2 * batch)
    joined = [two[0][s // 2 : s // 2 + batch] + two[1][s // 2 : s // 2 + batch] for s in steps]
    assert joined == [one[s : s + 2 * batch] for s in steps]


def test_order_depends_on_seed_and_epoch_alone():
    first = all_ranks(20, 2, 4, 1, epoch=3, seed=5)
    assert first == all_ranks(20, 2, 4, 1, epoch=3, seed=5)
    assert [i for _, i in first[0]] != [i for _, i in all_ranks(20, 2, 4, 1, 4, 5)[0]]
    assert [i for _, i in first[0]] != [i for _, i in all_ranks(20, 2, 4, 1, 3, 6)[0]]
    assert {e for e, _ in first[0]} == {3}
    assert [i for _, i in first[0]] != sorted(i for _, i in first[0])


def test_added_patches_are_of_other_cases_in_other_epochs():
    added = {
        frozenset(i % 7 for _, i in all_ranks(7, 1, 4, 1, epoch=e)[0] if i >= 7) for e in range(20)
    }
    assert len(added) > 3


@given(cases=st.integers(1, 20), world=st.integers(1, 6))
def test_cases_are_dealt_once(cases, world):
    dealt = [list(CaseSampler(cases, r, world)) for r in range(world)]
    assert all(dealt)
    assert [len(CaseSampler(cases, r, world)) for r in range(world)] == [len(d) for d in dealt]
    counts = Counter(i for d in dealt for i in d)
    assert set(counts) == set(range(cases))
    if cases >= world:
        assert set(counts.values()) == {1}


@pytest.mark.parametrize("world", [1, 2])
def test_no_case_is_no_case(world):
    assert list(CaseSampler(0, 0, world)) == []
