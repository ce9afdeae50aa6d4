"""Read NIfTI scans fast: one read, one decompression, no copy in float64."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage

from pmixseg.data.formats.headers import (
    HEAD,
    MAX_BYTES,
    SYNTHETIC,
    BadHeader,
    Header,
    in_mm,
    is_oriented,
    read_header,
    unit_of,
)
from pmixseg.data.formats.itk import ITK_ENDINGS, read_itk
from pmixseg.data.formats.outputs import NOTICE
from pmixseg.data.formats.packed import DAMAGED, TooLong, first_bytes, is_packed, start_of, unpack
from pmixseg.errors import InputError, explained

Source: TypeAlias = Path | str | tuple[Path | str, int] | SpatialImage
"""A 3-D file, one channel of a 4-D file, or an image that nibabel has opened."""

_NO_SCANS = {
    b"version https://git-lfs": "a pointer of git LFS",
    b"/annex/": "a pointer of git-annex",
    b"<": "a web page, as of a download without login",
}
"""How files begin that stand for a scan."""

_PAIR = {"img": "hdr", "hdr": "img"}
"""Ending of one file of a pair -> that of the other."""

_UNREADABLE = (ImageFileError, HeaderDataError, ValueError, *DAMAGED)


@dataclass(frozen=True)
class Frame:
    """Where a volume lies, without its voxels.

    Args:
        shape: of the file's first three axes.
        affine: 4 x 4, voxel index -> mm, whatever the file's unit.
        unit: mm per unit of the file.
        oriented: whether the file says how it lies.
    """

    shape: tuple[int, int, int]
    affine: npt.NDArray[np.float64]
    unit: float = 1.0
    oriented: bool = True


@dataclass(frozen=True)
class Scan:
    """One volume as it stands in its file.

    Args:
        data: ``[X, Y, Z]`` in the file's axis order and number type, before scaling.
        slope: multiply ``data`` by this,
        inter: and add this, to get intensities (NIfTI's ``scl_slope`` and ``scl_inter``).
        affine: 4 x 4, voxel index -> mm, whatever the file's unit.
        name: how messages name it.
        unit: mm per unit of the file.
        oriented: whether the file says how it lies.
    """

    data: npt.NDArray[Any]
    slope: float
    inter: float
    affine: npt.NDArray[np.float64]
    name: str
    unit: float = 1.0
    oriented: bool = True

    @property
    def scaled(self) -> bool:
        """Whether intensities differ from the stored numbers."""
        return self.slope != 1.0 or self.inter != 0.0

    def values(self) -> npt.NDArray[Any]:
        """Return intensities: the stored numbers, or float32 after scaling."""
        if not self.scaled:
            return self.data
        values = self.data.astype(np.float32)
        values *= np.float32(self.slope)
        if self.inter != 0.0:
            values += np.float32(self.inter)
            # Background that is 0 only up to rounding would count as brain.
            values[np.abs(values) < 1e-3 * abs(self.slope)] = 0.0
        return values


class ScanReader:
    """Reads scans of one case; a 4-D file with several modalities is decompressed once."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.digests: dict[str, str] = {}
        """Role -> SHA-256 of the file's bytes as they are on disk (compressed, if they are)."""
        self.synthetic = self.predicted = False
        """Whether a file that was read says that it is of a phantom."""
        self._held: tuple[Path, Scan, str] | None = None

    def read(self, source: Source, role: str) -> Scan:
        """Read one volume, and keep the digest of its file under ``role`` (a modality, ``label``).

        Raises:
            InputError: the file is missing, unreadable, truncated, not NIfTI, or not a volume.
        """
        if isinstance(source, tuple) and len(source) == 2:
            path, channel = Path(source[0]), source[1]
            return self._channel(self._file(path, role), channel, role)
        if isinstance(source, Path | str):
            return self._channel(self._file(Path(source), role), None, role)
        if not isinstance(source, SpatialImage):
            raise InputError(
                f"{self.where}: {role} is {source!r:.60}; give a file, (4-D file, channel) or an "
                "image of nibabel."
            )
        if isinstance(source.header, nib.Nifti1Header):
            self._note(bytes(source.header["descrip"]))
        name = source.get_filename() or "an image in memory"
        return self._channel(_opened(source, str(name)), None, role)

    def _note(self, descrip: bytes) -> None:
        """Remember whether a file is of a phantom, or a result of this package."""
        self.synthetic |= descrip.startswith(SYNTHETIC)
        self.predicted |= descrip.rstrip(b"\0") == NOTICE

    def frame(self, source: Source) -> Frame | None:
        """Say where a volume lies, from its header alone; ``None`` if there is no usable one."""
        path = source[0] if isinstance(source, tuple) else source
        try:
            if not isinstance(path, Path | str):
                return _frame(path.shape, _opened(path, "", load=False))
            header = read_header(start_of(Path(path), HEAD))
            if header is not None:
                return _frame(header.shape, header)
            other = self._other_format(Path(path), load=False)
            return _frame(other.data.shape, other)
        except (InputError, *_UNREADABLE):
            return None  # who reads the voxels says so

    def channels(self, path: Path) -> int | None:
        """Count the volumes of a NIfTI file by its header; ``None`` where that does not tell."""
        try:
            header = read_header(start_of(path, HEAD))
        except _UNREADABLE:
            return None  # who reads the voxels says so
        return None if header is None else math.prod(header.shape[3:])

    def _file(self, path: Path, role: str) -> Scan:
        if self._held is None or self._held[0] != path:
            self._held = None
            packed = self._bytes(path)
            self._held = (path, self._decode(path, packed), _digest(packed))
        self.digests[role] = self._held[2]
        return self._held[1]

    def digest(self, source: Path | str | tuple[Path | str, int]) -> str:
        """Return the SHA-256 of a file's bytes, without decoding them."""
        return _digest(self._bytes(Path(source[0] if isinstance(source, tuple) else source)))

    def _bytes(self, path: Path) -> bytes:
        try:
            if (size := path.stat().st_size) > MAX_BYTES:
                raise InputError(
                    f"{self.where}: {path} has {size} bytes, more than any scan; replace it."
                )
            return path.read_bytes()
        except FileNotFoundError:
            raise InputError(f"{self.where}: {path} does not exist; correct the path.") from None
        except OSError as error:
            raise InputError(
                f"{self.where}: {path} cannot be read ({error.strerror}); check its permissions "
                "and the disk."
            ) from error

    def _decode(self, path: Path, packed: bytes) -> Scan:
        file, again = f"{self.where}: {path}", "convert or download it again"
        kind = "truncated or damaged gzip" if is_packed(packed) else "damaged"
        with (
            explained(f"{file} is a {kind} file", "copy or download it again", TooLong, *DAMAGED),
            explained(f"{file} has a damaged NIfTI header", again, BadHeader),
        ):
            # The header first: it says how many bytes may be unpacked.
            header = read_header(first_bytes(packed, HEAD))
            if header is None:
                return self._other_format(path)
            if header.offset + header.size > MAX_BYTES:
                raise InputError(
                    f"{self.where}: {path} promises {header.size} bytes of voxels (shape "
                    f"{header.shape}) from byte {header.offset} on, more than any scan; convert or "
                    "download it again."
                )
            self._note(header.descrip)
            needed = header.offset + header.size
            raw = unpack(packed, needed)
        if len(raw) < needed:
            raise InputError(
                f"{self.where}: {path} is truncated (its header promises {needed} bytes, it has "
                f"{len(raw)}); copy or download it again."
            )
        # A view of the bytes, the first axis fastest; only foreign byte order is copied.
        count = header.size // header.dtype.itemsize
        data = np.frombuffer(raw, header.dtype, count, header.offset)
        data = data.reshape(header.shape, order="F")
        if not header.dtype.isnative:
            data = data.astype(header.dtype.newbyteorder("="))
        return Scan(
            data, header.slope, header.inter, header.affine, str(path), header.unit, header.oriented
        )

    def _other_format(self, path: Path, *, load: bool = True) -> Scan:
        """Read whatever else nibabel or ITK can (Analyze pairs, MGH, MetaImage), at their speed."""
        if path.name.lower().endswith(ITK_ENDINGS):
            data, affine, oriented = read_itk(path, self.where)
            return Scan(data, 1.0, 0.0, affine, str(path), oriented=oriented)
        try:
            return _opened(nib.load(path), str(path), load=load)
        except _UNREADABLE as error:
            raise InputError(
                f"{self.where}: {path} is not a NIfTI file (no NIfTI header at its start); "
                f"{_advice(path)}."
            ) from error

    def _channel(self, scan: Scan, channel: int | None, role: str) -> Scan:
        data = scan.data
        if data.dtype.kind not in "biuf":
            what = "colours" if data.dtype.names else f"{data.dtype} numbers"
            raise InputError(
                f"{self.where}: {scan.name} holds {what}, but a scan is integers or floats; "
                "convert it."
            )
        if data.ndim == 5 and data.shape[3] == 1:
            data = data[:, :, :, 0]  # ITK writes the channels of a volume behind a time axis of 1
        if channel is None:
            while data.ndim > 3 and data.shape[-1] == 1:
                data = data[..., 0]
            if data.ndim != 3:
                advice = "name a channel, or split the file"
                if role == "label":
                    advice = "make one map of numbers of its channels"
                raise InputError(
                    f"{self.where}: {scan.name} has shape {scan.data.shape}, but one volume of "
                    f"three axes is needed; {advice}."
                )
        elif data.ndim != 4 or not 0 <= channel < data.shape[3]:
            raise InputError(
                f"{self.where}: {scan.name} has shape {data.shape} and no channel {channel}; "
                "correct the layout."
            )
        else:
            data = data[..., channel]
        return replace(scan, data=data)


def _opened(image: Any, name: str, *, load: bool = True) -> Scan:
    """Return an image of nibabel as a scan, its scaling applied."""
    data = np.asanyarray(image.dataobj) if load else np.broadcast_to(np.uint8(0), image.shape)
    unit = unit_of(image.header)
    # An image made in memory around an affine has codes above 0; nibabel sets them.
    oriented = image.affine is not None and is_oriented(image.header)
    return Scan(data, 1.0, 0.0, in_mm(image.affine, unit), name, unit, oriented)


def _frame(shape: tuple[int, ...], facts: Header | Scan) -> Frame:
    x, y, z = shape[:3]
    return Frame((x, y, z), facts.affine, facts.unit, facts.oriented)


def _advice(path: Path) -> str:
    """Say what helps, from the first bytes of a file that is no NIfTI file."""
    if path.suffix.lower() in (".dcm", ".ima"):
        return (
            "a DICOM file is read with its series alone: give `pmixseg segment` the study's "
            "folder, or convert the series to NIfTI, with dcm2niix for one"
        )
    half = re.sub(r"(?i)(img|hdr)(?=(\.gz)?$)", lambda m: _PAIR[m[0].lower()], path.name)
    if half != path.name and not path.with_name(half).exists():
        return f"it is one half of a pair, and {half} does not lie beside it; copy that as well"
    with path.open("rb") as file:
        start = file.read(24)
    for beginning, kind in _NO_SCANS.items():
        if start.startswith(beginning):
            return f"it is {kind}; fetch the file itself"
    return "convert or download it again" if start else "it is empty; download it again"


def _digest(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()
