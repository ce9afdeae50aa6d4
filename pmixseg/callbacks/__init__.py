"""Callbacks: terms of the loss, logs, predictions."""

from pmixseg.callbacks.alignment import PmixAlignment
from pmixseg.callbacks.distillation import Distillation
from pmixseg.callbacks.predictions import PredictionWriter
from pmixseg.callbacks.run import RunCheckpoint, RunLogger
from pmixseg.callbacks.term import TermCallback

__all__ = [
    "Distillation",
    "PmixAlignment",
    "PredictionWriter",
    "RunCheckpoint",
    "RunLogger",
    "TermCallback",
]
