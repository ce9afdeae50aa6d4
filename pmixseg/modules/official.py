"""The authors' public snippet of July 2025 as a module, faults included: for comparison only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from pmixseg.errors import InputError
from pmixseg.losses.anchors import MixtureAnchor
from pmixseg.losses.official import July2025Anchor, fill_july_2025
from pmixseg.modules.student import StudentModule
from pmixseg.types import Latents, Presence, SegOutput


class July2025Student(StudentModule):
    """Train a student with the anchor and the fill of ``official-2025-07``.

    Its fill is not the same rule in training and at test, unlike that of every other module here:
    see :func:`~pmixseg.losses.official.fill_july_2025`. Train it with
    ``align.official: July2025Alignment``.

    Args:
        combination: see :class:`~pmixseg.StudentModule`.
        kwargs: see :class:`~pmixseg.modules.base.SegmentationModule`; ``fill``, ``anchor`` and
            ``fill_levels`` are the snippet's.

    Raises:
        InputError: a backbone that mixes modalities at the input.

    Source: docs/method/snippets.md.
    """

    encodes_hidden = True

    def __init__(self, combination: str | Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(
            combination, fill="anchor", anchor=July2025Anchor(), fill_levels=(0,), **kwargs
        )
        if self.backbone.slots != self.backbone.modalities or not self.shares_encoding:
            raise InputError(
                f"{type(self).__name__} fills one slot per modality, but "
                f"{type(self.backbone).__name__} mixes modalities while encoding; use a backbone "
                "with independent encoders."
            )

    def decode(self, latents: Latents) -> SegOutput:
        """Return the snippet's rule at test: slots times un-normalised weights."""
        ready = self._filled(latents, latents.usable[0], training=False)
        return replace(self._decode(ready), latents=latents)

    def decode_subset(self, latents: Latents, shown: Presence) -> SegOutput:
        """Return the snippet's rule in training: hidden slots hold a mixture that saw them."""
        return self._decode(self._filled(latents, shown, training=True))

    def _filled(self, latents: Latents, shown: Presence, *, training: bool) -> Latents:
        return fill_july_2025(latents, shown, cast(MixtureAnchor, self.anchor), training)
