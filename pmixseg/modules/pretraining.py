"""Masked pre-training: fill in hidden blocks and sequences, before any label is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pmixseg.data.keys import uniform
from pmixseg.data.missing import MissingnessSampler, UniformSizes
from pmixseg.data.patches import CaseItem
from pmixseg.describe import COUNT, SHARE, Ranges
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import CasePrediction
from pmixseg.evaluation.prediction.segmentation import Segmentation
from pmixseg.losses.term import Term, TermWeight
from pmixseg.modules.student import StudentModule
from pmixseg.task import Combination
from pmixseg.types import Batch, Image, Keys, Scalar, SegOutput, full_precision

NAME = "reconstruct"
"""Name of the term, in log and checkpoint."""
UNFINISHED = (
    "a checkpoint of MaskedPretraining cannot segment; first train a student or teacher that "
    "begins with its weights (--init_from; in Python pmixseg.modules.checkpoint.restore)."
)


class Reconstruction(Term):
    r"""Squared error of every acquired sequence, from the network's output.

    .. math:: L = \frac{1}{|A|} \sum_{m \in A} \operatorname{mean} (W y + b - x)_m^2

    with y the network's output ``[B, C, D, H, W]``, W a 1x1x1 convolution to the M sequences and A
    what was acquired: hidden sequences and hidden blocks count as well as visible ones.
    """

    def __init__(self, num_classes: int, modalities: int) -> None:
        super().__init__()
        self.head = nn.Conv3d(num_classes, modalities, 1)
        self.whole: Image | None = None

    def forward(self, output: SegOutput, batch: Batch) -> Scalar:
        """Return the squared error over every acquired sequence of the image before hiding."""
        if self.whole is None:
            raise RuntimeError("Reconstruction needs the whole image; set `whole` before the step.")
        # Sums over a million voxels do not fit half precision.
        rebuilt, whole = full_precision(self.head(output.logits)), full_precision(self.whole)
        error = (rebuilt - whole).square().mean((2, 3, 4))
        acquired = batch["acquired"].to(error.dtype)
        mean: Tensor = ((error * acquired).sum(1) / acquired.sum(1).clamp_min(1)).mean()
        return mean


def hide_blocks(image: Image, keys: Keys, block: int, share: float) -> Image:
    """Set a share of the cubes of every sequence to 0, each sequence its own.

    The grid of cubes begins at the first voxel; the last ones may be cut off. What is hidden
    follows from the keys alone; the share is rounded down, so that one is left.

    Example:
        >>> image = torch.ones(1, 2, 4, 4, 4)
        >>> hide_blocks(image, torch.tensor([7]), block=2, share=0.75).mean((2, 3, 4)).tolist()
        [[0.25, 0.25]]
    """
    grid = [-(-side // block) for side in image.shape[2:]]
    modalities, cubes = image.shape[1], grid[0] * grid[1] * grid[2]
    drawn = uniform(keys, "blocks", modalities * cubes).view(-1, modalities, cubes)
    # Ranks of distinct numbers: exactly so many cubes, whatever was drawn.
    shown = drawn.argsort(2).argsort(2) >= int(share * cubes)
    mask = shown.view(-1, modalities, *grid).to(image.device, non_blocking=True)
    for axis, side in enumerate(image.shape[2:], start=2):
        mask = mask.repeat_interleave(block, axis).narrow(axis, 0, side)
    return image * mask


class MaskedPretraining(StudentModule):
    """Train a backbone to fill in what is hidden from it, without labels.

    Of each sample a number of sequences, then which ones, is hidden whole, and of those that are
    left a share of cubes; the network's output, through one 1x1x1 convolution, is compared with all
    acquired sequences (:class:`Reconstruction`). The checkpoint starts a teacher or student of the
    same backbone: ``pmixseg fit … --init_from pretrained.ckpt``. The convolution stays behind.

    Args:
        block: side of a cube in voxels.
        share: of the cubes that are hidden, in [0, 1).
        sampler: which sequences are left; by default
            :class:`~pmixseg.data.missing.UniformSizes`.
        kwargs: see :class:`~pmixseg.modules.base.SegmentationModule`; the criterion is not used.

    Raises:
        InputError: ``block`` below 1 or ``share`` out of range; validation, test or prediction.

    Source: Liu et al., M3AE (AAAI 2023; ccarliu/m3ae at fdb2800): cubes of 16, 87.5 %, 0 to 3 of 4
    sequences. Differs: what is hidden is 0 instead of a learned template of the whole volume
    (35.7 M numbers tied to one grid), so their penalty on the template has no counterpart.
    """

    ranges = Ranges(block=COUNT, share=SHARE)

    def __init__(
        self,
        block: int = 16,
        share: float = 0.875,
        sampler: MissingnessSampler | None = None,
        **kwargs: Any,
    ) -> None:
        self.block, self.share = block, share
        super().__init__(sampler=sampler or UniformSizes(), **kwargs)
        term = Reconstruction(self.num_classes, len(self.modalities))
        self.add_term(NAME, term, TermWeight(1.0))

    def own_batch(self, batch: Batch) -> Batch:
        """Hide blocks from the network; keep the whole image for the comparison."""
        own = super().own_batch(batch)
        cast(Reconstruction, self.terms[NAME]).whole = own["image"]
        own["image"] = hide_blocks(own["image"], own["key"], self.block, self.share)
        return own

    def segmentation_loss(self, output: SegOutput, batch: Batch, epoch: int | Tensor) -> Scalar:
        """Return 0: no label is read."""
        return output.logits.new_zeros((), dtype=torch.float32)

    def on_fit_start(self) -> None:
        """Refuse a pre-training that would validate."""
        if self.trainer.limit_val_batches:
            raise InputError(
                "MaskedPretraining has nothing to validate; use limit_val_batches 0 "
                "(--trainer.limit_val_batches), and take checkpoints/last.ckpt."
            )
        super().on_fit_start()

    def predict_item(
        self, item: CaseItem, combinations: Sequence[Combination]
    ) -> Iterator[CasePrediction]:
        """Refuse: nothing was trained to segment."""
        raise InputError(UNFINISHED)

    def segment(self, *args: Any, **kwargs: Any) -> Segmentation:
        """Refuse: nothing was trained to segment."""
        raise InputError(UNFINISHED)
