"""Brain-tumour segmentation when MRI sequences are missing, as PyTorch Lightning modules.

Research use only. Names are imported when they are first used, so that ``import pmixseg`` costs
nothing and the command line answers at once.

Example:
    >>> import pmixseg
    >>> pmixseg.BRATS.modalities
    ('flair', 't1ce', 't1', 't2')
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from pmixseg.old_paths import MovedModules
from pmixseg.version import __version__ as __version__

if TYPE_CHECKING:
    from pmixseg.backbones import Backbone, MultiEncoderUNet
    from pmixseg.callbacks import Distillation, GapMonitor, PmixAlignment
    from pmixseg.data.datamodule import BraTSDataModule
    from pmixseg.errors import InputError
    from pmixseg.evaluation.prediction.scans import SegmentSettings
    from pmixseg.evaluation.prediction.segmentation import Segmentation
    from pmixseg.modules import SegmentationModule, StudentModule, TeacherModule, load
    from pmixseg.task import BRATS, Task

__all__ = [
    "BRATS",
    "Backbone",
    "BraTSDataModule",
    "Distillation",
    "GapMonitor",
    "InputError",
    "MultiEncoderUNet",
    "PmixAlignment",
    "SegmentSettings",
    "Segmentation",
    "SegmentationModule",
    "StudentModule",
    "Task",
    "TeacherModule",
    "load",
]

_HOMES = {
    "BRATS": "pmixseg.task",
    "Backbone": "pmixseg.backbones",
    "BraTSDataModule": "pmixseg.data.datamodule",
    "Distillation": "pmixseg.callbacks",
    "GapMonitor": "pmixseg.callbacks",
    "InputError": "pmixseg.errors",
    "MultiEncoderUNet": "pmixseg.backbones",
    "PmixAlignment": "pmixseg.callbacks",
    "SegmentSettings": "pmixseg.evaluation.prediction.scans",
    "Segmentation": "pmixseg.evaluation.prediction.segmentation",
    "SegmentationModule": "pmixseg.modules",
    "StudentModule": "pmixseg.modules",
    "Task": "pmixseg.task",
    "TeacherModule": "pmixseg.modules",
    "load": "pmixseg.modules",
}
"""Where each public name lives; a test keeps it equal to ``__all__`` and the typed imports."""

PACKAGES = (
    *("backbones", "callbacks", "data", "evaluation", "inference", "losses", "modules"),
    *("task", "testing"),
)
"""Packages that ``import pmixseg`` gives at their first use, without an import of their own."""


sys.meta_path.append(MovedModules())


def __getattr__(name: str) -> Any:
    """Import a public name (PEP 562)."""
    if name in PACKAGES:
        return importlib.import_module(f"pmixseg.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'pmixseg' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    """List public names and submodules, for completion."""
    return sorted({*globals(), *__all__, *PACKAGES})
