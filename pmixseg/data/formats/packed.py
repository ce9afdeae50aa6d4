"""Decompress gzip in one call, and never more bytes than expected."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from isal import isal_zlib

GZIP = b"\x1f\x8b"

DAMAGED: tuple[Any, ...] = (EOFError, OSError, zlib.error, isal_zlib.error)
"""What reading a damaged gzip file raises."""

_SPARE = 1 << 20

_START = 1 << 16
"""So many bytes of a packed file hold its header."""


class TooLong(ValueError):
    """A file unpacks to far more than its header promises."""


def is_packed(raw: bytes) -> bool:
    """Say whether a file's bytes are gzip, whatever its name says."""
    return raw[:2] == GZIP


def first_bytes(raw: bytes, count: int) -> bytes:
    """Return the first bytes of a file's content, at most ``count``.

    Raises:
        EOFError, OSError, zlib.error: the file is damaged there.
    """
    if not is_packed(raw):
        return raw[:count]
    unpacked: bytes = isal_zlib.decompressobj(wbits=31).decompress(raw, count)
    return unpacked


def start_of(path: Path, count: int) -> bytes:
    """Return the first bytes of the content of a file on disk; errors are those of first_bytes."""
    with path.open("rb") as file:
        return first_bytes(file.read(_START), count)


def unpack(raw: bytes, enough: int) -> bytes:
    """Return the content of a file, checked against gzip's own checksum.

    Members of a gzip file are joined until there are ``enough`` bytes; padding behind them is
    accepted.

    Raises:
        EOFError, OSError, zlib.error: the file is truncated or damaged.
        TooLong: it goes on and on, as a file does that was made to fill the memory.
    """
    if not is_packed(raw):
        return raw
    limit = 2 * enough + _SPARE
    parts: list[bytes] = []
    length = 0
    while length < enough and is_packed(raw):
        unpacking = isal_zlib.decompressobj(wbits=31)
        # The last four bytes say how much there is, so that it is allocated once; a damaged file
        # may say anything. One byte more: isal needs room to see the end.
        promised = int.from_bytes(raw[-4:], "little")
        parts.append(unpacking.decompress(raw, min(promised, limit - length) + 1))
        length += len(parts[-1])
        if not unpacking.eof and unpacking.unconsumed_tail:
            rest = unpacking.decompress(unpacking.unconsumed_tail, limit - length + 1)
            parts.append(rest)
            length += len(rest)
        if length > limit:
            raise TooLong(f"it unpacks to more than {limit} bytes, its header promises {enough}")
        if not unpacking.eof:
            raise EOFError("it ends before its end was marked")
        raw = unpacking.unused_data
    return parts[0] if len(parts) == 1 else b"".join(parts)
