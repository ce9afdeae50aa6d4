"""Distillation by contrast: one case close, others apart."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from pmixseg.describe import POSITIVE, Ranges
from pmixseg.losses.distances import mean_over_shown
from pmixseg.losses.distillation.pairing import LatentLoss, Pair, brain_of, mean_latent, mean_vector
from pmixseg.losses.ranks import gather_constants
from pmixseg.types import Batch, Brain, Features, Scalar, SegOutput


def case_numbers(case_id: Sequence[str]) -> Int64[Tensor, " b"]:
    """Return a number per case, the same wherever its name is the same.

    Two names share one with a chance of 2⁻³².
    """
    return torch.tensor([zlib.crc32(case.encode()) for case in case_id])


class ContrastiveMatch(LatentLoss):
    r"""Pull embeddings of the same case together, and push those of other cases apart.

    .. math:: L = \operatorname{mean}_i \left[ \tfrac12 \operatorname{mean}_{j: same} d_{ij}^2 +
              \tfrac12 \operatorname{mean}_{j: other} \max(0, \text{margin} - d_{ij})^2 \right]

    :math:`d_{ij}` is the distance between the student's embedding of sample i and the teacher's of
    sample j: means over brain voxels of h(mean shown latent) and of the anchor, scaled to length
    1. Samples of all processes are compared. Cases are identified by ``batch["case"]``, or by
    ``case_id`` where that is not given.

    Args:
        weight: λ.
        margin: as above; distances lie in [0, 2].
        strides: strides that are compared; the coarsest that both have if not given.

    Preset ``pmkl``: 0.5, margin 1.

    Source: Hadsell et al. (CVPR 2006); Chen et al., PMKL (IEEE TMI 2022).
    """

    compares_cases = True

    ranges = Ranges(margin=POSITIVE)

    def __init__(
        self, weight: float = 0.5, margin: float = 1.0, strides: Sequence[int] | None = None
    ) -> None:
        super().__init__(weight, strides)
        self.margin = margin

    def compare_level(
        self, student: SegOutput, teacher: SegOutput, batch: Batch, pair: Pair
    ) -> Scalar:
        """Return the loss of one level."""
        features, shown = self.student_latents(student, batch, pair)
        brain = brain_of(student, pair.student)
        mine = _embed(self.to_teacher(mean_latent(features, shown), pair), brain)
        theirs = gather_constants(_embed(self.teacher_anchor(teacher, pair), brain))
        case = batch["case"] if "case" in batch else case_numbers(batch["case_id"]).to(mine.device)
        same = case[:, None] == gather_constants(case)[None]
        squared = (mine[:, None] - theirs[None]).square().sum(2)
        # √ has no slope at 0; the shift is far below any distance that matters.
        apart = (self.margin - (squared + 1e-12).sqrt()).clamp_min(0).square()
        return 0.5 * (mean_over_shown(squared, same) + mean_over_shown(apart, ~same))


def _embed(features: Features, brain: Brain) -> Tensor:
    means = mean_vector(features, brain)[:, 0]
    return means * (means.square().sum(1, keepdim=True) + 1e-12).rsqrt()
