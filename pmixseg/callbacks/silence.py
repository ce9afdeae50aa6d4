"""Silence messages of Lightning that do not help a user of this package."""

from __future__ import annotations

import logging
import re
import warnings

UNHELPFUL = re.compile(
    r"\W*(?:rank: \d+\] )?(Tip:|"
    r"(GPU|TPU|HPU|IPU) available|Seed set to|`Trainer\.\w+` (stopped|already)|"
    r"`Trainer\(\w+=.*\)` (was configured|started running)|Loading `train_dataloader` to estimate|"
    r"weights_only` was not set|Restor(ing|ed) |Loaded model weights|Using (16bit|bfloat16|double)|"
    r"Detected KeyboardInterrupt|Received SIGTERM|LOCAL_RANK|"
    r"You are using a CUDA device .* Tensor Cores)"
)
"""How messages begin that tell a person nothing about what they asked for."""

EXPECTED = (
    r".*LeafSpec",
    r".*does not have many workers",
    r".*smaller than the logging interval",
    r".*callbacks used to create the checkpoint",
    r"Checkpoint directory .* exists and is not empty",
    r"The dirpath has changed",
    r"You defined a `validation_step` but have no `val_dataloader`",
    r"ReduceLROnPlateau conditioned on metric .* not available",
    r"You're resuming from a checkpoint that ended before the epoch ended",
    r"Total length of `.*` across ranks is zero",
    r"Trainer already configured with model summary callbacks",
    r".*args parameter is intended",
    r"You are trying to `self\.log\(\)` but `Trainer\(barebones=True\)`",
)
"""Warnings about what this package sets itself, or about Lightning's own inside."""


class _Unhelpful(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return UNHELPFUL.match(record.getMessage()) is None


def silence_lightning() -> None:
    """Silence messages of Lightning that help no user, for the rest of the process."""
    for name in (
        "lightning.pytorch",
        "lightning.fabric",
        "lightning.pytorch.trainer.connectors.signal_connector",
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
        "lightning.fabric.utilities.seed",
    ):
        logger = logging.getLogger(name)
        # What a logger below says passes no filter of this one, but its handlers.
        for place in (logger, *logger.handlers):
            if not any(isinstance(f, _Unhelpful) for f in place.filters):
                place.addFilter(_Unhelpful())
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message=message)
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"lightning|jsonargparse|torch")
