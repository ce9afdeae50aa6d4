"""Write and read one case of a store: the files of its folder.

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
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from isal.isal_zlib import crc32

from pmixseg.data.scans.boxes import Box
from pmixseg.data.scans.canonical import CanonicalCase
from pmixseg.data.scans.geometry import Geometry
from pmixseg.data.store.arrays import Maps, damaged, open_maps, write_array
from pmixseg.files import hidden_folder_near

FORMAT = 2
"""Version of the store's files; a case of another version is prepared anew."""

STORE_JSON, CASES = "store.json", "cases"
"""Description of the whole store, and the folder that holds a folder per case."""

IMAGE, LABEL, NATIVE, META = "image.npy", "label.npy", "label_native.npy", "meta.json"
ORIGIN = "origin.txt"

HASH_DIGITS = 16
"""Hexadecimal digits that are kept of a scan's SHA-256: a cohort of 10^5 scans has no collision."""


@dataclass(frozen=True)
class StoredCase:
    """Read a prepared case from memory-mapped arrays, whole or by patch.

    Arrays are mapped when they are asked for, and no file stays open for it. Pickling a case passes
    its folder, not its voxels.

    Args:
        case_id: name of the case.
        acquired: one flag per modality of the task.
        geometry: the grids, and the way back to the source.
        codes: label name -> number in the source's label files.
        grade: ``HGG``, ``LGG`` or ``None`` where unknown.
        patient: groups the time points of one patient.
        folder: where the case lies.
        meta: all of ``meta.json``.
        maps: the maps that are open, shared by the cases of a store.
    """

    case_id: str
    acquired: tuple[bool, ...]
    geometry: Geometry
    codes: dict[str, int]
    grade: str | None
    patient: str
    folder: Path
    meta: Mapping[str, Any]
    maps: Maps = field(repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path, maps: Maps | None = None) -> StoredCase:
        """Open a case folder.

        Args:
            folder: of the case.
            maps: the maps that are open; by default, of this case alone.

        Raises:
            InputError: the folder is missing or damaged.
        """
        meta = read_meta(folder)
        if meta is None:
            raise damaged(folder, "no complete prepared case")
        return cls(
            case_id=meta["case_id"],
            acquired=tuple(name in meta["geometry"]["boxes"] for name in meta["modalities"]),
            geometry=Geometry.from_dict(meta["geometry"]),
            codes=dict(meta["codes"]),
            grade=meta["grade"],
            patient=meta["patient"],
            folder=folder,
            meta=meta,
            maps=maps or open_maps(),
        )

    def to(self, *args: Any, **named: Any) -> StoredCase:
        """Stay where it is: Lightning asks this of all that a batch holds."""
        return self

    @property
    def image(self) -> npt.NDArray[Any]:
        """``[M, d, h, w]``, z-scored inside the brain, background 0, cropped to the geometry's box.

        Modalities that were not acquired are all 0.

        Raises:
            InputError: the file is missing or damaged.
        """
        shape = (len(self.acquired), *self.geometry.box().shape)
        return self.maps(self.folder / IMAGE, self.meta["parameters"]["dtype"], shape)

    @property
    def label(self) -> npt.NDArray[np.uint8] | None:
        """``[d, h, w]`` uint8 class indices, or ``None``.

        Raises:
            InputError: the file is missing or damaged.
        """
        if not self.labelled:
            return None
        return self.maps(self.folder / LABEL, "uint8", self.geometry.box().shape)

    @property
    def labelled(self) -> bool:
        """Whether there is a label."""
        return LABEL in self.meta["files"]

    @property
    def synthetic(self) -> bool:
        """Whether its scans are of a phantom, and of no patient."""
        # Stores of before know the name alone that phantoms are written under.
        named = re.fullmatch(r"Brats18_PHANTOM_\d{3,}_1", self.case_id) is not None
        return bool(self.meta.get("synthetic", named))

    def native_label(self) -> npt.NDArray[np.uint8] | None:
        """Return classes in the source file's shape and orientation; ``None`` without a label.

        Raises:
            InputError: the file is missing or damaged.
        """
        label = self.label
        if label is None:
            return None
        if NATIVE not in self.meta["files"]:
            return self.geometry.to_source(label, self.geometry.box(), order=0)
        result = np.zeros(self.geometry.source_shape, dtype=np.uint8)
        box = Box.from_dict(self.meta["label_box"])
        part = self.maps(self.folder / NATIVE, "uint8", box.shape)
        self.geometry.canonical_view(result)[box.slices] = part
        return result

    def prove(self) -> None:
        """Compare the arrays with the checksums of what was written; stores of before have none.

        Raises:
            InputError: they differ, or a file is missing.
        """
        known = all("crc32" in facts for facts in self.meta["files"].values())
        if known and not is_whole(self.folder, self.meta):
            raise damaged(self.folder, "other arrays than were written")

    def __reduce__(self) -> tuple[Callable[[Path], StoredCase], tuple[Path]]:
        return StoredCase.open, (self.folder,)


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Read ``meta.json`` of a case, if it is as it was written and the arrays are all there."""
    meta = unseal(folder / META)
    if meta is None or meta.get("format") != FORMAT:
        return None
    try:
        # A power cut can lose bytes behind a rename that survived it.
        whole = all(
            (folder / name).stat().st_size == facts["bytes"]
            for name, facts in meta["files"].items()
        )
    except OSError:
        return None
    return meta if whole else None


def is_whole(folder: Path, meta: Mapping[str, Any]) -> bool:
    """Say whether the arrays of a case folder are those that were written, by their checksums."""
    try:
        return all(
            crc32((folder / name).read_bytes()) == facts.get("crc32")
            for name, facts in meta["files"].items()
        )
    except OSError:
        return False


def seal(facts: Mapping[str, Any]) -> str:
    """Return primitives as JSON that carries a hash of its own content."""
    return json.dumps({**facts, "sha256": _content_hash(facts)}, indent=1)


def unseal(path: Path) -> dict[str, Any] | None:
    """Read what :func:`seal` wrote; ``None`` if the file is missing or says something else."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(facts, dict):
        return None
    if facts.get("format") == 1:
        return _of_format_1(facts)
    claimed = facts.pop("sha256", None)
    return facts if claimed == _content_hash(facts) else None


