"""Write NIfTI scans as a study of DICOM series, for examples and tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from numpy.typing import NDArray

CLASSIC_MR = "1.2.840.10008.5.1.4.1.1.4"


@dataclass(frozen=True)
class Protocol:
    """How a scanner would describe a series; times in ms, ``agent`` for contrast."""

    description: str
    echo: float | None = None
    repetition: float | None = None
    inversion: float | None = None
    agent: str = ""


PROTOCOLS: Mapping[str, Protocol] = {
    "flair": Protocol("ax FLAIR", 120, 9000, 2500),
    "t1ce": Protocol("T1 mprage", 4, 500, agent="Gadovist"),
    "t1": Protocol("T1w pre", 4, 500),
    "t2": Protocol("t2_tse_tra", 95, 4000),
}
"""Typical series of a tumour protocol."""


@dataclass(frozen=True)
class Person:
    """Whose study it is; invented, in DICOM's forms ``Family^Given`` and ``YYYYMMDD``."""

    name: str = "Phantom^Synthetic"
    number: str = "PHANTOM"
    birth: str = "19000101"


def write_study(folder: Path, scans: Mapping[str, Path], person: Person | None = None) -> Path:
    """Write one patient's scans as a study, a file per slice, all series in one folder.

    Each series is described as in :data:`PROTOCOLS`. The folder is made if needed.
    """
    study = pydicom.uid.generate_uid()
    for number, (modality, path) in enumerate(scans.items(), 2):
        image = nib.load(path)
        values = np.asarray(image.dataobj)
        protocol = PROTOCOLS.get(modality) or Protocol(modality)
        write_series(folder, values, image.affine, number, protocol, study, person or Person())
    return folder


def write_series(
    folder: Path,
    values: NDArray[Any],
    affine: NDArray[np.float64],
    number: int,
    protocol: Protocol,
    study: str,
    person: Person,
) -> None:
    """Write a volume as one classic MR series.

    Values are ``[x, y, z]``, 0 to 65535, and z is the slice; the affine is RAS, as nibabel has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM speaks LPS
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / spacing
    series, frame = pydicom.uid.generate_uid(), pydicom.uid.generate_uid()
    for k in range(values.shape[2]):
        slice_ = header(CLASSIC_MR, number, protocol, study, person)
        slice_.SeriesInstanceUID, slice_.FrameOfReferenceUID = series, frame
        slice_.InstanceNumber, slice_.PositionReferenceIndicator = k + 1, ""
        slice_.ImagePositionPatient = decimals(lps @ [0, 0, k, 1])[:3]
        slice_.ImageOrientationPatient = decimals([*axes[:, 0], *axes[:, 1]])
        slice_.PixelSpacing = decimals([spacing[1], spacing[0]])  # between rows, between columns
        slice_.SliceThickness = decimals([spacing[2]])[0]
        for name in ("Echo", "Repetition", "Inversion"):
            if (value := getattr(protocol, name.lower())) is not None:
                setattr(slice_, f"{name}Time", value)
        if protocol.agent:
            slice_.ContrastBolusAgent = protocol.agent
        slice_.Rows, slice_.Columns = values.shape[1], values.shape[0]
        slice_.PixelData = np.ascontiguousarray(values[:, :, k].T.astype(np.uint16)).tobytes()
        path = folder / f"{number}_{k:03d}.dcm"
        pydicom.dcmwrite(path, slice_, enforce_file_format=True)


def header(kind: str, number: int, protocol: Protocol, study: str, person: Person) -> Any:
    """Return a dataset with what every MR image has.

    ``kind`` is its SOP class.
    """
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = kind
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    made = pydicom.dataset.FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    made.PatientName, made.PatientID = person.name, person.number
    made.PatientBirthDate, made.PatientSex = person.birth, "O"
    made.StudyInstanceUID, made.StudyID, made.AccessionNumber = study, "1", ""
    made.StudyDate, made.StudyTime = "20200101", "120000"
    made.ContentDate, made.ContentTime = "20200101", "120000"
    made.ReferringPhysicianName = ""
    made.SeriesNumber, made.SeriesDescription = number, protocol.description
    made.Modality, made.Manufacturer = "MR", "phantom"
    made.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 0
    return made


def decimals(values: Any) -> list[str]:
    """Return numbers as DICOM's decimal strings, 16 characters at most."""
    return [f"{float(v):.6f}" for v in values]
