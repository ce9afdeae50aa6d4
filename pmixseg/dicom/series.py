"""Read DICOM series: their headers, and their voxels as a volume."""

from __future__ import annotations

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom

from pmixseg.argument_checks import checked
from pmixseg.errors import InputError, count_of, first_line

HEADER = (
    *("Modality", "PatientID", "PatientName", "StudyInstanceUID", "SeriesInstanceUID"),
    *("SeriesNumber", "SeriesDescription", "ProtocolName", "ImageType", "AcquisitionContrast"),
    *("EchoTime", "RepetitionTime", "InversionTime", "DiffusionBValue", "NumberOfFrames"),
    *("ContrastBolusAgent", "ContrastBolusAgentSequence", "ContrastBolusVolume"),
    *("AcquisitionDate", "AcquisitionDateTime"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
"""What is read of every file before it is known which files are needed."""

PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID")
"""What says where a slice lies."""

UNPACK = (
    "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or unpack the series, for one "
    "with gdcmconv --raw"
)
"""What helps where voxels are compressed in a way that pydicom alone cannot read; a phrase."""

CONVERT = "convert it to NIfTI, for one with dcm2niix, and give that"

_GREY = "MONOCHROME2"

_SAME_PLACE = 0.01
"""Slices nearer than this, in mm, lie at one place."""

_MISSING = 1.5
"""A step between slices that is this many times the usual one lacks a slice."""

_BARE = re.compile(rb"[\x02\x08]\0[\0-\x18]\0", re.DOTALL)
"""How a file begins that has no preamble, as some archives write them: by its first element."""

_UID = re.compile(r"\d+(\.\d+){4,}")
_SHORTEST_NAME = 2

_NO_AGENT = re.compile(r"(no|none|n|nil|without|w/?o|0)\b", re.IGNORECASE)
"""How people begin who write into the field for the contrast agent that there was none."""


@contextmanager
def discreet() -> Iterator[None]:
    """Let pydicom and highdicom warn of nothing: they quote values of a patient's header."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pydicom|highdicom)(\..*)?")
        yield


@dataclass(frozen=True)
class Series:
    """One series of a study.

    Args:
        uid: of the series.
        number: of the series within its study; 0 if the header has none.
        description: of the series, as the scanner wrote it; may name the patient.
        files: of its slices, or its one multi-frame file.
        slices: how many.
        echo: echo time in ms; ``None`` where the header has none, as for all times.
        repetition: repetition time in ms.
        inversion: inversion time in ms.
        agent: whether the header names a contrast agent.
        kind: values of ImageType, lower case.
        diffusion: whether it has a b-value above 0.
        modality: of DICOM: ``MR``, or that of a series which is no scan.
        acquired: on which day; ``None`` where the header has none.
        shown: the description without the patient's name and number, for people and logs; by
            default the description.
    """

    uid: str
    number: int
    description: str
    files: tuple[Path, ...]
    slices: int
    echo: float | None = None
    repetition: float | None = None
    inversion: float | None = None
    agent: bool = False
    kind: tuple[str, ...] = ()
    diffusion: bool = False
    modality: str = "MR"
    acquired: date | None = None
    shown: str | None = None

    @property
    def label(self) -> str:
        """How sentences name it: its number and description."""
        return f"series {self.number} '{self.told}'"

    @property
    def told(self) -> str:
        """The description as it may be printed."""
        return self.description if self.shown is None else self.shown

    @discreet()
    def datasets(self) -> list[Any]:
        """Read the files whole."""
        files = [pydicom.dcmread(path, force=True) for path in self.files]
        for file in files:  # a bare data set does not say how it is written, see _BARE
            implicit, little = file.original_encoding
            kind = (
                f"{'Implicit' if implicit else 'Explicit'}VR{'Little' if little else 'Big'}Endian"
            )
            file.file_meta.setdefault("TransferSyntaxUID", getattr(pydicom.uid, kind, None))
        return files

    @discreet()
    def volume(self) -> Any:
        """Return the voxels and their place as a ``highdicom.Volume`` (LPS, mm)."""
        datasets = []
        try:
            datasets = self.datasets()
            self._check_grey(datasets)
            if len(datasets) == 1 and "NumberOfFrames" in datasets[0]:
                return highdicom.Image.from_dataset(datasets[0]).get_volume(dtype=np.float32)
            return highdicom.get_volume_from_series(datasets, dtype=np.float32)
        except InputError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, OSError) as error:
            reason, advice = _why_no_volume(datasets, error)
            raise InputError(
                f"{self.label} cannot be put together as a volume ({reason}); {advice}."
            ) from error

    def _check_grey(self, slices: Sequence[Any]) -> None:
        """Refuse voxels that are no signal, bright where it is strong: libraries differ here."""
        kinds = {str(header.get("PhotometricInterpretation", _GREY)) for header in slices}
        for kind in sorted(kinds - {_GREY}):
            what = "dark where the signal is strong" if kind == "MONOCHROME1" else "colours"
            raise InputError(
                f"{self.label} cannot be put together as a volume: its voxels are {what} "
                f"(PhotometricInterpretation {kind:.16}); export the original series, as {_GREY}."
            )


def _why_no_volume(slices: Sequence[Any], error: Exception) -> tuple[str, str]:
    """Say why a library could not put slices together, and what helps: one cause of many.

    Neither phrase tells the patient. There are no slices where their files cannot be read.
    """
    # What the headers lack, and what the library says.
    several = sum("NumberOfFrames" in header for header in slices)
    if several > 1:
        return f"{several} of its files have several frames, where one is a volume", CONVERT
    lacking = [name for name in PLACE if any(name not in header for header in slices)]
    if lacking and not several:
        return f"its slices do not say their {', '.join(lacking)}", "export the series again"
    if re.search(r"decod|decompress", str(error)) and "plugin" in str(error):
        coding = slices[0].file_meta.TransferSyntaxUID.name
        return f"its voxels are compressed as {coding}, or damaged", UNPACK
    told = _UID.sub("…", first_line(error)), "check that all of its slices are there"
    return _odd_places(slices) or told


def _odd_places(slices: Sequence[Any]) -> tuple[str, str] | None:
    """Say where slices, or frames, do not follow each other evenly, and what helps."""
    try:
        frames = slices[0].get("PerFrameFunctionalGroupsSequence") or slices
        planes = [_plane(frame, slices[0]) for frame in frames]
        places = np.reshape([[float(v) for v in p] for p, _ in planes], (len(planes), 3))
        rows = np.array([float(v) for v in planes[0][1]]).reshape(2, 3)
    except (TypeError, ValueError, AttributeError, IndexError):
        return "the places of its slices are no numbers", "export the series again"
    # Places along the normal: one twice, one left out, or the slices shifted aside.
    depths = places @ np.cross(rows[0], rows[1])
    steps = np.diff(np.sort(depths))
    if twice := int((steps < _SAME_PLACE).sum()):
        what = f"{count_of(twice, 'slice')} of its {len(planes)} lie where others do"
        return what, "keep one copy of each, or one time point"
    if steps.size and steps.max() > _MISSING * np.median(steps):
        what = f"its slices lie {np.median(steps):.3g} mm apart, but once {steps.max():.3g} mm"
        return what, "see that all of its slices are there"
    aside = np.diff(places[np.argsort(depths)] @ rows.T, axis=0)
    if aside.size and np.abs(aside).max() > _SAME_PLACE:
        return "each of its slices is shifted against the next, as with a tilted gantry", CONVERT
    if steps.size and np.ptp(steps) > _SAME_PLACE:
        return f"its slices lie {steps.min():.3g} to {steps.max():.3g} mm apart", CONVERT
    return None


def _plane(frame: Any, whole: Any) -> Any:
    """Return what says where a slice, or a frame of a whole file, lies and how it is turned."""
    place, turned = frame, frame
    if "PlanePositionSequence" in frame:
        if "PlaneOrientationSequence" not in frame:
            turned = whole.SharedFunctionalGroupsSequence[0]
        place, turned = frame.PlanePositionSequence[0], turned.PlaneOrientationSequence[0]
    return place.ImagePositionPatient, turned.ImageOrientationPatient


@discreet()
def is_dicom_folder(folder: Path, modality: str = "") -> bool:
    """Return whether a folder holds, at any depth, a DICOM file (of a modality such as ``MR``)."""
    headers = (not modality or _header(path) for path in _dicom_files(folder))
    return any(h is True or (h and _text(h, "Modality") == modality) for h in headers)


@checked
@discreet()
def read_folder(folder: Path) -> list[Series]:
    """Read the headers of every series under a folder, mixed or not, that of other kinds too.

    Returns:
        Series in the order of their numbers.

    Raises:
        InputError: no MR series, or MR series of several patients or studies.
    """
    headers = [(path, header) for path in _dicom_files(folder) if (header := _header(path))]
    images = [header for _, header in headers if _text(header, "Modality") == "MR"]
    if not images:
        raise InputError(
            f"{folder} holds no MR images in DICOM that can be read; give the folder of a study."
        )
    for tag, what in (("PatientID", "patients"), ("StudyInstanceUID", "studies")):
        values = {_text(header, tag) for header in images} - {""}  # a header may lack it
        if len(values) > 1:
            raise InputError(
                f"{folder} holds scans of {len(values)} {what}; give the folder of one study."
            )
    groups: dict[str, list[tuple[Path, Any]]] = defaultdict(list)
    for path, header in headers:
        groups[_text(header, "SeriesInstanceUID")].append((path, header))
    return sorted((_series(uid, group) for uid, group in groups.items()), key=lambda s: s.number)


def _dicom_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            try:
                with path.open("rb") as file:
                    head = file.read(132)
            except OSError:
                continue
            if head[128:] == b"DICM" or _BARE.match(head):
                yield path


def _header(path: Path) -> Any:
    try:
        header: Any = pydicom.dcmread(
            path, stop_before_pixels=True, specific_tags=[*HEADER], force=True
        )
    except (pydicom.errors.InvalidDicomError, OSError, ValueError, AttributeError, KeyError):
        return None  # damaged: its series then lacks a slice, which its volume tells
    return header if _text(header, "SeriesInstanceUID") else None  # as where a file is cut off


def _series(uid: str, group: Sequence[tuple[Path, Any]]) -> Series:
    headers = [header for _, header in group]
    first = headers[0]
    agent = _text(first, "ContrastBolusAgent")
    dose = _number(first, "ContrastBolusVolume") or _values(first, "ContrastBolusAgentSequence")
    description = _text(first, "SeriesDescription") or _text(first, "ProtocolName")
    kinds = (*_values(first, "ImageType"), *_values(first, "AcquisitionContrast"))
    return Series(
        uid=uid,
        number=int(_number(first, "SeriesNumber") or 0),
        description=description,
        files=tuple(path for path, _ in group),
        slices=sum(int(_number(header, "NumberOfFrames") or 1) for header in headers),
        echo=_number(first, "EchoTime", "EffectiveEchoTime"),
        repetition=_number(first, "RepetitionTime"),
        inversion=_number(first, "InversionTime", "InversionTimes"),
        agent=not _NO_AGENT.match(agent) if agent else bool(dose),
        kind=tuple(str(part).lower() for part in kinds),
        diffusion=any((_number(header, "DiffusionBValue") or 0) > 0 for header in headers),
        modality=_text(first, "Modality"),
        acquired=_day(first, "AcquisitionDate", "AcquisitionDateTime", "FrameAcquisitionDateTime"),
        shown=_without_patient(description, first),
    )


def _without_patient(text: str, header: Any) -> str:
    """Hide the parts of a patient's name, and the number, in a text that a person typed."""
    names = re.split(r"[\s^=,;]+", _text(header, "PatientName"))
    for part in (*names, _text(header, "PatientID")):
        if len(part) >= _SHORTEST_NAME:
            text = re.sub(rf"(?<!\w){re.escape(part)}(?!\w)", "…", text, flags=re.IGNORECASE)
    return "".join(letter for letter in text if letter.isprintable())  # a terminal would obey it


def _text(header: Any, name: str) -> str:
    return " ".join(map(str, _values(header, name))).strip()


def _number(header: Any, *names: str) -> float | None:
    for value in (v for name in names for v in _values(header, name)[:1]):
        with suppress(ValueError, TypeError):  # a header may hold anything
            if math.isfinite(number := float(value)):
                return number
    return None


def _day(header: Any, *names: str) -> date | None:
    for text in filter(None, (_text(header, name) for name in names)):
        with suppress(ValueError):
            return date.fromisoformat(text[:10].replace(".", "")[:8])
    return None


def _values(header: Any, name: str) -> list[Any]:
    """Return the values of an attribute of a header, or of an enhanced image's first frame."""
    with suppress(ValueError, TypeError, OverflowError, NotImplementedError):  # as in _number
        if name not in header:
            header = next((item for item in _groups(header) if name in item), {})
        value = header.get(name)
        several = isinstance(value, Sequence) and not isinstance(value, str)
        return [v for v in (value if several else [value]) if v not in (None, "")]
    return []


def _groups(header: Any) -> Iterator[Any]:
    """Yield the groups that the frames of an enhanced image share, and those of its first frame."""
    for whose in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for frame in list(header.get(whose) or ())[:1]:
            yield from (item for part in frame if part.VR == "SQ" for item in part.value)


def names_of(series: Iterable[Series]) -> str:
    """Return the names of several series for a sentence."""
    return ", ".join(s.label for s in series)
