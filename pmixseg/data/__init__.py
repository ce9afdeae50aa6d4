"""From folders of scans to batches: layouts, store, splits, missingness, patches, augmentation.

Names are imported when they are first used, so that reading a store needs neither Lightning nor
TorchIO.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmixseg.data.augment import Augmentation
    from pmixseg.data.cohorts.layouts import LAYOUTS, Case, Layout, find_cases
    from pmixseg.data.datamodule import BraTSDataModule
    from pmixseg.data.masks import CaseMasks, CovariateMasks, MaskFile, RandomMasks, SiteMasks
    from pmixseg.data.missing import (
        Bernoulli,
        Dependent,
        FixedList,
        MissingnessSampler,
        Protocols,
        UniformCombinations,
        UniformSizes,
    )
    from pmixseg.data.parts import Split
    from pmixseg.data.patches import CaseDataset, CaseItem, PatchDataset, PatchTransform
    from pmixseg.data.splits import (
        Fractions,
        KFold,
        SplitFiles,
        SplitJson,
        SplitLists,
        SplitPlan,
        WholeCohort,
    )
    from pmixseg.data.store.store import PrepareReport, Store, StoredCase, prepare
    from pmixseg.data.torchio_transform import TorchIOTransform

_HOME = {
    "augment": ("Augmentation",),
    "datamodule": ("BraTSDataModule",),
    "cohorts.layouts": ("LAYOUTS", "Case", "Layout", "find_cases"),
    "masks": ("CaseMasks", "CovariateMasks", "MaskFile", "RandomMasks", "SiteMasks"),
    "missing": (
        "Bernoulli",
        "Dependent",
        "FixedList",
        "MissingnessSampler",
        "Protocols",
        "UniformCombinations",
        "UniformSizes",
    ),
    "parts": ("Split",),
    "patches": ("CaseDataset", "CaseItem", "PatchDataset", "PatchTransform"),
    "splits": (
        "Fractions",
        "KFold",
        "SplitFiles",
        "SplitJson",
        "SplitLists",
        "SplitPlan",
        "WholeCohort",
    ),
    "store.store": ("PrepareReport", "Store", "StoredCase", "prepare"),
    "torchio_transform": ("TorchIOTransform",),
}

__all__ = [
    "LAYOUTS",
    "Augmentation",
    "Bernoulli",
    "BraTSDataModule",
    "Case",
    "CaseDataset",
    "CaseItem",
    "CaseMasks",
    "CovariateMasks",
    "Dependent",
    "FixedList",
    "Fractions",
    "KFold",
    "Layout",
    "MaskFile",
    "MissingnessSampler",
    "PatchDataset",
    "PatchTransform",
    "PrepareReport",
    "Protocols",
    "RandomMasks",
    "SiteMasks",
    "Split",
    "SplitFiles",
    "SplitJson",
    "SplitLists",
    "SplitPlan",
    "Store",
    "StoredCase",
    "TorchIOTransform",
    "UniformCombinations",
    "UniformSizes",
    "WholeCohort",
    "find_cases",
    "prepare",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
