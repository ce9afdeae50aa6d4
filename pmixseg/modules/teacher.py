"""The teacher: a network that is trained on all sequences of a case."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from pmixseg.data.patches import CaseItem
from pmixseg.describe import NOT_NEGATIVE, Ranges
from pmixseg.modules.base import SegmentationModule
from pmixseg.task import Combination
from pmixseg.types import Batch, Latents, Presence


class TeacherModule(SegmentationModule):
    """Train on all acquired modalities; students learn from it.

    ``L_teacher = L_seg + λ_w L_seg(decode(fill(Z, A'))) + Σ weight · term``, the second summand
    only where the anchor's weights are learned: with every modality present nothing is filled, so
    an extra pass through the decoder on a drawn subset A' is where they get their gradient
    (docs/method/anchors.md and docs/method/distillation.md).

    Args:
        fill_weight: λ_w.
        kwargs: see :class:`~pmixseg.modules.base.SegmentationModule`.
    """

    draws = False
    ranges = Ranges(fill_weight=NOT_NEGATIVE)

    def __init__(self, fill_weight: float = 0.5, **kwargs: Any) -> None:
        self.fill_weight = fill_weight
        super().__init__(**kwargs)

    def draw_present(self, batch: Batch) -> Presence:
        """Show everything that was acquired."""
        return batch["acquired"]

    def validation_combinations(self, item: CaseItem) -> list[Combination]:
        """Score on everything that was acquired: what the teacher is trained for."""
        return [self.acquired_names(item)]

    def own_batch(self, batch: Batch) -> Batch:
        """Make the step's batch; ``filled`` is the subset A' of the pass on filled slots."""
        own = super().own_batch(batch)
        if not self._learns_weights:
            return own
        filled = self.sampler.draw(own["key"], own["acquired"], self.modalities)
        return cast(Batch, {**own, "filled": filled})

    @property
    def _learns_weights(self) -> bool:
        return self.anchor is not None and self.anchor.learned and self.fill_weight > 0

    def extra_loss(
        self, latents: Latents, batch: Batch, epoch: int | Tensor, parts: dict[str, Tensor]
    ) -> Tensor:
        """Add λ_w · L_seg of the same encoding, decoded from a drawn subset with filled slots."""
        if "filled" not in batch:
            return super().extra_loss(latents, batch, epoch, parts)
        # Auxiliary decoders of single modalities have seen these latents in the main pass.
        hidden = latents.slots_only().restrict(batch["filled"])
        output = self.decode(hidden)
        parts["seg_filled"] = self.segmentation_loss(output, batch, epoch)
        return self.fill_weight * parts["seg_filled"]

    def anchor_gets_gradient(self) -> bool:
        """Return whether the pass on subsets, which trains the anchor, has a weight."""
        return super().anchor_gets_gradient() and self.fill_weight > 0
