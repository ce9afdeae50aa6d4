"""Phantom scans as DICOM series, classic or enhanced, with a patient's name to look for."""

import datetime

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

PATIENT = ("Doe^Jane", "PAT-4711", "19700101")
CLASSIC, ENHANCED = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"

TIMES = {
    "flair": (120, 9000, 2500),
    "t1": (4, 500, None),
    "t1ce": (4, 500, None),
    "t2": (95, 4000, None),
}


def base(uid, number, study, description):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = uid
    meta.MediaStorageSOPInstanceUID = generate_uid()
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = uid, meta.MediaStorageSOPInstanceUID
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = PATIENT
    ds.PatientSex = "O"
    ds.StudyInstanceUID, ds.StudyID, ds.AccessionNumber = study, "1", ""
    ds.StudyDate, ds.StudyTime = "20200101", "120000"
    ds.ReferringPhysicianName = ""
    ds.SeriesNumber, ds.SeriesDescription, ds.Modality = number, description, "MR"
    ds.Manufacturer = "phantom"
    ds.ContentDate, ds.ContentTime = "20200101", "120000"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    return ds


def write_series(folder, values, affine, number, description, study, times=(None,) * 3, agent=""):
    """Write ``values[x, y, z]`` with a RAS affine as one file per slice."""
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    rows = (lps[:3, 0] / spacing[0]).tolist() + (lps[:3, 1] / spacing[1]).tolist()
    series, frame = generate_uid(), generate_uid()
    for k in range(values.shape[2]):
        ds = base(CLASSIC, number, study, description)
        ds.SeriesInstanceUID, ds.FrameOfReferenceUID, ds.InstanceNumber = series, frame, k + 1
        ds.PositionReferenceIndicator = ""
        place = lps @ [0, 0, k, 1]
        ds.ImagePositionPatient = [f"{v:.6f}" for v in place[:3]]
        ds.ImageOrientationPatient = [f"{v:.6f}" for v in rows]
        ds.PixelSpacing = [f"{spacing[1]:.6f}", f"{spacing[0]:.6f}"]
        ds.SliceThickness = f"{spacing[2]:.6f}"
        for name, value in zip(("EchoTime", "RepetitionTime", "InversionTime"), times, strict=True):
            if value is not None:
                setattr(ds, name, value)
        if agent:
            ds.ContrastBolusAgent = agent
        ds.Rows, ds.Columns = values.shape[1], values.shape[0]
        ds.PixelData = np.ascontiguousarray(values[:, :, k].T.astype(np.uint16)).tobytes()
        pydicom.dcmwrite(folder / f"{number}_{k:03d}.dcm", ds, enforce_file_format=True)


def write_enhanced(path, values, affine, number, description, study, times=(None,) * 3):
    """Write all slices as one enhanced multi-frame object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    rows = (lps[:3, 0] / spacing[0]).tolist() + (lps[:3, 1] / spacing[1]).tolist()
    ds = base(ENHANCED, number, study, description)
    ds.SeriesInstanceUID, ds.FrameOfReferenceUID = generate_uid(), generate_uid()
    ds.InstanceNumber, ds.NumberOfFrames = 1, values.shape[2]
    ds.Rows, ds.Columns = values.shape[1], values.shape[0]
    organisation = generate_uid()
    item = Dataset()
    item.DimensionOrganizationUID = organisation
    ds.DimensionOrganizationSequence = [item]
    index = Dataset()
    index.DimensionOrganizationUID = organisation
    index.DimensionIndexPointer = 0x00200032
    index.FunctionalGroupPointer = 0x00209113
    ds.DimensionIndexSequence = [index]
    shared, measures, orientation, echo, timing = (Dataset() for _ in range(5))
    measures.PixelSpacing = [f"{spacing[1]:.6f}", f"{spacing[0]:.6f}"]
    measures.SliceThickness = f"{spacing[2]:.6f}"
    orientation.ImageOrientationPatient = [f"{v:.6f}" for v in rows]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    echo.EffectiveEchoTime = times[0]
    timing.RepetitionTime = times[1]
    shared.MREchoSequence, shared.MRTimingAndRelatedParametersSequence = [echo], [timing]
    if times[2] is not None:
        modifier = Dataset()
        modifier.InversionTimes = times[2]
        shared.MRModifierSequence = [modifier]
    ds.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for k in range(values.shape[2]):
        frame, position, content = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [f"{v:.6f}" for v in (lps @ [0, 0, k, 1])[:3]]
        content.DimensionIndexValues = [k + 1]
        content.FrameAcquisitionDateTime = datetime.datetime(2020, 1, 1).strftime("%Y%m%d%H%M%S")
        frame.PlanePositionSequence, frame.FrameContentSequence = [position], [content]
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    ds.PixelData = np.ascontiguousarray(values.transpose(2, 1, 0).astype(np.uint16)).tobytes()
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
