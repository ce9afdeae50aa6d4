"""Resume a training with the settings of the new call, not with those of its checkpoint."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pmixseg.data.sampling import EpochSampler
from pmixseg.describe import Described, describe
from pmixseg.errors import InputError, count_of
from pmixseg.modules.training.optimization import (
    accumulation,
    active_terms,
    callbacks_of,
    place_steps,
)

PLATEAU_STATE = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
"""What a plateau schedule counts; everything else in its state is a setting."""

PENDING = "pending_metrics"
"""Entry of a checkpoint: values that a plateau schedule had not yet seen when it was written."""

CIRCUMSTANCES = "circumstances"
"""Entry of a checkpoint: see :func:`circumstances`."""

FROZEN = "frozen"
"""Entry of a checkpoint: parameters that a finetuning callback has not yet let go."""

OF_DATA = (
    *("batch_size", "patch_size", "patches_per_case", "foreground"),
    *("seed", "augmentation", "masks"),
)
OF_TRAINER = (
    *("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("limit_train_batches", "world_size"),
)
"""Settings besides model and optimizer that the steps of a training depend on, beside its terms."""

_Groups = list[list[dict[str, Any]]]
"""Per optimizer and parameter group, its settings."""


def _settings(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in an optimizer's group, without numbers that change as it runs."""
    arguments = set(inspect.signature(type(optimizer).__init__).parameters) - {"params"}
    schedule = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
    return {k: copy.deepcopy(group[k]) for k in group if k in arguments or k in schedule}


def _keep_own_state(optimizer: Optimizer, restored: dict[str, Any]) -> None:
    """Put a new state in place of one without what this kind of optimizer keeps of each weight."""
    group = optimizer.param_groups[0]
    probe = nn.Parameter(group["params"][0].new_zeros(1))
    probe.grad = torch.zeros_like(probe)
    kept = {name for of_weight in restored["state"].values() for name in of_weight}
    with suppress(TypeError):  # LBFGS, or one of the user's own that needs more than parameters
        twin = type(optimizer)([{**group, "params": [probe]}])  # type: ignore[call-arg]  # defaults
        twin.step()
        if kept and (lacking := twin.state[probe].keys() - kept):
            restored["state"] = optimizer.state_dict()["state"]
            rank_zero_info(
                f"the checkpoint holds no {', '.join(sorted(lacking))}, which "
                f"{type(optimizer).__name__} keeps of each weight, so it begins as a new one does."
            )


def _lowered(optimizer: Optimizer) -> list[float]:
    """Return the share of its first learning rate that each group has now."""
    return [float(g["lr"] / g.get("initial_lr", g["lr"])) for g in optimizer.param_groups]


def _epochs(trainer: Trainer) -> int:
    """Count the epochs whose steps are all made, whether or not the hooks at their end have run."""
    return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]  # typed as its base


def _keep_counts(scheduler: ReduceLROnPlateau, settings: Mapping[str, Any]) -> None:
    restored = scheduler.state_dict()
    scheduler.load_state_dict({**settings, **{key: restored[key] for key in PLATEAU_STATE}})


def _steps_made(scheduler: LRScheduler, config: LRSchedulerConfig, trainer: Trainer) -> int:
    """Return how often a schedule had been stepped when its checkpoint was written."""
    steps = trainer.global_step if config.interval == "step" else _epochs(trainer)
    made = steps // config.frequency
    if config.interval == "step" and config.frequency > 1:
        # Lightning counts the batches of every epoch anew; the schedule itself does not, or the
        # first of those that it chains.
        restored = scheduler.state_dict()
        chained = restored.get("_schedulers", [{}])[0]
        return int(restored.get("last_epoch", chained.get("last_epoch", made)))
    return made


def _replay(scheduler: LRScheduler, steps: int) -> None:
    with warnings.catch_warnings():
        # The optimizer made these steps before it was restored.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for step in range(steps):
            try:
                scheduler.step()
            except ValueError as error:
                raise InputError(
                    f"the checkpoint has made {count_of(steps, 'step')}, but the learning-rate "
                    f"schedule of this training ends at step {step}; give more "
                    "max_epochs or max_steps (--trainer.…), or start anew with its weights alone "
                    "(--init_from; in Python fit what pmixseg.load returns)."
                ) from error


def pending_metrics(trainer: Trainer) -> dict[str, float]:
    """Return metrics of the epoch that ends now, which a plateau schedule gets only later.

    Lightning writes checkpoints at the end of an epoch before its schedules are stepped.
    """
    if _epochs(trainer) == trainer.fit_loop.epoch_progress.current.completed:
        return {}
    watched = [c.monitor for c in trainer.lr_scheduler_configs if c.reduce_on_plateau]
    values = trainer.callback_metrics
    return {name: float(values[name]) for name in watched if name in values}


