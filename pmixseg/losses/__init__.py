"""Losses: tensors in, scalars out; nothing here knows Lightning.

* :mod:`~pmixseg.losses.segmentation`: the criterion contract, Dice + cross-entropy.
* :mod:`~pmixseg.losses.anchors`: P_mix, what latents are aligned to and missing ones filled with.
* :mod:`~pmixseg.losses.alignment`: the alignment loss.
* :mod:`~pmixseg.losses.distances`: what it measures, one file per idea.
* :mod:`~pmixseg.losses.distillation`: losses between a student and a teacher.
* :mod:`~pmixseg.losses.official`: the authors' public snippets, faults included, for comparison.

Losses that couple the samples of a batch sum or gather over processes (``ranks``), so that DDP
equals one process.
"""

from pmixseg.losses.alignment import AlignmentLoss, resolve_levels
from pmixseg.losses.anchors import (
    Anchor,
    MixtureAnchor,
    ModalityAnchor,
    NormalAnchor,
    ProductAnchor,
    WeightedAnchor,
)
from pmixseg.losses.distances import (
    DISTANCES,
    KL,
    MMD,
    MSE,
    NMSE,
    VIC,
    VID,
    CaseNCE,
    Cosine,
    Distance,
    JointKL,
    SlicedWasserstein,
    SmoothL1,
    Whitened,
)
from pmixseg.losses.distillation import (
    ContrastiveMatch,
    DistillationLoss,
    GramMatch,
    LatentMatch,
    LatentPrototypeMatch,
    LogitKL,
    ProbabilityMSE,
    PrototypeMatch,
    SelfDistillation,
    SubsetMatch,
    VariationalMatch,
    WeightedSoftCE,
)
from pmixseg.losses.official import (
    April2025Alignment,
    July2025Alignment,
    July2025Anchor,
    OfficialAlignment,
)
from pmixseg.losses.segmentation import Criterion, DiceCE, area_fractions

__all__ = [
    "DISTANCES",
    "KL",
    "MMD",
    "MSE",
    "NMSE",
    "VIC",
    "VID",
    "AlignmentLoss",
    "Anchor",
    "April2025Alignment",
    "CaseNCE",
    "ContrastiveMatch",
    "Cosine",
    "Criterion",
    "DiceCE",
    "Distance",
    "DistillationLoss",
    "GramMatch",
    "JointKL",
    "July2025Alignment",
    "July2025Anchor",
    "LatentMatch",
    "LatentPrototypeMatch",
    "LogitKL",
    "MixtureAnchor",
    "ModalityAnchor",
    "NormalAnchor",
    "OfficialAlignment",
    "ProbabilityMSE",
    "ProductAnchor",
    "PrototypeMatch",
    "SelfDistillation",
    "SlicedWasserstein",
    "SmoothL1",
    "SubsetMatch",
    "VariationalMatch",
    "WeightedAnchor",
    "WeightedSoftCE",
    "Whitened",
    "area_fractions",
    "resolve_levels",
]
