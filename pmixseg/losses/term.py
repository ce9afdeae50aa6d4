"""The interface of a loss term that a callback adds to the training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from pmixseg.types import Batch, Latents, Scalar, SegOutput


class Term(nn.Module, ABC):
    """Add a differentiable number to the loss of every training step.

    A term lives in ``module.terms[name]``, so that its parameters reach the optimizer and the
    checkpoint, and is evaluated inside the module's ``training_step``: inside DDP's forward and
    autocast. It must be finite from the first step.

    Attributes:
        needs_acquired: the term looks at latents that the network itself is not shown; the module
            then encodes everything acquired (training only).
        aligned_levels: levels whose latents it aligns; the module fills these by default.
        eager: the next step must not be part of a compiled graph.
        parts: named summands of the last value, for the log; detached.
    """

    __call__: Callable[..., Scalar]  # of forward, with its type
    needs_acquired: bool = False
    aligned_levels: tuple[int, ...] = ()
    eager: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Tensor] = {}

    @abstractmethod
    def forward(self, output: SegOutput, batch: Batch) -> Scalar:
        """Return the value of the term.

        Args:
            output: the network's output; ``output.latents`` are the raw latents before any fill,
                their ``usable`` tells which slots were encoded, their ``brain`` which voxels
                count.
            batch: the batch, with ``present`` (what the network was shown) and ``acquired``, both
                ``[B, M]`` in the order of the latents' slots; ``of_task`` has all modalities.
        """

    def prepare(self, batch: Batch) -> Batch:
        """Add to a batch what must not be computed in a compiled step; the batch itself here.

        Called before every training step: for random draws, and for what is read off names.
        """
        return batch

    def decoded(self, latents: Latents) -> Latents:
        """Return the latents that the decoder reads in a training step; unchanged in this class.

        Terms are given the latents of the encoders all the same.
        """
        return latents


@dataclass
class TermWeight:
    """Say how much a term counts in each epoch: 0 at first, then a linear warm-up.

    The first warm-up epoch already counts a share.

    Example:
        >>> schedule = TermWeight(0.4, start_epoch=1, warmup_epochs=2)
        >>> [schedule.at(e) for e in range(5)]
        [0.0, 0.2, 0.4, 0.4, 0.4]
    """

    weight: float
    start_epoch: int = 0
    warmup_epochs: int = 0

    def at(self, epoch: int) -> float:
        """Return the weight in ``epoch``."""
        if epoch < self.start_epoch:
            return 0.0
        done = epoch - self.start_epoch + 1
        return self.weight * min(done / max(self.warmup_epochs, 1), 1.0)