def circumstances(trainer: Trainer) -> dict[str, Any]:
    """Return what steps depend on besides model, optimizer and cases; primitives.

    Settings have their names on the command line; those that no checkpoint holds are left out.
    """
    data = getattr(trainer, "datamodule", None)
    settings = {f"data.{name}": getattr(data, name, None) for name in OF_DATA}
    settings |= {f"trainer.{name}": getattr(trainer, name, None) for name in OF_TRAINER}
    if change := accumulation(trainer):
        settings["trainer.accumulate_grad_batches"] = dict(change.scheduling)
    for term in active_terms(trainer):
        if isinstance(term, Described):
            settings |= {f"{term.name}.{k}": value for k, value in term.init_args.items()}  # type: ignore[attr-defined]  # a term's
    primitives = {}
    for name, value in settings.items():
        with suppress(InputError):  # an object of the user's own
            primitives[name] = describe(value, name)
    return primitives


def differences(
    stored: Any, current: Any, args: Sequence[str] = (), where: str | None = None
) -> list[str]:
    """Name the leaves in which two descriptions differ, in words.

    What a checkpoint does not state had its default, and has it still unless a flag says otherwise.
    ``where`` is the name of what is described, if it has one.
    """
    if isinstance(stored, dict) and isinstance(current, dict):
        classes = [description.get("class_path") for description in (stored, current)]
        if classes[0] != classes[1]:  # whose arguments have nothing in common
            return [f"{where} is {classes[1]}, the checkpoint had {classes[0]}"]
        # Arguments that the checkpoint lacks count where a flag names them.
        flagged = [g for g in current if g not in stored and any(f".{g}" in arg for arg in args)]
        return [
            line
            for key in [*(k for k in stored if k != "task"), *flagged]
            for name in (f"{where}.{key}" if where else key,)
            for line in differences(stored.get(key), current.get(key), args, name)
        ]
    if stored == current:
        return []
    return [f"{where} is {current}, the checkpoint had {stored}"]


