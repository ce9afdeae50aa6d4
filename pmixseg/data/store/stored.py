"""One case of a store: what its folder holds, how it is written and read.

A case folder is complete from the moment it has its name: everything is written to a folder of
another name on the same disk, which is then renamed.

===================  =========================================================================
``image.npy``        ``[M, d, h, w]`` float16 or float32, modalities in task order
``label.npy``        ``[d, h, w]`` uint8 class indices on the same voxels, if there is a label
``label_native.npy`` uint8 class indices at source resolution, where ``label.npy`` cannot give
                     the source label back
``origin.txt``       where one of the sources lay when the case was last prepared
``meta.json``        everything else, see :func:`write_case`
===================  =========================================================================
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmixseg.data.scans.canonical import Box, CanonicalCase, Geometry
from pmixseg.errors import InputError
from pmixseg.files import beside

FORMAT = 1
"""Version of the store's files; a case of another version is prepared anew."""

STORE_JSON, CASES = "store.json", "cases"
"""Description of the whole store, and the folder that holds a folder per case."""

IMAGE, LABEL, NATIVE, META = "image.npy", "label.npy", "label_native.npy", "meta.json"
ORIGIN = "origin.txt"


@dataclass(frozen=True)
class StoredCase:
    """A prepared case; arrays are memory-mapped and read-only, so a patch costs what it weighs.

    Pickling one passes its folder, not its voxels.

    Args:
        case_id: name of the case.
        image: ``[M, d, h, w]``, z-scored inside the brain, background 0, cropped to
            ``geometry.box()``; modalities that were not acquired are all 0.
        label: ``[d, h, w]`` uint8 class indices, or ``None``.
        acquired: one flag per modality of the task.
        geometry: the grids, and the way back to the source.
        codes: label name -> number in the source's label files.
        grade: ``HGG``, ``LGG`` or ``None`` where unknown.
        patient: groups the time points of one patient.
        folder: where the case lies.
        meta: all of ``meta.json``.
    """

    case_id: str
    image: npt.NDArray[Any]
    label: npt.NDArray[np.uint8] | None
    acquired: tuple[bool, ...]
    geometry: Geometry
    codes: dict[str, int]
    grade: str | None
    patient: str
    folder: Path
    meta: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> StoredCase:
        """Open a case folder.

        Raises:
            InputError: the folder is missing or damaged.
        """
        meta = read_meta(folder)
        if meta is None:
            raise InputError(
                f"{folder} holds no complete prepared case; run `pmixseg prepare` on its store."
            )
        return cls(
            case_id=meta["case_id"],
            image=_mapped(folder / IMAGE),
            label=_mapped(folder / LABEL) if LABEL in meta["bytes"] else None,
            acquired=tuple(name in meta["geometry"]["boxes"] for name in meta["modalities"]),
            geometry=Geometry.from_dict(meta["geometry"]),
            codes=dict(meta["codes"]),
            grade=meta["grade"],
            patient=meta["patient"],
            folder=folder,
            meta=meta,
        )

    def native_label(self) -> npt.NDArray[np.uint8] | None:
        """Class indices in the source file's shape and orientation, or ``None`` without a label."""
        if self.label is None:
            return None
        if NATIVE not in self.meta["bytes"]:
            return self.geometry.to_source(self.label, self.geometry.box(), order=0)
        result = np.zeros(self.geometry.source_shape, dtype=np.uint8)
        box = Box.from_dict(self.meta["label_box"])
        self.geometry.canonical_view(result)[box.slices] = np.load(self.folder / NATIVE)
        return result

    def __reduce__(self) -> tuple[Callable[[Path], StoredCase], tuple[Path]]:
        return StoredCase.open, (self.folder,)


def copy_box(box: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A contiguous copy of a box sliced from a stored array.

    Its rows are moved as one item each, which takes two thirds to four fifths of the time of
    ``box.copy()``: numpy's loop over many short rows costs more than the bytes.

    Args:
        box: a slice, without steps, of an array that is contiguous along its last axis.
    """
    if box.size == 0:
        return box.copy()
    rows = box.view(f"V{box.shape[-1] * box.itemsize}")
    return rows.copy().view(box.dtype)


def _mapped(path: Path) -> npt.NDArray[Any]:
    """A read-only map of a file, as a plain array: slices of np.memmap are slower to copy."""
    return np.asarray(np.load(path, mmap_mode="r"))


def read_meta(folder: Path) -> dict[str, Any] | None:
    """``meta.json`` of a case folder of this format whose arrays are all of them there."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            return None
        # A power cut can lose bytes behind a rename that survived it.
        for name, size in meta["bytes"].items():
            if (folder / name).stat().st_size != size:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(meta)


def write_case(folder: Path, case: CanonicalCase, meta: Mapping[str, Any], origin: str) -> None:
    """Write a case folder in one step; what had its name before is replaced.

    Args:
        folder: the case's folder, inside a folder that exists.
        case: the arrays.
        meta: what is known beside them: ``case_id``, ``patient``, ``grade``, ``layout``,
            ``codes``, ``modalities``, ``parameters`` (what the result depends on beside the
            sources) and ``sources`` (role -> file name, channel, SHA-256). ``format``,
            ``geometry``, ``label_box`` and ``bytes`` are added.
        origin: path of one of the sources, see :func:`origin_of`.

    Raises:
        OSError: the disk is full, or the folder cannot be written; nothing of the case remains.
    """
    arrays: dict[str, npt.NDArray[Any] | None] = {
        IMAGE: case.image,
        LABEL: case.label,
        NATIVE: case.label_native,
    }
    with beside(folder) as temporary:
        sizes = {n: _write_array(temporary / n, a) for n, a in arrays.items() if a is not None}
        full = {
            "format": FORMAT,
            **meta,
            "geometry": case.geometry.to_dict(),
            "label_box": case.label_box.to_dict() if case.label_box else None,
            "bytes": sizes,
        }
        write_origin(temporary, origin)
        (temporary / META).write_text(json.dumps(full, indent=1), encoding="utf-8")
        _publish(temporary, folder)


def origin_of(folder: Path) -> str | None:
    """Path of one source of a case when it was last prepared; ``None`` in stores of old."""
    try:
        return (folder / ORIGIN).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def write_origin(folder: Path, origin: str) -> None:
    """Note where a case's source lies; beside ``meta.json``, for a moved cohort is no other one."""
    with suppress(FileNotFoundError):  # the case is being replaced, with a note of its own
        (folder / ORIGIN).write_text(origin, encoding="utf-8")


def remove_case(folder: Path) -> None:
    """Remove a case folder; nobody sees a half of it.

    Raises:
        OSError: the store cannot be written.
    """
    with beside(folder) as aside, suppress(FileNotFoundError):  # another process was quicker
        folder.replace(aside)


def _write_array(path: Path, array: npt.NDArray[Any]) -> int:
    """A .npy file by plain writes: ``tofile`` hides errno, a memory map dies of a full disk."""
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
    return path.stat().st_size


def _publish(temporary: Path, folder: Path) -> None:
    """Rename onto ``folder``. A folder can only replace an empty one, so an old one moves first.

    Between two renames the case may be absent for a moment, but never half there. Of two processes
    that publish the same case at once, the later one gives way.
    """
    while True:
        try:
            temporary.replace(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if read_meta(folder) == read_meta(temporary):
            return
        remove_case(folder)
