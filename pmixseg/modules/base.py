"""The LightningModule that teacher and student share."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from pmixseg.backbones.base import Backbone
from pmixseg.backbones.layers.bf16_gradients import repair_gradients
from pmixseg.data.keys import make_key
from pmixseg.data.missing import MissingnessSampler
from pmixseg.describe import build, describe
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.execution import seed_device, static_on
from pmixseg.losses.anchors import Anchor
from pmixseg.losses.segmentation import Criterion, DiceCE
from pmixseg.losses.term import Term, TermWeight
from pmixseg.modules.fill import Fill, learned_weights
from pmixseg.modules.scoring import ScoredNetwork
from pmixseg.modules.training.compilation import Compile, CompiledStep, Losses, plan
from pmixseg.modules.training.loss_log import LossLog
from pmixseg.modules.training.optimization import (
    Schedule,
    active_terms,
    callable_from,
    clip_norm,
    complete_gradients,
    every_parameter,
    fuse,
    is_parallel,
    made_by,
    parameter_groups,
    rate_of,
    regroup,
    schedule_from,
    scheduled,
)
from pmixseg.modules.training.resuming import Resuming
from pmixseg.modules.training.trainer_checks import (
    check_batch,
    check_loaders,
    check_parameters,
    check_trainer,
)
from pmixseg.task import BRATS, Task
from pmixseg.types import Batch, Latents, Presence, Scalar, SegOutput


class SegmentationModule(ScoredNetwork):
    """Train and test a backbone with its fill, criterion and terms: the base of all modules.

    Subclass :class:`~pmixseg.TeacherModule` or :class:`~pmixseg.StudentModule` and override
    :meth:`build_backbone` for a network of your own.

    Args:
        task: modalities, labels and regions.
        backbone: the network, or its ``{class_path, init_args}``; by default a
            :class:`~pmixseg.backbones.MultiEncoderUNet`. Its ``modalities`` and ``num_classes``
            are set from the task.
        criterion: segmentation loss; by default Dice + cross-entropy.
        fill: what stands in a missing modality's slot: ``zero``, or the ``anchor`` over the
            modalities shown. ``None``: the anchor wherever modalities can be missing and the
            backbone keeps one slot per modality.
        anchor: the model's anchor P_mix; by default a learned mixture. Callbacks align to it.
        fill_levels: levels that are filled; ``None``: those that a training aligns, or all where
            it aligns none. Checkpoints name what it came to.
        sampler: draws which of the acquired modalities a sample shows.
        optimizer: called with parameter groups.
        scheduler: a :class:`~pmixseg.modules.Schedule` over all steps, or any PyTorch scheduler's
            constructor, stepped per epoch.
        evaluation: windows, conventions and post-processing of validation and test.
        compile: whether ``torch.compile`` makes one graph of the training step (encode, fill,
            decode, criterion and terms), with CUDA graphs where that is possible, and of
            ``encode`` and ``decode`` in evaluation. ``auto``: the step alone, on a GPU, in
            trainings of 3,000 steps or more. Where compiling fails, a warning says so and
            nothing is compiled.

    Raises:
        InputError: an argument that no checkpoint can hold, or a backbone of another task.
    """

    def __init__(
        self,
        task: Task = BRATS,
        backbone: Backbone | None = None,
        criterion: Criterion | None = None,
        fill: Fill | None = None,
        anchor: Anchor | None = None,
        fill_levels: Sequence[int] | None = None,
        sampler: MissingnessSampler | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | Schedule | None = None,
        evaluation: EvaluationSettings | None = None,
        compile: Compile = "auto",
    ) -> None:
        super().__init__(task, backbone, fill, anchor, fill_levels, sampler, evaluation, compile)
        self.criterion: Criterion = build(criterion) or DiceCE()
        self.make_optimizer = callable_from(optimizer)
        if "_lr" in self.__dict__:  # of a subclass that set its rate before this class was made
            self.lr = self.lr
        self.make_scheduler = schedule_from(scheduler)
        if isinstance(self.make_scheduler, functools.partial):
            self.remember(scheduler=self.make_scheduler)  # with the direction of its metric
        self.terms = cast(MutableMapping[str, Term], nn.ModuleDict())
        self.term_weights: dict[str, TermWeight] = {}
        self._step: CompiledStep | None = None
        self._loss_log = LossLog(seldom=False)
        self._callback_terms: set[str] = set()
        self._resuming, self._rate_changed = Resuming(), False
        self.save_hyperparameters(describe(self.init_args))

    # ---------------------------------------------------------------- training

    draws: bool = True
    """Whether a training step may show less than what is acquired."""

    encodes_hidden: bool = False
    """Whether training encodes everything acquired even if no term looks at it."""

    @abstractmethod
    def draw_present(self, batch: Batch) -> Presence:
        """Draw which modalities each training sample shows, ``[B, M]``, from its key alone."""

    def segmentation_loss(self, output: SegOutput, batch: Batch, epoch: int | Tensor) -> Scalar:
        """Compute the segmentation loss in float32, on the network's main output."""
        return self.criterion(output, batch, epoch)

    def with_present(self, batch: Batch) -> Batch:
        """Return a training batch with ``present``, drawn unless it has been.

        The data module asks for it before it moves a batch: a GPU would start forty operations.
        """
        check_batch(self._trainer, batch, self.task)
        drawn = {} if "present" in batch else {"present": self.draw_present(batch)}
        return cast(Batch, {**batch, **drawn})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Draw what the network is shown, then compute the loss."""
        batch = self.own_batch(self.with_present(batch))
        for term in self.terms.values():
            batch = term.prepare(batch)
        weights = {name: w.at(self.current_epoch) for name, w in self.term_weights.items()}
        eager = any(term.eager for term in self.terms.values())
        losses = self.losses if self._step is None or eager else self._step
        total, values, names = losses(batch, self.current_epoch, weights)
        self._loss_log.see(names, values, batch, batch_idx, self)
        return total

    def losses(
        self, batch: Batch, epoch: int | Tensor, weights: Mapping[str, float | Tensor]
    ) -> Losses:
        """Compute the loss of a step: the criterion, plus every term times its weight.

        Terms see the latents before a missing slot is filled. Nothing here asks for a tensor's
        value, so that a compiler can make one graph of it.

        Args:
            batch: with ``present``; see :meth:`own_batch`.
            epoch: 0-based; a tensor where the step is compiled.
            weights: of the terms, in this epoch.
        """
        # What a term may look at and the network may not is encoded, but never decoded.
        encode_all = self.needs_hidden and self.shares_encoding
        latents = self.encode(batch["image"], batch["acquired" if encode_all else "present"])
        if self.terms:
            latents = latents.with_brain(batch["of_task"]["image"])
        read = latents  # by the decoder
        for term in self.terms.values():
            read = term.decoded(read)
        decoded = self.decode_subset(read, batch["present"]) if encode_all else self.decode(read)
        output = replace(decoded, latents=latents)
        parts: dict[str, Tensor] = {"seg": self.segmentation_loss(output, batch, epoch)}
        total = parts["seg"] + self.extra_loss(latents, batch, epoch, parts)
        for name, term in self.terms.items():
            value = parts[name] = term(output, batch)
            for part, number in term.parts.items():
                parts[f"{name}/{part}"] = number
            term.parts = {}  # nothing of a step outlives it
            total = total + weights[name] * value
        if self._trainer is not None and is_parallel(self.trainer):
            total = total + every_parameter(self)
        parts["loss"] = total
        return total, torch.stack([part.detach().float() for part in parts.values()]), tuple(parts)

    @property
    def needs_hidden(self) -> bool:
        """Whether training reads latents of what is acquired and not shown."""
        by_term = any(term.needs_acquired for term in self.terms.values())
        return self.encodes_hidden or self.backbone.needs_acquired or by_term

    def on_validation_start(self) -> None:
        """End a training whose loss is no longer finite before it is validated.

        Raises:
            InputError: its loss is not finite; or see :class:`ScoredNetwork`.
        """
        super().on_validation_start()
        if self.trainer.state.fn == "fit":
            self._loss_log.finite.check(lambda: self.lr)

    def own_batch(self, batch: Batch) -> Batch:
        """Bring a batch of the task into the order of this module's slots, once per step.

        Criteria, terms and the network then read the same columns; ``of_task`` keeps the rest.
        """
        own = {k: self.columns(batch[k]) for k in ("image", "acquired", "present")}
        return cast(Batch, {**batch, **own, "of_task": batch})

    def decode_subset(self, latents: Latents, shown: Presence) -> SegOutput:
        """Segment from the slots ``shown`` of an encoding that may hold more (training only)."""
        return self.decode(latents.restrict(shown))

    def extra_loss(
        self, latents: Latents, batch: Batch, epoch: int | Tensor, parts: dict[str, Tensor]
    ) -> Tensor:
        """Add a further loss on the same encoding, already weighted; 0 here."""
        return latents.features[0].new_zeros((), dtype=torch.float32)

    def on_after_backward(self) -> None:
        """Give parameters that this step did not use a gradient of 0."""
        complete_gradients(self, () if self._trainer is None else self.trainer.optimizers)

    def configure_gradient_clipping(self, optimizer: Optimizer, *how: Any, **named: Any) -> None:
        """Clip as the trainer says; on a GPU the norm in a few operations."""
        most, algorithm = self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm
        # One that was made fused may hold gradients that float16's scaler has still to divide.
        made_fused = optimizer.defaults.get("fused")
        if most and algorithm != "value" and static_on(self.device) and not made_fused:
            clip_norm(optimizer, most)
        else:
            super().configure_gradient_clipping(optimizer, *how, **named)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed torch from (seed, rank, epoch, step): a resumed run repeats the same randomness."""
        key = make_key(self.seed, self.current_epoch, batch_idx)
        seed_device(self.device, (key + self.global_rank) % (1 << 63))

    @property
    def seed(self) -> int:
        """The data module's seed; 0 without one."""
        data = self.trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]  # set by Trainer.fit
        return int(getattr(data, "seed", 0) or 0)

    def on_train_epoch_end(self) -> None:
        """Log the mean losses and learned anchor weights; refuse a loss that was not finite."""
        self._loss_log.finite.check(lambda: self.lr)
        means = self._loss_log.means.settle()
        self.log_dict({f"train/{name}": mean for name, mean in means.items()}, sync_dist=True)
        for level, weights in self.learned_weights.items():
            for name, weight in zip(self.backbone.slots, weights, strict=True):
                self.log(f"anchor/level{level}/{name}", weight, sync_dist=True)

    @property
    def learned_weights(self) -> dict[int, Tensor]:
        """The weights that the anchor has learned, per level that is filled."""
        every = range(len(self.backbone.channels))
        levels = every if self.fill_levels is None else self.fill_levels
        return learned_weights(self.anchor, len(self.backbone.slots), levels)

    # ---------------------------------------------------------------- terms

    def add_term(
        self, name: str, term: Term, weight: TermWeight, *, of_callback: bool = False
    ) -> None:
        """Add a term to the loss, before optimizers exist, in place of an earlier training's.

        Args:
            name: key in log and checkpoint.
            term: a differentiable scalar of a training step.
            weight: its factor in each epoch.
            of_callback: it belongs to an active ``TermCallback`` of this name, which adds it in
                ``setup``: a training without that callback does not have it.

        Raises:
            InputError: a callback's term would replace one of the module's own.
        """
        if of_callback and name in self.terms and name not in self._callback_terms:
            raise InputError(f"the model has a term '{name}'; give the callback's another name.")
        self.terms[name] = term
        self.term_weights[name] = weight
        (self._callback_terms.add if of_callback else self._callback_terms.discard)(name)

    def _drop_earlier_terms(self) -> None:
        """Remove terms of callbacks that an earlier training had, even one that failed at once."""
        now = {getattr(term, "name", None) for term in active_terms(self.trainer)}
        for name in self._callback_terms - now:
            del self.terms[name], self.term_weights[name]
        self._callback_terms &= now

    def aligned_levels(self) -> list[int] | None:
        """List the levels whose latents some term aligns; ``None`` where none does."""
        return sorted({n for term in self.terms.values() for n in term.aligned_levels}) or None

    # ---------------------------------------------------------------- set-up and checks

    def setup(self, stage: str) -> None:
        """Prepare for a training or an evaluation.

        Raises:
            InputError: a callback that would spoil this training without a word.
        """
        super().setup(stage)
        if stage == "fit":
            self.begin_anew()
            self._drop_earlier_terms()
            self.follow_levels(self.aligned_levels())
            check_trainer(self.trainer)
            if self.trainer.checkpoint_callbacks:
                self.payload()  # what no checkpoint can hold is told now, not after an epoch
            self._resuming, self._rate_changed = Resuming(self.trainer), False

    def on_fit_start(self) -> None:
        """Build the training step, and refuse a training that would leave parameters untrained.

        Raises:
            InputError: a trainable parameter that no optimizer has, or learned anchor weights
                that no segmentation gradient reaches.
        """
        if self.anchor is not None and self.anchor.learned and not self.anchor_gets_gradient():
            raise InputError(
                "the anchor's learned weights get no gradient from the segmentation loss of this "
                f"{type(self).__name__} (fill: {self.fill}, fill_levels: {self.fill_levels}), and "
                "would stay uniform; use fill: anchor with missing modalities, or uniform weights."
            )
        super().on_fit_start()
        check_parameters(self, self.trainer)
        self.repairs = repair_gradients(self)
        self._loss_log = LossLog(seldom=static_on(self.device))
        how = plan(self.compile_setting, self.device, self.trainer)
        self._step = None if how is None else CompiledStep(self.losses, how, self)
        if self._rate_changed:  # by LearningRateFinder, which does not know the schedule
            self.trainer.strategy.setup_optimizers(self.trainer)
        self._resuming.begin(self.trainer)

    def on_train_start(self) -> None:
        """Give a resumed training the settings of this call, not those of its checkpoint.

        Raises:
            InputError: its learning-rate schedule ends before the step that was reached; or
                loaders without their data module.
        """
        check_loaders(self.trainer, self.trainer.train_dataloader)
        self._resuming.apply(self.trainer)

    def on_fit_end(self) -> None:
        """Leave torch's layers as they were found, and let go of compiled graphs."""
        self._resuming.end(self.trainer)
        if self._step is not None:
            self._step.release()
        self._step = None
        for repair in self.repairs:
            repair.remove()

    def anchor_gets_gradient(self) -> bool:
        """Return whether the segmentation loss reaches the anchor's weights."""
        return self.fill == "anchor" and self.shows_subsets and self.fill_levels != []

    @property
    def lr(self) -> float:
        """Learning rate of the optimizer, as Lightning's tuner reads and sets it."""
        return float(self.__dict__.get("_lr", rate_of(self.make_optimizer)))

    @lr.setter
    def lr(self, rate: float) -> None:
        self.__dict__["_lr"] = float(rate)
        if "make_optimizer" in self.__dict__:  # not in a subclass that sets it before this class
            self.make_optimizer = functools.partial(self.make_optimizer, lr=float(rate))
            self.remember(optimizer=self.make_optimizer, lr=float(rate))
            self._rate_changed = True

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer, which shrinks weights alone, and its schedule."""
        optimizer = fuse(made_by(self.make_optimizer, parameter_groups(self), "optimizer"))
        return scheduled(optimizer, self.make_scheduler, self._trainer)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write what :func:`pmixseg.load` needs, and what a resumed training does."""
        super().on_save_checkpoint(checkpoint)
        if self.is_fitting:
            self._resuming.write(checkpoint, self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume with the same terms; test, validate and predict without any."""
        super().on_load_checkpoint(checkpoint)
        if self.is_fitting:
            self._resuming.read(checkpoint)
            for state in checkpoint.get("optimizer_states", ()):
                regroup(state, self)
