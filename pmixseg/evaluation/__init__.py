"""From a trained network to numbers and pages: prediction, scores, records, comparison, report."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmixseg.evaluation.prediction.cases import EvaluationSettings
    from pmixseg.evaluation.records.records import Records
    from pmixseg.evaluation.scores.conventions import Conventions

_HOMES = {
    "Conventions": "scores.conventions",
    "EvaluationSettings": "prediction.cases",
    "Records": "records.records",
}

__all__ = ["Conventions", "EvaluationSettings", "Records"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
