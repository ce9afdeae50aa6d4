"""Callbacks of Lightning that would spoil a training without a word."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging

from pmixseg.errors import InputError
from pmixseg.modules.optimization import mode_of


def check_trainer(trainer: Trainer) -> None:
    """Refuse callbacks whose result would be lost, or the opposite of what is wanted.

    Raises:
        InputError: weights that are averaged after the last checkpoint is written; or a metric
            that is watched in the wrong direction.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set in Trainer.__init__
        if isinstance(callback, StochasticWeightAveraging):
            raise InputError(
                "StochasticWeightAveraging puts the averaged weights into the model after the last "
                "checkpoint is written, so no checkpoint holds them; use "
                "lightning.pytorch.callbacks.EMAWeightAveraging, whose checkpoints do."
            )
        if not isinstance(callback, EarlyStopping | ModelCheckpoint) or callback.monitor is None:
            continue
        mode = mode_of(callback.monitor)
        if mode is not None and callback.mode != mode:
            raise InputError(
                f"{type(callback).__name__} watches {callback.monitor} with mode {callback.mode}, "
                f"but it is better {'lower' if mode == 'min' else 'higher'}; give it mode: {mode}."
            )
