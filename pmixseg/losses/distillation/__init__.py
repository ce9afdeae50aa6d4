"""Knowledge distillation: losses between a student and a teacher.

The teacher is frozen and sees everything acquired; its outputs and latents are constants here.

* outputs: :class:`LogitKL`, :class:`WeightedSoftCE`, :class:`ProbabilityMSE`;
* the decoder's feature maps: :class:`PrototypeMatch`;
* latents, over brain voxels: :class:`LatentMatch`, :class:`GramMatch`, :class:`VariationalMatch`,
  :class:`ContrastiveMatch`, :class:`LatentPrototypeMatch`;
* the network itself as teacher: :class:`SelfDistillation` (outputs and decoder),
  :class:`SubsetMatch` (latents).

Constants of published methods stand in the docstrings as "Preset"; a constant that no opened
source states is marked "from memory".

Source: docs/method/distillation.md.
"""

from pmixseg.losses.distillation.contrastive import ContrastiveMatch, case_numbers
from pmixseg.losses.distillation.latents import (
    GramMatch,
    LatentMatch,
    SubsetMatch,
    VariationalMatch,
)
from pmixseg.losses.distillation.loss import DistillationLoss, Network
from pmixseg.losses.distillation.outputs import LogitKL, ProbabilityMSE, WeightedSoftCE
from pmixseg.losses.distillation.pairing import LatentLoss, SlotwiseLoss
from pmixseg.losses.distillation.prototypes import LatentPrototypeMatch, PrototypeMatch
from pmixseg.losses.distillation.self_taught import SelfDistillation

__all__ = [
    "ContrastiveMatch",
    "DistillationLoss",
    "GramMatch",
    "LatentLoss",
    "LatentMatch",
    "LatentPrototypeMatch",
    "LogitKL",
    "Network",
    "ProbabilityMSE",
    "PrototypeMatch",
    "SelfDistillation",
    "SlotwiseLoss",
    "SubsetMatch",
    "VariationalMatch",
    "WeightedSoftCE",
    "case_numbers",
]
