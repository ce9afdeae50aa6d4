"""What the package's own example study has not: enhanced multi-frame series, a patient."""

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from pmixseg.dicom.example import Person, decimals, header

PATIENT = Person("Doe^Jane", "PAT-4711", "19700101")
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"


def write_enhanced(path, values, affine, number, protocol, study, person):
    """Write all slices as one enhanced multi-frame object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / spacing
    ds = header(ENHANCED_MR, number, protocol, study, person)
    ds.SeriesInstanceUID, ds.FrameOfReferenceUID = generate_uid(), generate_uid()
    ds.InstanceNumber, ds.NumberOfFrames = 1, values.shape[2]
    ds.Rows, ds.Columns = values.shape[1], values.shape[0]
    organisation, index = Dataset(), Dataset()
    organisation.DimensionOrganizationUID = index.DimensionOrganizationUID = generate_uid()
    index.DimensionIndexPointer = 0x00200032
    index.FunctionalGroupPointer = 0x00209113
    ds.DimensionOrganizationSequence, ds.DimensionIndexSequence = [organisation], [index]
    shared, measures, orientation, echo, timing = (Dataset() for _ in range(5))
    measures.PixelSpacing = decimals([spacing[1], spacing[0]])
    measures.SliceThickness = decimals([spacing[2]])[0]
    orientation.ImageOrientationPatient = decimals([*axes[:, 0], *axes[:, 1]])
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    echo.EffectiveEchoTime, timing.RepetitionTime = protocol.echo, protocol.repetition
    shared.MREchoSequence, shared.MRTimingAndRelatedParametersSequence = [echo], [timing]
    if protocol.inversion is not None:
        modifier = Dataset()
        modifier.InversionTimes = protocol.inversion
        shared.MRModifierSequence = [modifier]
    ds.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for k in range(values.shape[2]):
        frame, position, content = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = decimals(lps @ [0, 0, k, 1])[:3]
        content.DimensionIndexValues = [k + 1]
        frame.PlanePositionSequence, frame.FrameContentSequence = [position], [content]
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    ds.PixelData = np.ascontiguousarray(values.transpose(2, 1, 0).astype(np.uint16)).tobytes()
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
