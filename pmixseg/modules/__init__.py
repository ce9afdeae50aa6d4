"""LightningModules: teacher, student, and what they share."""

from pmixseg.modules.base import SegmentationModule
from pmixseg.modules.checkpoint import load
from pmixseg.modules.official import July2025Student
from pmixseg.modules.pretraining import MaskedPretraining
from pmixseg.modules.student import StudentModule
from pmixseg.modules.teacher import TeacherModule
from pmixseg.modules.training.optimization import OneCycle, Polynomial, Schedule

__all__ = [
    "July2025Student",
    "MaskedPretraining",
    "OneCycle",
    "Polynomial",
    "Schedule",
    "SegmentationModule",
    "StudentModule",
    "TeacherModule",
    "load",
]
