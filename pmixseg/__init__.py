"""Brain-tumour segmentation when MRI sequences are missing, as PyTorch Lightning modules.

Research use only. Names are imported when they are first used, so that ``import pmixseg`` costs
nothing and the command line answers at once.

Example:
    >>> import pmixseg
    >>> pmixseg.BRATS.modalities
    ('flair', 't1ce', 't1', 't2')
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pmixseg.old_paths import MovedModules, names_at_first_use
from pmixseg.version import __version__ as __version__

if TYPE_CHECKING:
    from pmixseg.backbones import Backbone as Backbone
    from pmixseg.backbones import MultiEncoderUNet as MultiEncoderUNet
    from pmixseg.callbacks import Distillation as Distillation
    from pmixseg.callbacks import GapMonitor as GapMonitor
    from pmixseg.callbacks import PmixAlignment as PmixAlignment
    from pmixseg.data.datamodule import BraTSDataModule as BraTSDataModule
    from pmixseg.errors import InputError as InputError
    from pmixseg.evaluation.prediction.scans import SegmentSettings as SegmentSettings
    from pmixseg.evaluation.prediction.segmentation import Segmentation as Segmentation
    from pmixseg.modules import SegmentationModule as SegmentationModule
    from pmixseg.modules import StudentModule as StudentModule
    from pmixseg.modules import TeacherModule as TeacherModule
    from pmixseg.modules import load as load
    from pmixseg.task import BRATS as BRATS
    from pmixseg.task import Task as Task

_HOMES = {
    "backbones": ("Backbone", "MultiEncoderUNet"),
    "callbacks": ("Distillation", "GapMonitor", "PmixAlignment"),
    "data.datamodule": ("BraTSDataModule",),
    "errors": ("InputError",),
    "evaluation.prediction.scans": ("SegmentSettings",),
    "evaluation.prediction.segmentation": ("Segmentation",),
    "modules": ("SegmentationModule", "StudentModule", "TeacherModule", "load"),
    "task": ("BRATS", "Task"),
}

PACKAGES = (
    *("backbones", "callbacks", "data", "evaluation", "inference", "losses", "modules"),
    *("task", "testing"),
)
"""Packages that ``import pmixseg`` gives at their first use, without an import of their own."""

sys.meta_path.append(MovedModules())

__getattr__, __dir__, __all__ = names_at_first_use(__name__, _HOMES, PACKAGES)
