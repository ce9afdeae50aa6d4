"""Pmix alignment as a callback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pmixseg.callbacks.term import TermCallback
from pmixseg.describe import build
from pmixseg.errors import InputError
from pmixseg.losses.alignment import Alignment
from pmixseg.losses.anchors import Anchor
from pmixseg.losses.distances import KL, Distance
from pmixseg.losses.official import OfficialAlignment
from pmixseg.losses.term import Term
from pmixseg.modules.base import SegmentationModule
from pmixseg.types import Batch, Latents, Scalar, SegOutput


class PmixAlignment(TermCallback):
    """Pull every modality's latents, one by one, towards the anchor P_mix.

    ``L_align = Σ_l (1/|A|) Σ_{m∈A} D(f_m^l, sg P^l)`` with the anchor over everything acquired
    (docs/method/anchors.md and docs/method/alignment.md; Mind the Gap, arXiv 2409.19366).

    Args:
        weight: λ_a; 0 switches alignment off.
        anchor: an anchor of the callback's own; by default the model's, borrowed: it stays a part
            of the model.
        distance: D, by name or as an object with arguments.
        levels: levels that are aligned, 0 the finest; by default the bottleneck and its neighbour.
        projection: ``linear``: a 1x1x1 map per modality before the distance; none by default.
        detach: what is held still: the ``anchor``, ``none``, or the ``features``.
        sample: with the distance ``kl``: in training, decode latents drawn from their Gaussians
            (reparametrised) instead of the encoders' own; at test the decoder reads the latter.
        official: the loss of one of the authors' public snippets, for comparison; it has its own
            distance, level and stop-gradients, so these arguments must be left alone.
        start_epoch: first epoch with a weight above 0.
        warmup_epochs: epochs over which the weight rises linearly.
        name: key in log and checkpoint.

    Raises:
        InputError: ``official`` beside arguments it would ignore; in ``setup``: a backbone that
            mixes modalities at the input; a model without an anchor; learned weights that no
            segmentation loss would reach; unknown levels.
    """

    def __init__(
        self,
        weight: float = 0.0,
        anchor: Anchor | None = None,
        distance: str | Distance = "nmse",
        levels: Sequence[int] | None = None,
        projection: Literal["linear"] | None = None,
        detach: Literal["anchor", "none", "features"] = "anchor",
        start_epoch: int = 0,
        warmup_epochs: int = 0,
        sample: bool = False,
        official: OfficialAlignment | None = None,
        name: str = "align",
    ) -> None:
        super().__init__(name, weight, start_epoch, warmup_epochs)
        given = (distance, levels, projection, detach, anchor, sample)
        if official is not None and given != ("nmse", None, None, "anchor", None, False):
            raise InputError(
                f"{name}.official is a whole loss, and would ignore the distance, levels, "
                "projection, detach, anchor or sample that is given as well; leave it out."
            )
        self.official: OfficialAlignment | None = build(official)
        self.anchor: Anchor | None = build(anchor)
        self.distance: str | Distance = build(distance)
        self.levels = levels
        self.projection = projection
        self.detach = detach
        self.sample = sample

    def build_term(self, module: SegmentationModule) -> Term:
        """See :class:`TermCallback`."""
        backbone = module.backbone
        separate = backbone.slots == backbone.modalities
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
            owned = self.anchor is not None
            return AlignmentTerm(self.official, self._anchor_for(module), owned=owned)
        count = len(backbone.channels)
        levels = range(max(count - 2, 0), count) if self.levels is None else self.levels
        anchor = self._anchor_for(module)
        alignment = Alignment(
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
        owned = self.anchor is not None
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

    Args:
        alignment: the loss.
        anchor: what is aligned to; ``None`` for a loss over one fused latent.
        owned: the anchor belongs to this term; otherwise it is the module's and must not be
            registered twice.
        sample: the decoder reads latents drawn from the distance's Gaussians.
    """

    needs_acquired = True

    def __init__(
        self,
        alignment: Alignment | OfficialAlignment,
        anchor: Anchor | None,
        *,
        owned: bool,
        sample: bool = False,
    ) -> None:
        super().__init__()
        self.alignment = alignment
        self.anchor = anchor if owned else None
        # A tuple hides the borrowed module from nn.Module, so that it is registered once only.
        self._borrowed = (anchor,)
        self.sample = sample
        self.aligned_levels = alignment.levels

    def decoded(self, latents: Latents) -> Latents:
        """Samples of the aligned levels, where asked for."""
        if not self.sample:
            return latents
        assert isinstance(self.alignment, Alignment)  # an official loss has no Gaussians
        return self.alignment.sample(latents)

    def forward(self, output: SegOutput, batch: Batch) -> Scalar:
        """See :class:`~pmixseg.losses.term.Term`."""
        latents = output.latents
        if self._borrowed[0] is None:
            shown = latents.usable[0]
            return self.alignment(latents, None, shown, shown)
        return self.alignment(latents, self._borrowed[0], batch["present"], batch["acquired"])
