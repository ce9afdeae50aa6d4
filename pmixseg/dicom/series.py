"""Read DICOM series: their headers, and their voxels as a volume."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pmixseg.dicom.packages import highdicom, pydicom
from pmixseg.errors import InputError

HEADER = (
    "SOPClassUID",
    "Modality",
    "PatientID",
    "PatientName",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "ProtocolName",
    "ImageType",
    "EchoTime",
    "RepetitionTime",
    "InversionTime",
    "ContrastBolusAgent",
    "DiffusionBValue",
    "NumberOfFrames",
)
"""What is read of every file before it is known which files are needed."""

_UID = re.compile(r"\d+(\.\d+){4,}")
_SHORTEST_NAME = 2


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
    shown: str | None = None

    @property
    def label(self) -> str:
        """How sentences name it: its number and description."""
        return f"series {self.number} '{self.told}'"

    @property
    def told(self) -> str:
        """The description as it may be printed."""
        return self.description if self.shown is None else self.shown

    def datasets(self) -> list[Any]:
        """Read the files whole."""
        with discreet():
            return [pydicom.dcmread(path) for path in self.files]

    def volume(self) -> Any:
        """Return the voxels and their place as a ``highdicom.Volume`` (LPS, mm).

        Raises:
            InputError: slices that are missing, of several sizes, or not parallel.
        """
        try:
            datasets = self.datasets()
            with discreet():
                if len(datasets) == 1 and "NumberOfFrames" in datasets[0]:
                    return highdicom.Image.from_dataset(datasets[0]).get_volume(dtype=np.float32)
                return highdicom.get_volume_from_series(datasets, dtype=np.float32)
        except (RuntimeError, ValueError, AttributeError, KeyError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reason = _UID.sub("…", reason)
            raise InputError(
                f"{self.label} cannot be put together as a volume ({reason}); check that all of "
                "its slices are there."
            ) from error


@contextmanager
def discreet() -> Iterator[None]:
    """Let pydicom and highdicom warn of nothing: they quote values of a patient's header."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pydicom|highdicom)(\..*)?")
        yield


def is_dicom_folder(folder: Path) -> bool:
    """Return whether a folder holds at least one DICOM file, at any depth."""
    return next(_dicom_files(folder), None) is not None


def read_folder(folder: Path) -> list[Series]:
    """Read the headers of every MR series under a folder.

    Files of other kinds are passed over. Series may be mixed in one folder.

    Args:
        folder: looked through at any depth.

    Returns:
        Series in the order of their numbers.

    Raises:
        InputError: no MR series, or series of several patients or studies.
    """
    headers = [(path, header) for path in _dicom_files(folder) if (header := _header(path))]
    images = [(path, h) for path, h in headers if str(h.get("Modality", "")) == "MR"]
    if not images:
        raise InputError(f"{folder} holds no MR images in DICOM; give the folder of a study.")
    for tag, what in (("PatientID", "patients"), ("StudyInstanceUID", "studies")):
        values = {str(h.get(tag, "")) for _, h in images}
        if len(values) > 1:
            raise InputError(
                f"{folder} holds scans of {len(values)} {what}; give the folder of one study."
            )
    groups: dict[str, list[tuple[Path, Any]]] = defaultdict(list)
    for path, header in images:
        groups[str(header.get("SeriesInstanceUID", ""))].append((path, header))
    return sorted((_series(uid, group) for uid, group in groups.items()), key=lambda s: s.number)


def _dicom_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            try:
                with path.open("rb") as file:
                    head = file.read(132)
            except OSError:
                continue
            if head[128:] == b"DICM":
                yield path


def _header(path: Path) -> Any:
    try:
        tags = [*HEADER, "SharedFunctionalGroupsSequence", "AcquisitionContrast"]
        with discreet():
            return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
    except (pydicom.errors.InvalidDicomError, OSError, ValueError, AttributeError, KeyError):
        return None  # damaged: its series then lacks a slice, which its volume tells


def _series(uid: str, group: Sequence[tuple[Path, Any]]) -> Series:
    first = group[0][1]
    frames = first.get("NumberOfFrames")
    agent = str(_value(first, "ContrastBolusAgent") or "").strip().lower()
    description = str(first.get("SeriesDescription") or first.get("ProtocolName") or "")
    return Series(
        uid=uid,
        number=int(first.get("SeriesNumber") or 0),
        description=description,
        files=tuple(path for path, _ in group),
        slices=int(frames) if frames else len(group),
        echo=_number(first, "EchoTime", "EffectiveEchoTime"),
        repetition=_number(first, "RepetitionTime"),
        inversion=_number(first, "InversionTime", "InversionTimes"),
        agent=agent not in ("", "no", "none", "n"),
        kind=tuple(str(part).lower() for part in first.get("ImageType") or ()),
        diffusion=(_number(first, "DiffusionBValue") or 0) > 0,
        shown=_without_patient(description, first),
    )


def _without_patient(text: str, header: Any) -> str:
    """Hide the parts of a patient's name, and the number, in a text that a person typed."""
    names = re.split(r"[\s^=,;]+", str(header.get("PatientName") or ""))
    for part in (*names, str(header.get("PatientID") or "")):
        if len(part) >= _SHORTEST_NAME:
            text = re.sub(rf"(?<!\w){re.escape(part)}(?!\w)", "…", text, flags=re.IGNORECASE)
    return text


def _number(header: Any, *names: str) -> float | None:
    for name in names:
        value = _value(header, name)
        if value not in (None, ""):
            single = value[0] if isinstance(value, list | tuple) else value
            return float(single)
    return None


def _value(header: Any, name: str) -> Any:
    """Return an attribute of the header, or of the groups that enhanced images share."""
    if name in header:
        return header.get(name)
    for shared in header.get("SharedFunctionalGroupsSequence") or ():
        for element in shared:
            for item in element.value if element.VR == "SQ" else ():
                if name in item:
                    return item.get(name)
    return None


def names_of(series: Iterable[Series]) -> str:
    """Return the names of several series for a sentence."""
    return ", ".join(s.label for s in series)
