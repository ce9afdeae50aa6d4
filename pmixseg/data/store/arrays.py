"""Arrays of a store: written whole, mapped by few open files."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from isal.isal_zlib import crc32

from pmixseg.errors import InputError

MAX_MAPS = 30_000
"""Arrays of a store that are mapped at a time: under half of the 65,530 maps that Linux allows."""


Maps = Callable[[Path, str, tuple[int, ...]], npt.NDArray[Any]]
"""What :func:`open_maps` returns, called like :func:`read_only_map`."""


def open_maps(limit: int = MAX_MAPS) -> Maps:
    """Keep memory maps of a store's arrays; of more than ``limit`` the oldest is let go first.

    An array that is still in use keeps its own map open.
    """
    return functools.lru_cache(limit)(read_only_map)


def copy_box(box: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a contiguous copy of a box sliced from a stored array.

    Its rows are moved as one item each, which takes two thirds to four fifths of the time of
    ``box.copy()``: numpy's loop over many short rows costs more than the bytes. It is a slice,
    without steps, of an array that is contiguous along its last axis.
    """
    if box.size == 0:
        return box.copy()
    rows = box.view(f"V{box.shape[-1] * box.itemsize}")
    return rows.copy().view(box.dtype)


def read_only_map(path: Path, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Map an array by torch: a map of Python's holds the file open as long as it is.

    What the file must begin with is known, so nothing has to be parsed that may be damaged.
    """
    head = _head(dtype, shape)
    size = len(head) + math.prod(shape) * np.dtype(dtype).itemsize
    try:
        raw = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise damaged(path, f"no readable array ({why})") from error
    if raw[: len(head)].tobytes() != head:
        raise damaged(path, f"another array than the {dtype} of {shape} that was written")
    raw.flags.writeable = False
    return raw[len(head) :].view(dtype).reshape(shape)


@functools.cache
def _head(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the header of a ``.npy`` file, version 1, in C order."""
    head = io.BytesIO()
    facts = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, facts)
    return head.getvalue()


def damaged(path: Path, what: str) -> InputError:
    """Say in a sentence what a file or folder of a store holds instead of what was written."""
    return InputError(f"{path} holds {what}; run `pmixseg prepare` on its store again.")


def write_array(path: Path, array: npt.NDArray[Any]) -> dict[str, int]:
    """Write a .npy file by plain writes: ``tofile`` hides errno, a map dies of a full disk.

    The file is in C order, whatever the array's. Its size and checksum are returned.
    """
    array = np.ascontiguousarray(array)
    head = _head(array.dtype.str, array.shape)
    with path.open("wb") as file:
        file.write(head)
        file.write(array.data)
    checksum = crc32(head)
    if array.size:
        checksum = crc32(array.data, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}
