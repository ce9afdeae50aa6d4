"""Callbacks: terms of the loss, logs, predictions."""

from pmixseg.callbacks.alignment import PmixAlignment
from pmixseg.callbacks.distillation import Distillation
from pmixseg.callbacks.gap import GapMonitor
from pmixseg.callbacks.predictions import PredictionWriter
from pmixseg.callbacks.protocols import ProtocolScores
from pmixseg.callbacks.run import RunCheckpoint, RunLogger
from pmixseg.callbacks.temperatures import TemperatureFitting
from pmixseg.callbacks.term import TermCallback

__all__ = [
    "Distillation",
    "GapMonitor",
    "PmixAlignment",
    "PredictionWriter",
    "ProtocolScores",
    "RunCheckpoint",
    "RunLogger",
    "TemperatureFitting",
    "TermCallback",
]
