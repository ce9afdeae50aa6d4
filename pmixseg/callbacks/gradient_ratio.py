"""Choose the weight of a term by its gradient, measured over the first steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pmixseg.errors import InputError
from pmixseg.losses.ranks import sum_over_ranks
from pmixseg.types import Scalar

INERT = 1e-3
"""Gradients smaller than this, relative to the segmentation's, are those of no loss at all.
(Measured at the start of a small network: 4e-5 for ``vid`` on complete data, 0.3 to 1.8 for every
other distance.)"""


class GradientRatio:
    r"""Find the weight that gives a term a set share of the segmentation's gradient.

    .. math:: \lambda = r \cdot \frac{\sum_t \| \partial L_\mathrm{seg} / \partial Z_t \|}
                               {\sum_t \| \partial L_\mathrm{term} / \partial Z_t \|}

    over the first steps t, with Z the latents of the aligned levels. The same r then asks equally
    much of terms whose values differ by orders of magnitude.

    Args:
        ratio: r.
        steps: how many steps are measured, in which the term has the weight 0.
        name: of the term, for messages.
    """

    def __init__(self, ratio: float, steps: int, name: str) -> None:
        self.ratio, self.steps, self.name = ratio, steps, name
        self.squares: list[Tensor] = []
        self.pending: Tensor | None = None

    @property
    def measuring(self) -> bool:
        """Whether the next step is still measured."""
        return len(self.squares) < self.steps

    def start(self) -> None:
        """Forget the measurements of an earlier training."""
        self.squares, self.pending = [], None

    def measure(
        self,
        segmentation: Scalar,
        term: Scalar,
        latents: Sequence[Tensor],
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Keep the squared gradients of a step at the latents; asks the device for nothing.

        The latents are those of the aligned levels. In a training in float16 gradients at latents
        are too small to be held without its scaler, which scales both losses alike, and cancels.
        """
        both = []
        for loss in (segmentation, term):
            scaled = loss if scaler is None else scaler.scale(loss)
            gradients = torch.autograd.grad(
                scaled, list(latents), retain_graph=True, allow_unused=True
            )
            squares = [g.float().square().sum() for g in gradients if g is not None]
            both.append(torch.stack(squares).sum() if squares else loss.detach().float() * 0)
        self.pending = torch.stack(both)

    def end_step(self) -> None:
        """Join what the processes measured in a step; one in which float16 overflows is empty."""
        if self.pending is not None:
            squares = sum_over_ranks(self.pending)
            self.squares.append(torch.where(squares.isfinite().all(), squares, 0.0))
            self.pending = None

    def weight(self) -> float:
        """Return the weight, once all steps are measured."""
        segmentation, term = (
            torch.stack([s.double().cpu() for s in self.squares]).sqrt().sum(0).tolist()
        )
        if not term > INERT * segmentation > 0:
            raise InputError(
                f"{self.name}.ratio cannot be reached: at the latents, the gradient of {self.name} "
                f"is {term:.1e}, that of the segmentation loss {segmentation:.1e}, so no weight "
                f"gives it that share; use another distance or anchor, or {self.name}.weight."
            )
        return self.ratio * float(segmentation) / float(term)

    def state(self) -> dict[str, Any]:
        """Return what a resumed training needs, in primitives."""
        return {"ratio": self.ratio, "squares": [s.tolist() for s in self.squares]}

    def load(self, state: dict[str, Any]) -> None:
        """Take over the measurements of a checkpoint; the ratio is that of this training."""
        self.squares = [torch.tensor(s) for s in state["squares"]][: self.steps]
