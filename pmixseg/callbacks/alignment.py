"""Alignment as a callback: pull every sequence's latents towards the anchor P_mix in training."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any, Literal, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from pmixseg.borrowed import Borrowed
from pmixseg.callbacks.gradient_ratio import GradientRatio
from pmixseg.callbacks.term import TermCallback
from pmixseg.callbacks.without_effect import settings_without_effect, unmoved_weights
from pmixseg.describe import COUNT, POSITIVE, Ranges, build
from pmixseg.errors import InputError
from pmixseg.losses.alignment import AlignmentLoss, resolve_levels
from pmixseg.losses.anchors import Anchor, MixtureAnchor
from pmixseg.losses.distances import KL, Distance, distance_named
from pmixseg.losses.official import OfficialAlignment
from pmixseg.losses.ranks import world_size
from pmixseg.losses.term import Term
from pmixseg.modules.base import SegmentationModule
from pmixseg.modules.scoring import EQUAL
from pmixseg.modules.training.loss_log import gradient_scaler
from pmixseg.types import Batch, Latents, Scalar, SegOutput


class PmixAlignment(TermCallback):
    """Pull every modality's latents, one by one, towards the anchor P_mix.

    ``L_align = Σ_l (1/|A|) Σ_{m∈A} D(f_m^l, sg P^l)`` with the anchor over everything acquired
    (docs/method/anchors.md and docs/method/alignment.md; Mind the Gap, arXiv 2409.19366).

    Args:
        weight: λ_a; 0 switches alignment off.
        ratio: instead of a weight, what the gradient of the alignment at the aligned latents shall
            be relative to that of the segmentation loss: 0.1 means a tenth. It is measured over
            the first ``ratio_steps`` steps, in which nothing is aligned; the weight that it
            becomes is then fixed, and logged as ``align/weight``.
        ratio_steps: see ``ratio``.
        anchor: an anchor of the callback's own; by default the model's, borrowed: it stays a part
            of the model.
        distance: D, by name or as an object with arguments; by default ``case_nce``, which closes
            the gap and keeps the features, while ``nmse`` collapses them
            (docs/results/studies.md, E1).
        levels: levels that are aligned, 0 the finest; by default the bottleneck and its neighbour.
        projection: ``linear``: a 1x1x1 map per modality before the distance; none by default.
        detach: what receives no gradient: the ``anchor``, ``none``, or the ``features``.
        sample: with the distance ``kl``: in training, decode latents drawn from their Gaussians
            (reparametrised) instead of the encoders' own; at test the decoder reads the latter.
        official: the loss of one of the authors' public snippets, for comparison; it has its own
            distance, level and stop-gradients, so these arguments must be left alone.
        start_epoch: first epoch with a weight above 0.
        warmup_epochs: epochs over which the weight rises linearly.
        name: key in log and checkpoint.

    Raises:
        InputError: ``official`` beside arguments it would ignore; an unknown distance; in
            ``setup``: a backbone that mixes modalities at the input; a model without an anchor;
            learned weights that no segmentation loss would reach; unknown levels.
    """

    ranges = Ranges(ratio=POSITIVE, ratio_steps=COUNT)

    def __init__(
        self,
        weight: float = 0.0,
        anchor: Anchor | None = None,
        distance: str | Distance = "case_nce",
        levels: Sequence[int] | None = None,
        projection: Literal["linear"] | None = None,
        detach: Literal["anchor", "none", "features"] = "anchor",
        start_epoch: int = 0,
        warmup_epochs: int = 0,
        sample: bool = False,
        official: OfficialAlignment | None = None,
        ratio: float | None = None,
        ratio_steps: int = 16,
        name: str = "align",
    ) -> None:
        super().__init__(name, weight, start_epoch, warmup_epochs)
        if ratio is not None and weight:
            raise InputError(
                f"both {name}.weight ({weight}) and {name}.ratio ({ratio}) are given; the ratio "
                "becomes a weight, so give one of them."
            )
        self.ratio = None if ratio is None else GradientRatio(ratio, ratio_steps, name)
        settings = {
            "distance": distance,
            "levels": levels,
            "projection": projection,
            "detach": detach,
            "anchor": anchor,
            "sample": sample,
        }
        defaults = signature(PmixAlignment).parameters
        ignored = [key for key, value in settings.items() if value != defaults[key].default]
        if official is not None and ignored:
            raise InputError(
                f"{name}.official is a whole loss, and would ignore the {' and '.join(ignored)} "
                "that is given as well; leave it out."
            )
        self.official: OfficialAlignment | None = build(official)
        self.anchor: Anchor | None = build(anchor)
        self.distance = distance if isinstance(distance, str) else build(distance)
        if isinstance(self.distance, str):
            distance_named(self.distance, name)  # a wrong one is told where the weight is 0, too
        self.levels = levels
        self.projection = projection
        self.detach = detach
        self.sample = sample

    @property
    def active(self) -> bool:
        """Whether there is a weight, or a ratio that becomes one."""
        return self.weight > 0 or self.ratio is not None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the term, and warn of settings without effect.

        Raises:
            InputError: see :class:`TermCallback`; or a ratio that cannot be measured.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        module = cast(SegmentationModule, pl_module)
        if not self.active:
            if self.levels is not None:  # a wrong one is told where the weight is 0, too
                resolve_levels(self.levels, len(module.backbone.channels))
            return
        term = cast(AlignmentTerm, module.terms[self.name])
        loss, anchor = term.alignment, term.borrowed.value
        if isinstance(loss, AlignmentLoss) and anchor is not None:
            for sentence in settings_without_effect(self.name, loss, anchor, module, self.sample):
                rank_zero_warn(sentence)
        if self.ratio is not None:
            if not term.aligned_levels:
                raise InputError(
                    f"{self.name}.ratio is measured at latents of single modalities, which "
                    f"{type(term.alignment).__name__} has none of; give {self.name}.weight."
                )
            self.ratio.start()
            term.measured = (self.ratio, Borrowed(module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse learned weights of a level that is aligned and not filled: nothing trains them."""
        module = cast(SegmentationModule, pl_module)
        anchor = module.anchor
        borrowed = self.active and self.official is None and self.anchor is None
        if not borrowed or not isinstance(anchor, MixtureAnchor) or anchor.shared:
            return
        levels = cast(AlignmentTerm, module.terms[self.name]).aligned_levels
        untrained = [level for level in levels if level not in module.learned_weights]
        if anchor.learned and untrained:
            raise InputError(
                f"{self.name} aligns the levels {list(levels)}, but {untrained} are not filled "
                f"(fill_levels: {module.fill_levels}), so that no segmentation loss trains the "
                "learned weights of the anchor there; fill them too, or give an anchor with "
                "weights: uniform or shared: true."
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Mark the steps in which the gradient ratio is measured."""
        if self.ratio is None:
            return
        term = cast(AlignmentTerm, cast(SegmentationModule, pl_module).terms[self.name])
        started = trainer.current_epoch >= self.start_epoch
        term.eager = started and self.ratio.measuring
        self._take_weight()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the measurement of this step."""
        if self.ratio is not None:
            self.ratio.end_step()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the weight that the ratio has become."""
        if self.ratio is not None:
            self._take_weight()
            pl_module.log(f"{self.name}/weight", self.schedule.weight, **EQUAL)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the learned weights of the anchor did not move."""
        if not self.active or self.anchor is not None:
            return
        sentence = unmoved_weights(self.name, cast(SegmentationModule, pl_module))
        if sentence is not None:
            rank_zero_warn(sentence)

    def _take_weight(self) -> None:
        if self.ratio is not None and not self.ratio.measuring and not self.schedule.weight:
            self.schedule.weight = self.ratio.weight()

    # Not in state_dict: of two with one name Lightning would complain before we do.
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what was measured, so that a resumed training has the same weight."""
        if self.ratio is not None:
            checkpoint["callbacks"][self.state_key] = self.ratio.state()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on measuring, or with what was measured."""
        if self.ratio is not None and (state := checkpoint["callbacks"].get(self.state_key)):
            self.ratio.load(state)

    def build_term(self, module: SegmentationModule) -> Term:
        """Build the alignment term for a module."""
        backbone, owned = module.backbone, self.anchor is not None
        separate = backbone.slots == backbone.modalities
        # The authors' snippet of April 2025 splits one latent; all else needs one per modality.
        if self.official is not None and self.official.fused:
            if separate:
                raise InputError(
                    f"{type(self.official).__name__} takes one fused latent apart, and "
                    f"{type(backbone).__name__} has one latent per modality; use EarlyFusion."
                )
            return AlignmentTerm(self.official, None, owned=False)
        if not separate:
            raise InputError(
                f"{type(backbone).__name__} mixes the modalities at its input, so there are no "
                "latents to align one by one; use a backbone with one encoder per modality."
            )
        if self.official is not None:
            return AlignmentTerm(self.official, self._anchor_for(module), owned=owned)
        # By default the two coarsest levels.
        count = len(backbone.channels)
        levels = range(max(count - 2, 0), count) if self.levels is None else self.levels
        anchor = self._anchor_for(module)
        alignment = AlignmentLoss(
            self.distance,
            channels=backbone.channels,
            modalities=backbone.slots,
            levels=list(levels),
            projection=self.projection,
            detach=self.detach,
        )
        if self.sample and not isinstance(alignment.distance, KL):
            raise InputError(
                f"{self.name}.sample draws from Gaussian latents, which only the distance 'kl' "
                f"has; use --{self.name}.distance kl, or do not sample."
            )
        return AlignmentTerm(alignment, anchor, owned=owned, sample=self.sample)

    def _anchor_for(self, module: SegmentationModule) -> Anchor:
        if self.anchor is None:
            if module.anchor is None:
                raise InputError(
                    f"this {type(module).__name__} has no anchor (fill: {module.fill}) that "
                    f"{self.name} could borrow; give {self.name}.anchor, or the model fill: anchor."
                )
            return module.anchor
        if self.anchor.learned:
            raise InputError(
                f"{self.name}.anchor has learned weights, which no segmentation loss would train "
                "there; give the learned anchor to the model (model.anchor) and leave "
                f"{self.name}.anchor empty, or use weights: uniform."
            )
        self.anchor.bind(module.backbone.slots, len(module.backbone.channels))
        return self.anchor


class AlignmentTerm(Term):
    """The alignment loss of one step.

    Without an anchor the loss is over one fused latent. An anchor that is not ``owned`` is the
    module's, and must not be registered twice. With ``sample`` the decoder reads latents drawn from
    the distance's Gaussians.
    """

    needs_acquired = True

    def __init__(
        self,
        alignment: AlignmentLoss | OfficialAlignment,
        anchor: Anchor | None,
        *,
        owned: bool,
        sample: bool = False,
    ) -> None:
        super().__init__()
        self.alignment = alignment
        self.anchor = anchor if owned else None
        self.borrowed = Borrowed(anchor)
        self.sample = sample
        self.aligned_levels = alignment.levels
        self.measured: tuple[GradientRatio, Borrowed[SegmentationModule]] | None = None
        self._begun = False

    def prepare(self, batch: Batch) -> Batch:
        """Refuse, at the first step, batches that the distance has no meaning for."""
        distance = getattr(self.alignment, "distance", None)
        samples = len(batch["image"]) * world_size()
        if not self._begun and distance is not None and samples < distance.smallest_batch:
            raise InputError(
                f"the distance '{distance.name}' compares patients, but a step has {samples} "
                f"sample; use a batch_size of {distance.smallest_batch} or more "
                "(--data.batch_size), or another distance."
            )
        self._begun = True
        return batch

    def decoded(self, latents: Latents) -> Latents:
        """Draw samples of the aligned levels, where asked for."""
        if not self.sample:
            return latents
        assert isinstance(self.alignment, AlignmentLoss)  # an official loss has no Gaussians
        return self.alignment.sample(latents)

    def forward(self, output: SegOutput, batch: Batch) -> Scalar:
        """Return the alignment loss of one batch."""
        latents = output.latents
        if self.borrowed.value is None:
            shown = latents.usable[0]
            return self.alignment(latents, None, shown, shown)
        value = self.alignment(latents, self.borrowed.value, batch["present"], batch["acquired"])
        if self.eager and self.measured is not None and value.requires_grad:
            ratio, module = self.measured
            features = [latents.features[level] for level in self.aligned_levels]
            loss = module.value.segmentation_loss(output, batch, module.value.current_epoch)
            ratio.measure(loss, value, features, gradient_scaler(module.value.trainer))
        return value
