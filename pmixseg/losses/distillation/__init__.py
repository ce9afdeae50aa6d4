"""Knowledge distillation: terms between a student and a teacher.

The teacher is frozen and sees everything acquired; its outputs and latents are constants here.

* outputs: :class:`LogitKL`, :class:`WeightedSoftCE`, :class:`ProbabilityMSE`;
* latents: :class:`LatentMatch`, :class:`GramMatch`, :class:`VariationalMatch`,
  :class:`ContrastiveMatch`, :class:`PrototypeMatch`;
* the network itself as teacher: :class:`SelfDistillation` (outputs and latents),
  :class:`SubsetMatch` (latents).

Constants of published methods stand in the docstrings as "Preset"; a constant that no opened
source states is marked "from memory".

Source: docs/method/distillation.md.
"""

from pmixseg.losses.distillation.latents import (
    ContrastiveMatch,
    GramMatch,
    LatentMatch,
    SubsetMatch,
    VariationalMatch,
)
from pmixseg.losses.distillation.outputs import LogitKL, ProbabilityMSE, WeightedSoftCE
from pmixseg.losses.distillation.pairing import LatentTerm, SlotwiseTerm
from pmixseg.losses.distillation.prototypes import PrototypeMatch, SelfDistillation
from pmixseg.losses.distillation.term import DistillationTerm, Network

__all__ = [
    "ContrastiveMatch",
    "DistillationTerm",
    "GramMatch",
    "LatentMatch",
    "LatentTerm",
    "LogitKL",
    "Network",
    "ProbabilityMSE",
    "PrototypeMatch",
    "SelfDistillation",
    "SlotwiseTerm",
    "SubsetMatch",
    "VariationalMatch",
    "WeightedSoftCE",
]
