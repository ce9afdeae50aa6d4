"""The order in which an epoch goes through cases, and the keys of its patches."""

from collections import Counter
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.data_connector import _resolve_overfit_batches
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader

from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.keys import _uniform_there, generator, make_key, uniform
from pmixseg.data.sampling import CaseSampler, EpochLoader, EpochSampler
from pmixseg.errors import InputError

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


MASK = (1 << 64) - 1


def slow_mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def slow_uniform(key, stream_hash, n):
    state = slow_mix(key ^ stream_hash)
    return [
        (slow_mix((state + j * 0x9E3779B97F4A7C15) & MASK) >> 11) * 2.0**-53
        for j in range(1, n + 1)
    ]


@given(st.integers(0, 2**63 - 1), st.text(max_size=8))
def test_uniform_is_splitmix64_in_plain_integers(key, stream):
    import hashlib

    digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
    stream_hash = int.from_bytes(digest, "little") >> 1
    expected = slow_uniform(key, stream_hash, 4)
    assert uniform(torch.tensor([key]), stream, 4)[0].tolist() == expected
    assert _uniform_there(torch.tensor([key]), stream, 4)[0].tolist() == expected


def test_splitmix64_gives_the_published_value():
    # First output of SplitMix64 with seed 0, from the published generator.
    assert slow_mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


@given(st.integers(), st.one_of(st.none(), st.integers(0)), st.integers(0))
def test_keys_are_63_bits(seed, epoch, index):
    assert 0 <= make_key(seed, epoch, index) < 2**63


def test_keys_differ_in_every_argument():
    keys = {make_key(s, e, i) for s in range(5) for e in (None, 0, 1, 2, 3) for i in range(200)}
    assert len(keys) == 5 * 5 * 200


def test_uniform_does_not_depend_on_the_batch():
    keys = torch.tensor([make_key(0, 0, i) for i in range(6)])
    whole = uniform(keys, "a", 3)
    rows = torch.cat([uniform(k[None], "a", 3) for k in keys])
    assert torch.equal(whole, rows)
    assert torch.equal(uniform(keys, "a", 7)[:, :3], whole)
    assert whole.dtype == torch.float64


@pytest.mark.parametrize("stream", ["flip", "rotate"])
def test_uniform_is_uniform_and_streams_are_independent(stream):
    keys = torch.tensor([make_key(3, 1, i) for i in range(20_000)])
    u = uniform(keys, stream, 2).numpy()
    counts = np.histogram(u[:, 0], bins=50, range=(0, 1))[0]
    chi2 = ((counts - 400) ** 2 / 400).sum()
    assert chi2 < 95  # P(chi2_49 > 95) < 1e-4; the draw is fixed, so this cannot flicker
    assert (u >= 0).all() and (u < 1).all()
    assert abs(np.corrcoef(u.T)[0, 1]) < 0.03
    other = uniform(keys, "other", 1).numpy()[:, 0]
    assert abs(np.corrcoef(u[:, 0], other)[0, 1]) < 0.03


def test_consecutive_raw_keys_are_well_mixed():
    u = uniform(torch.arange(10_000), "s", 1)[:, 0]
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03


def test_generator_is_a_function_of_key_and_stream():
    def draw(key, stream):
        return torch.randn(4, generator=generator(key, stream))

    assert torch.equal(draw(5, "noise"), draw(5, "noise"))
    assert not torch.equal(draw(5, "noise"), draw(6, "noise"))
    assert not torch.equal(draw(5, "noise"), draw(5, "gamma"))


def test_workers_that_end_before_the_first_batch_are_one_sentence(monkeypatch):
    """As those of a script without a main guard, where workers are spawned."""

    def broken(self, batches=()):
        yield from batches
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", broken)
    with pytest.raises(InputError, match=r"before the first batch: .*if __name__ == '__main__'"):
        next(iter(EpochLoader([0])))
    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", lambda self: broken(self, [1]))
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(EpochLoader([0]))


def test_a_script_that_a_worker_reads_anew_ends_where_it_would_start_workers(monkeypatch):
    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr("pmixseg.workers.os._exit", end)
    monkeypatch.setattr("pmixseg.workers.current_process", lambda: Mock(_inheriting=True))
    with pytest.raises(SystemExit):
        next(iter(EpochLoader([0], num_workers=1)))
    assert next(iter(EpochLoader([0]))) == 0


@pytest.mark.parametrize("overfit", [0, 1])
def test_lightning_leaves_every_sampler_alone_where_there_are_several_processes(
    phantom_store, overfit
):
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, overfit_batches=overfit
    )
    data = BraTSDataModule(phantom_store, patch_size=16)
    data.trainer = trainer
    data.setup("fit")
    for make, stage in (
        (data.train_dataloader, RunningStage.TRAINING),
        (data.val_dataloader, RunningStage.VALIDATING),
        (data.test_dataloader, RunningStage.TESTING),
    ):
        loader = make()
        kept = trainer._data_connector._prepare_dataloader(loader, shuffle=True, mode=stage)
        assert kept is loader, stage
        combined = CombinedLoader([loader])
        if overfit and stage is not RunningStage.TESTING:
            _resolve_overfit_batches(combined, stage)
            assert combined.flattened == [loader], stage
            assert list(loader.sampler) == list(loader.sampler)
