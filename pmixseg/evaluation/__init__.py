"""From a trained network to numbers and pages: prediction, scores, records, comparison, report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pmixseg.old_paths import names_at_first_use

if TYPE_CHECKING:
    from pmixseg.evaluation.prediction.cases import EvaluationSettings as EvaluationSettings
    from pmixseg.evaluation.records.records import Records as Records
    from pmixseg.evaluation.scores.conventions import Conventions as Conventions

_HOMES = {
    "prediction.cases": ("EvaluationSettings",),
    "records.records": ("Records",),
    "scores.conventions": ("Conventions",),
}

__getattr__, __dir__, __all__ = names_at_first_use(__name__, _HOMES)
