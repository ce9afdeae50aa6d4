"""From folders of scans to batches: layouts, store, splits, missingness, patches, augmentation.

Names are imported when they are first used, so that reading a store needs neither Lightning nor
TorchIO.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pmixseg.old_paths import names_at_first_use

if TYPE_CHECKING:
    from pmixseg.data.augment import Augmentation as Augmentation
    from pmixseg.data.cohorts.layouts import LAYOUTS as LAYOUTS
    from pmixseg.data.cohorts.layouts import Case as Case
    from pmixseg.data.cohorts.layouts import Layout as Layout
    from pmixseg.data.cohorts.layouts import find_cases as find_cases
    from pmixseg.data.datamodule import BraTSDataModule as BraTSDataModule
    from pmixseg.data.masks import CaseMasks as CaseMasks
    from pmixseg.data.masks import CovariateMasks as CovariateMasks
    from pmixseg.data.masks import MaskFile as MaskFile
    from pmixseg.data.masks import RandomMasks as RandomMasks
    from pmixseg.data.masks import SiteMasks as SiteMasks
    from pmixseg.data.missing import Bernoulli as Bernoulli
    from pmixseg.data.missing import Dependent as Dependent
    from pmixseg.data.missing import FixedList as FixedList
    from pmixseg.data.missing import MissingnessSampler as MissingnessSampler
    from pmixseg.data.missing import Protocols as Protocols
    from pmixseg.data.missing import UniformCombinations as UniformCombinations
    from pmixseg.data.missing import UniformSizes as UniformSizes
    from pmixseg.data.parts import Split as Split
    from pmixseg.data.patches import CaseDataset as CaseDataset
    from pmixseg.data.patches import CaseItem as CaseItem
    from pmixseg.data.patches import PatchDataset as PatchDataset
    from pmixseg.data.patches import PatchTransform as PatchTransform
    from pmixseg.data.splits import Fractions as Fractions
    from pmixseg.data.splits import KFold as KFold
    from pmixseg.data.splits import SplitFiles as SplitFiles
    from pmixseg.data.splits import SplitJson as SplitJson
    from pmixseg.data.splits import SplitLists as SplitLists
    from pmixseg.data.splits import SplitPlan as SplitPlan
    from pmixseg.data.splits import WholeCohort as WholeCohort
    from pmixseg.data.store.store import PrepareReport as PrepareReport
    from pmixseg.data.store.store import Store as Store
    from pmixseg.data.store.store import StoredCase as StoredCase
    from pmixseg.data.store.store import prepare as prepare
    from pmixseg.data.torchio_transform import TorchIOTransform as TorchIOTransform

_HOMES = {
    "augment": ("Augmentation",),
    "cohorts.layouts": ("LAYOUTS", "Case", "Layout", "find_cases"),
    "datamodule": ("BraTSDataModule",),
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

__getattr__, __dir__, __all__ = names_at_first_use(__name__, _HOMES)
