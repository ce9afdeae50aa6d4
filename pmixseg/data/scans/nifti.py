"""Reading scans fast: the file's bytes once, one decompression, no detour over float64."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage

from pmixseg.errors import InputError

Source: TypeAlias = Path | str | tuple[Path | str, int] | SpatialImage
"""A 3-D file, one channel of a 4-D file, or an image that nibabel has opened."""

_GZIP = b"\x1f\x8b"
_DAMAGED: tuple[Any, ...] = (EOFError, OSError, zlib.error, isal_zlib.error)


@dataclass(frozen=True)
class Scan:
    """One volume as it stands in its file.

    Args:
        data: ``[X, Y, Z]`` in the file's axis order and number type, before scaling.
        slope: multiply ``data`` by this,
        inter: and add this, to get intensities (NIfTI's ``scl_slope`` and ``scl_inter``).
        affine: 4 x 4, voxel index -> mm.
        name: how messages name it.
    """

    data: npt.NDArray[Any]
    slope: float
    inter: float
    affine: npt.NDArray[np.float64]
    name: str

    @property
    def scaled(self) -> bool:
        """Whether intensities differ from the stored numbers."""
        return self.slope != 1.0 or self.inter != 0.0

    def values(self) -> npt.NDArray[Any]:
        """Intensities: the stored numbers, or float32 after scaling."""
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
    """Reads scans of one case; a 4-D file with several modalities is decompressed once.

    Args:
        where: how messages name the case.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.digests: dict[str, str] = {}
        """Role -> SHA-256 of the file's bytes as they are on disk (compressed, if they are)."""
        self._held: tuple[Path, Scan, str] | None = None

    def read(self, source: Source, role: str) -> Scan:
        """Read one volume.

        Args:
            source: where it is.
            role: what it is (a modality, ``label``), under which its digest is kept.

        Raises:
            InputError: the file is missing, unreadable, truncated, not NIfTI, or not a volume.
        """
        if isinstance(source, tuple):
            path, channel = Path(source[0]), source[1]
            return self._channel(self._file(path, role), channel)
        if isinstance(source, Path | str):
            return self._channel(self._file(Path(source), role), None)
        name = source.get_filename() or "an image in memory"
        data = np.asanyarray(source.dataobj)
        return self._channel(Scan(data, 1.0, 0.0, np.asarray(source.affine), str(name)), None)

    def _file(self, path: Path, role: str) -> Scan:
        if self._held is None or self._held[0] != path:
            self._held = None
            packed = self._bytes(path)
            self._held = (path, self._decode(path, packed), _digest(packed))
        self.digests[role] = self._held[2]
        return self._held[1]

    def digest(self, source: Path | str | tuple[Path | str, int]) -> str:
        """SHA-256 of a file's bytes, without decoding them.

        Raises:
            InputError: the file is missing or unreadable.
        """
        return _digest(self._bytes(Path(source[0] if isinstance(source, tuple) else source)))

    def _bytes(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise InputError(f"{self.where}: {path} does not exist; correct the path.") from None
        except OSError as error:
            raise InputError(
                f"{self.where}: {path} cannot be read ({error.strerror}); check its permissions "
                "and the disk."
            ) from error

    def _decode(self, path: Path, packed: bytes) -> Scan:
        raw = self._unpacked(path, packed, _gunzip)
        kind = _nifti_class(raw)
        if kind is None:
            return self._other_format(path)
        try:
            header = kind.header_class.from_fileobj(io.BytesIO(raw))
            dtype, shape = header.get_data_dtype(), header.get_data_shape()
            slope, inter = header.get_slope_inter()
            if not all(n > 0 for n in shape):
                raise ValueError(f"shape {tuple(int(n) for n in shape)}")
        except (HeaderDataError, ValueError) as error:
            raise InputError(
                f"{self.where}: {path} has a damaged NIfTI header ({error}); convert or download "
                "it again."
            ) from error
        offset, count = int(header.get_data_offset()), int(np.prod(shape, dtype=np.int64))
        if dtype.kind not in "iuf":
            raise InputError(
                f"{self.where}: {path} holds {dtype} numbers, but a scan is integers or floats; "
                "convert it."
            )
        if len(raw) < offset + count * dtype.itemsize:
            raw = self._unpacked(path, packed, igzip.decompress)  # there may be further members
        if len(raw) < offset + count * dtype.itemsize:
            raise InputError(
                f"{self.where}: {path} is truncated (its header promises "
                f"{offset + count * dtype.itemsize} bytes, it has {len(raw)}); copy or download "
                "it again."
            )
        data = np.frombuffer(raw, dtype, count, offset).reshape(shape, order="F")
        if not dtype.isnative:
            data = data.astype(dtype.newbyteorder("="))
        return Scan(
            data,
            1.0 if slope is None else float(slope),
            0.0 if inter is None else float(inter),
            np.asarray(header.get_best_affine(), dtype=np.float64),
            str(path),
        )

    def _unpacked(self, path: Path, packed: bytes, gunzip: Callable[[bytes], bytes]) -> bytes:
        if packed[:2] != _GZIP:
            return packed
        try:
            return gunzip(packed)
        except _DAMAGED as error:
            raise InputError(
                f"{self.where}: {path} is a truncated or damaged gzip file ({error}); copy or "
                "download it again."
            ) from error

    def _other_format(self, path: Path) -> Scan:
        """Whatever else nibabel reads (Analyze pairs, MGH), at nibabel's speed."""
        try:
            image = nib.load(path)
            data = np.asanyarray(image.dataobj)
        except (ImageFileError, ValueError, *_DAMAGED) as error:
            raise InputError(
                f"{self.where}: {path} is not a NIfTI file (no NIfTI header at its start); "
                "convert or download it again."
            ) from error
        return Scan(data, 1.0, 0.0, np.asarray(image.affine, dtype=np.float64), str(path))

    def _channel(self, scan: Scan, channel: int | None) -> Scan:
        data = scan.data
        if channel is None:
            while data.ndim > 3 and data.shape[-1] == 1:
                data = data[..., 0]
            if data.ndim != 3:
                raise InputError(
                    f"{self.where}: {scan.name} has shape {scan.data.shape}, but one volume of "
                    "three axes is needed; name a channel, or split the file."
                )
        elif data.ndim != 4 or not 0 <= channel < data.shape[3]:
            raise InputError(
                f"{self.where}: {scan.name} has shape {data.shape} and no channel {channel}; "
                "correct the layout."
            )
        else:
            data = data[..., channel]
        return Scan(data, scan.slope, scan.inter, scan.affine, scan.name)


def _gunzip(packed: bytes) -> bytes:
    """The first member of a gzip file, in one allocation: half the time of letting it grow.

    The last four bytes say how long the content is, modulo 2^32; isal needs room for one byte more
    to see the end. A damaged file may promise anything, but deflate packs at most 1032 to 1.
    """
    promised = int.from_bytes(packed[-4:], "little")
    room = min(promised, 1032 * len(packed)) + 1
    unpacked: bytes = isal_zlib.decompress(packed, wbits=31, bufsize=room)
    return unpacked


def _digest(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()


def _nifti_class(raw: bytes) -> Any:
    """The nibabel class of a single-file NIfTI, or ``None``."""
    if raw[344:348] == b"n+1\0":
        return nib.Nifti1Image
    if raw[4:8] == b"n+2\0":
        return nib.Nifti2Image
    return None
