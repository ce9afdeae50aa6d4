"""How far a modality's latent is from the anchor: one file per idea.

A new distance is one file here: a subclass of :class:`~pmixseg.losses.distances.Distance` with a
``name`` of its own. Every file of this folder is read, and ``--align.distance <name>`` knows the
class. A distance of your own, outside the package, is named in YAML by its ``class_path``.
"""

from __future__ import annotations

import importlib
import pkgutil

from pmixseg.losses.distances.case_nce import CaseNCE
from pmixseg.losses.distances.contract import (
    DISTANCES,
    Detach,
    Distance,
    LevelLatents,
    PerSlot,
    distance_named,
    mean_over_shown,
    point_and_target,
)
from pmixseg.losses.distances.gaussian import KL, VID
from pmixseg.losses.distances.joint import JointKL
from pmixseg.losses.distances.moments import mean_over_brain, pooled_moments, standardise
from pmixseg.losses.distances.pointwise import MSE, NMSE, Cosine, SmoothL1
from pmixseg.losses.distances.samples import MMD, SlicedWasserstein
from pmixseg.losses.distances.vic import VIC
from pmixseg.losses.distances.whitened import Whitened

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "DISTANCES",
    "KL",
    "MMD",
    "MSE",
    "NMSE",
    "VIC",
    "VID",
    "CaseNCE",
    "Cosine",
    "Detach",
    "Distance",
    "JointKL",
    "LevelLatents",
    "PerSlot",
    "SlicedWasserstein",
    "SmoothL1",
    "Whitened",
    "distance_named",
    "mean_over_brain",
    "mean_over_shown",
    "point_and_target",
    "pooled_moments",
    "standardise",
]
