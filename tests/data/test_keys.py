import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmixseg.data.keys import generator, make_key, uniform

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


def test_splitmix64_reference_value():
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