def _report_changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say in which settings a training is not the one that it goes on from."""
    if changes := differences({k: v for k, v in earlier.items() if k in now}, dict(now)):
        rank_zero_info(
            f"{'; '.join(changes)}: the training goes on with the settings of this call, and not "
            "as it would have without the interruption."
        )


def _go_on_after_epoch(trainer: Trainer) -> None:
    """Go on with the next epoch where a checkpoint is from the end of one.

    With ``max_steps`` Lightning goes on within that epoch: it trains a batch too many, or counts
    the epoch twice and so skips the data of the next. With ``max_epochs`` it does this.
    """
    loop: Any = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        loop.reset_restart_stage()
        loop.epoch_loop.reset_restart_stage()
        loop._restarting = False  # the setter refuses with max_steps
        loop.epoch_loop.restarting = False


def _go_on_within_epoch(trainer: Trainer) -> None:
    """Begin with the batches that an epoch still lacks; Lightning begins with its first ones.

    Where ``max_steps`` had ended an epoch early, Lightning goes on with the next one.
    """
    loop: Any = trainer.fit_loop
    batches, epochs = loop.epoch_loop.batch_progress, loop.epoch_progress.current
    now = batches.current
    done = now.ready if now.processed == now.ready else now.completed
    made = f"{count_of(done, 'batch', 'batches')} of epoch {epochs.ready - 1}"
    if not done or batches.is_last_batch:
        return
    if epochs.processed == epochs.ready:
        rank_zero_warn(
            f"the checkpoint's training ended after {made}; the rest of it is left out, and this "
            "training goes on with the next epoch."
        )
    elif isinstance(sampler := getattr(trainer.train_dataloader, "sampler", None), EpochSampler):
        sampler.done = done
    else:
        rank_zero_warn(
            f"the checkpoint was written after {made}, and the loader of this training begins "
            "again with the first; resume from the end of an epoch, or use a BraTSDataModule."
        )


class Resuming:
    """Give a resumed training the settings of its new call, in place of the checkpoint's.

    A checkpoint is restored between :meth:`begin` and :meth:`apply`.
    """

    pending: Mapping[str, float] | None = None
    """See :data:`PENDING`; known where a checkpoint is restored."""

    earlier: Mapping[str, Any] = {}
    """See :func:`circumstances`; of the training that the checkpoint is of."""

    def __init__(self, trainer: Trainer | None = None) -> None:
        # A checkpoint restores the patience of these callbacks before the training begins.
        self._patience = [(c, c.patience) for c in callbacks_of(trainer, EarlyStopping)]
        self._groups: _Groups | None = None
        self._states: list[dict[str, Any]] = []
        self._schedules: list[dict[str, Any]] = []
        self._frozen: list[str] | None = None
        self._goes_on = self._has_written = self._averaged = self._scheduled = False

    def write(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Note in a checkpoint what a training needs that goes on from it."""
        self._has_written = True
        checkpoint[PENDING] = pending_metrics(trainer)
        checkpoint[CIRCUMSTANCES] = circumstances(trainer)
        if callbacks_of(trainer, BaseFinetuning):
            named = trainer.lightning_module.named_parameters()
            checkpoint[FROZEN] = [name for name, p in named if not p.requires_grad]

    def read(self, checkpoint: Mapping[str, Any]) -> None:
        """Take it from a checkpoint that is restored; an older one may know less."""
        if "optimizer_states" not in checkpoint:
            raise InputError(
                "the checkpoint holds weights alone, and no training can go on from these; start "
                "anew with them (--init_from; in Python fit what pmixseg.load returns)."
            )
        self.pending = dict(checkpoint.get(PENDING, {}))
        self._frozen = checkpoint.get(FROZEN)
        self._scheduled = bool(checkpoint.get("lr_schedulers"))
        self._states = checkpoint["optimizer_states"]
        self._averaged = "current_model_state" in checkpoint  # Lightning's WeightAveraging
        if not self._has_written:  # a tuner puts back what it has tried by a checkpoint of its own
            self.earlier = dict(checkpoint.get(CIRCUMSTANCES, {}))

    def begin(self, trainer: Trainer) -> None:
        """Read the settings of the new call from its optimizers and schedules.

        A checkpoint restores their state as a whole, settings included: a learning rate that is
        given for the rest of a training would be lost without a word.
        """
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])  # the reference of a plateau
        for optimizer, restored in zip(trainer.optimizers, self._states, strict=False):
            _keep_own_state(optimizer, restored)
        self._groups = [[_settings(o, g) for g in o.param_groups] for o in trainer.optimizers]
        configs = trainer.lr_scheduler_configs
        self._schedules = [copy.deepcopy(config.scheduler.state_dict()) for config in configs]
        for callback, patience in self._patience:
            callback.patience = patience

    def apply(self, trainer: Trainer) -> None:
        """Give the settings of the new call to the restored optimizers and schedules."""
        self._goes_on = True
        _go_on_after_epoch(trainer)
        if self._averaged and not callbacks_of(trainer, WeightAveraging):
            rank_zero_warn(
                "the checkpoint holds averaged weights beside the trained ones, and this training "
                "goes on from the averaged weights; give EMAWeightAveraging again to go on from "
                "the others."
            )
        if self._frozen is not None and callbacks_of(trainer, BaseFinetuning):
            # The callback freezes anew what it had let go, and never comes back to it.
            for name, parameter in trainer.lightning_module.named_parameters():
                parameter.requires_grad_(name not in self._frozen)
        if self.pending is not None:
            _report_changes(self.earlier, circumstances(trainer))
            _go_on_within_epoch(trainer)
            # Only Lightning's own steps can be counted; a module that makes them itself keeps what
            # its checkpoint says.
            module = trainer.lightning_module
            own = not module.automatic_optimization or is_overridden("lr_scheduler_step", module)
            if self._groups is not None and not own:
                self._apply_settings(trainer, self._groups, self.pending)

    def _apply_settings(
        self, trainer: Trainer, wanted: _Groups, pending: Mapping[str, float]
    ) -> None:
        """Bring restored optimizers to these settings, and each schedule to the step reached.

        A schedule is a function of the number of steps, so it is stepped anew. One that follows a
        metric keeps its counts and how often it lowered the rate, as does code without a schedule.
        """
        # Settings of the optimizers, but for how far a plateau has lowered the rate.
        lowered = [_lowered(optimizer) for optimizer in trainer.optimizers]
        for optimizer, groups in zip(trainer.optimizers, wanted, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                rate, first = group["lr"], group.get("initial_lr", group["lr"])
                group.update(copy.deepcopy(settings))
                # One that changed without any schedule was changed by code of the user's own.
                if rate != first and not self._scheduled and not trainer.lr_scheduler_configs:
                    group["lr"] = rate * (group["initial_lr"] / first)
            place_steps(optimizer)
        # A plateau keeps what it has counted; other schedules make their steps anew.
        for config, state in zip(trainer.lr_scheduler_configs, self._schedules, strict=True):
            scheduler, settings = config.scheduler, copy.deepcopy(state)
            if isinstance(scheduler, ReduceLROnPlateau):
                _keep_counts(scheduler, settings)
                shares = lowered[trainer.optimizers.index(scheduler.optimizer)]
                for group, share in zip(scheduler.optimizer.param_groups, shares, strict=True):
                    group["lr"] *= share
                value = pending.get(config.monitor or "")
                if value is not None and _epochs(trainer) % config.frequency == 0:
                    scheduler.step(value)
            elif isinstance(scheduler, LRScheduler):
                made = _steps_made(scheduler, config, trainer)
                scheduler.load_state_dict(settings)
                _replay(scheduler, made)

    def end(self, trainer: Trainer) -> None:
        """Say so if nothing was trained, as where a checkpoint had made all steps."""
        if not self._goes_on:
            who = "this training" if self.pending is None else "the checkpoint"
            made = f"{count_of(trainer.global_step, 'step')} in "
            rank_zero_warn(
                f"nothing was trained: {who} has made {made}"
                f"{count_of(trainer.current_epoch, 'epoch')}, and this training ends there or "
                "before; give more max_epochs, max_steps or batches (--trainer.…)."
            )