def _of_format_1(facts: dict[str, Any]) -> dict[str, Any] | None:
    """Read a description without seal and checksums; ``pmixseg prepare`` writes them anew."""
    if "bytes" not in facts:
        return {**facts, "format": FORMAT} if {"task", "parameters"} <= set(facts) else None
    sizes = facts["bytes"]
    needed = {"case_id", "parameters", "sources", "geometry", "modalities", "codes", "patient"}
    if not isinstance(sizes, dict) or not needed <= set(facts):
        return None
    return {**facts, "format": FORMAT, "files": {name: {"bytes": n} for name, n in sizes.items()}}


def _content_hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def scan_hashes(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Return hashes that tell the scans of a stored case, whatever it is called.

    A file is told by the SHA-256 of its bytes. A copy that was packed anew has other bytes; it is
    told by the checksums of the prepared arrays, where both were prepared in the same way.
    """
    sources = meta["sources"]
    hashes = {s["sha256"][:HASH_DIGITS] for role, s in sources.items() if role != "label"}
    files = [facts for _, facts in sorted(meta["files"].items())]
    checks = [f"{facts['crc32']:08x}" for facts in files if "crc32" in facts]
    if len(checks) > 1:  # 32 bits alone would meet by chance
        hashes.add("".join(checks))
    return tuple(sorted(hashes))


def write_case(folder: Path, case: CanonicalCase, meta: Mapping[str, Any], origin: str) -> None:
    """Write a case folder in one step; what had its name before is replaced.

    ``meta`` holds ``case_id``, ``patient``, ``grade``, ``layout``, ``codes``, ``modalities``,
    ``parameters`` (what the result depends on besides the sources) and ``sources`` (role -> file
    name, channel, SHA-256). ``format``, ``geometry``, ``label_box`` and ``files`` (name -> size,
    checksum) are added. ``origin`` is the path of one of the sources, see :func:`origin_of`. Where
    the disk does not take the case, nothing of it remains.
    """
    arrays: dict[str, npt.NDArray[Any] | None] = {
        IMAGE: case.image,
        LABEL: case.label,
        NATIVE: case.label_native,
    }
    with hidden_folder_near(folder) as temporary:
        files = {n: write_array(temporary / n, a) for n, a in arrays.items() if a is not None}
        full = {
            "format": FORMAT,
            **meta,
            "geometry": case.geometry.to_dict(),
            "label_box": case.label_box.to_dict() if case.label_box else None,
            "files": files,
        }
        write_origin(temporary, origin)
        (temporary / META).write_text(seal(full), encoding="utf-8")
        _publish(temporary, folder)


def origin_of(folder: Path) -> str | None:
    """Return the path of a case's source when it was last prepared; ``None`` in stores of old."""
    try:
        return (folder / ORIGIN).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def write_origin(folder: Path, origin: str) -> None:
    """Note where a case's source lies; beside ``meta.json``, for a moved cohort is no other one."""
    with suppress(FileNotFoundError):  # the case is being replaced, with a note of its own
        (folder / ORIGIN).write_text(origin, encoding="utf-8")


def remove_case(folder: Path) -> None:
    """Remove a case folder; nobody sees a half of it."""
    with (
        hidden_folder_near(folder) as aside,
        suppress(FileNotFoundError),
    ):  # another process was quicker
        folder.replace(aside)


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
        there = read_meta(folder)
        if there is not None and there == read_meta(temporary) and is_whole(folder, there):
            return
        remove_case(folder)
