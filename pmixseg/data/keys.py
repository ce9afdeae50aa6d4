"""Random numbers without a state: every draw is a function of a sample's key alone.

A key names one sample of one epoch. Whatever is random about the sample (where its patch lies,
how it is augmented, which modalities the network sees) is read from named *streams* of the key,
so nothing depends on the order of calls, the worker, the rank or the device.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from pmixseg.types import Keys

_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SIGN = 1 << 64


def make_key(seed: int, epoch: int | None, index: int) -> int:
    """Hash (seed, epoch, index) to 63 well-mixed bits, an integer in ``[0, 2^63)``.

    The epoch is ``None`` for validation, test and prediction, whose draws must not change from
    epoch to epoch.

    Example:
        >>> make_key(0, 1, 2) != make_key(0, 2, 1)
        True
    """
    return _hash63(f"key/{seed}/{epoch}/{index}")


def uniform(keys: Keys, stream: str, n: int) -> Float[Tensor, "b n"]:
    """Draw ``n`` uniform numbers in [0, 1) per key, as float64 on the keys' device.

    Number j of stream s is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014, figure 17) seeded with mix(key xor hash(s)), at position j + 1, of
    which the upper 53 bits are kept. A longer draw begins with the shorter one. Streams of
    different names are independent.
    """
    if keys.device.type != "cpu":
        return _uniform_there(keys, stream, n)
    # NumPy has an unsigned shift, and starts each of these small operations sooner than torch.
    column = keys.reshape(-1, 1).numpy().view(np.uint64)
    states = _mixed(column ^ np.uint64(_hash63(stream)))
    return torch.from_numpy((_mixed(states + _positions(n)) >> np.uint64(11)) * 2.0**-53)


def number_of(name: str) -> int:
    """Return the number that stands for a case's or a patient's name in :func:`make_key`.

    Example:
        >>> number_of("a"), number_of("ab")
        (97, 24930)
    """
    return int.from_bytes(name.encode())


def generator(key: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a torch generator for noise fields, seeded from (key, stream).

    Equal seeds give different fields on different kinds of device; on one kind they agree.
    """
    made = torch.Generator(device=device)
    made.manual_seed(_hash63(f"{stream}/{key}"))
    return made


@functools.lru_cache(maxsize=1024)
def _hash63(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@functools.lru_cache(maxsize=64)
def _positions(n: int) -> npt.NDArray[np.uint64]:
    return np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GAMMA)


def _mixed(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply SplitMix64's finaliser, which needs arithmetic that wraps, as that of arrays does."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    return z ^ (z >> np.uint64(31))


def _uniform_there(keys: Keys, stream: str, n: int) -> Float[Tensor, "b n"]:
    """Return the same numbers in torch's own operations, for keys that lie on a GPU."""
    state = _mix(keys.reshape(-1, 1) ^ _hash63(stream))
    position = torch.arange(1, n + 1, device=keys.device, dtype=torch.int64)
    bits = _mix(state + position * (_GAMMA - _SIGN))
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * (_MIX_1 - _SIGN)
    z = (z ^ _shift_right(z, 27)) * (_MIX_2 - _SIGN)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift right logically: torch's own shift repeats the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
