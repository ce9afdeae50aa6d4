r"""Contrast between places and patients: a latent must know its own anchor among others."""

from __future__ import annotations

import torch
from torch import Tensor

from pmixseg.describe import COUNT, POSITIVE, Ranges
from pmixseg.losses.anchors import Anchor
from pmixseg.losses.distances.contract import Detach, Distance, LevelLatents, PerSlot, detached
from pmixseg.losses.distances.moments import unit
from pmixseg.losses.distances.points import brain_points, take
from pmixseg.losses.ranks import gather_constants, world_size
from pmixseg.types import Presence


class CaseNCE(Distance):
    r"""Contrast each modality's latent with the anchor at the same place: ``case_nce``.

    With :math:`r` the latents minus the mean over samples and acquired modalities at the same
    voxel position, divided by the channel's standard deviation; :math:`a_{m,v}` the unit vector of
    modality m at voxel v; and :math:`b_u` the unit vector of the anchor over r at u:

    .. math:: D_m = \operatorname{mean}_v \frac{1}{\log n}
                    \Bigl(- \log \frac{e^{a_{m,v} \cdot b_v / T}}{\sum_u e^{a_{m,v} \cdot b_u / T}}
                    \Bigr)

    where u runs over n brain voxels of the whole batch, other patients and processes included.

    What all patients share at a position is removed, so a code of the position or of the brain mask
    scores what constant latents score: exactly 1. Random unit vectors score more, about
    :math:`1 + 1 / (2 C T^2 \log n)`, and in small batches more again, because centring over few
    latents makes them oppose one another (with two complete samples of four modalities by a cosine
    of 0.29). Unit vectors leave no gradient along the length of r; the
    anchor is formed after the division and then detached. Latents that were not shown receive a
    gradient neither through the mean nor through the standard deviation.

    A position counts where at least two samples have brain: centring by one patient alone would
    leave nothing but the differences between modalities. So a batch of one sample (of all
    processes together) gives 0, and a training with such batches is refused at its start.

    Args:
        temperature: T.
        leave_out: the anchor of m is taken over the *other* acquired modalities. With m in it, even
            independent latents would resemble their anchor. A sample with one acquired modality
            contributes 0.
        points: voxels that are compared, of all samples together.
        epsilon: added to the variance and to squared lengths.
        seed: of the places.

    Source: van den Oord et al., Contrastive Predictive Coding (arXiv 1807.03748) for the contrast;
    docs/method/alignment.md for centring and leaving out.
    """

    name = "case_nce"
    compares_directions = True
    smallest_batch = 2

    ranges = Ranges(temperature=POSITIVE, points=COUNT)

    def __init__(
        self,
        temperature: float = 0.2,
        leave_out: bool = True,
        points: int = 400,
        epsilon: float = 1e-5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.temperature, self.leave_out = temperature, leave_out
        self.points, self.epsilon, self.seed = points, epsilon, seed

    def forward(self, latents: LevelLatents, anchor: Anchor, detach: Detach) -> PerSlot:
        """Return the distance per sample and modality, ``[B, M]``."""
        residuals, inside = self._residuals(latents)
        target, exists = self._targets(residuals, latents, anchor)
        residuals, target = detached(residuals, target, detach)
        a, b = unit(residuals, self.epsilon), unit(target, self.epsilon)
        own = (a * b).sum(2) / self.temperature  # [B, M, P]
        known = exists[:, :, None] & inside[:, None]
        others = gather_constants(b) if detach == "anchor" else latents.sums.gather(b)
        candidate = gather_constants(known)
        # [B, M, P, G, P]: voxels of this process against those of all, modality by modality.
        logits = torch.einsum("bmcp,gmcq->bmpgq", a, others) / self.temperature
        allowed = candidate.transpose(0, 1)[None, :, None]
        # Finite, so that a row without any candidate has finite gradients.
        never = torch.finfo(logits.dtype).min / 4
        logits = torch.where(allowed, logits, never).flatten(3)
        number = candidate.sum((0, 2)).to(own)[None, :, None]
        loss = (logits.logsumexp(3) - own) / number.clamp_min(2).log()
        counts = known & (number > 1)
        return torch.where(counts, loss, 0.0).sum(2) / counts.sum(2).clamp_min(1)

    def _residuals(self, latents: LevelLatents) -> tuple[Tensor, Tensor]:
        """Return latents relative to other patients at some brain voxels, and which of these count.

        Returns:
            ``[B, M, C, P]`` and ``[B, P]``.
        """
        flat = latents.features.flatten(3)
        brain = latents.brain.flatten(1)
        # A slot that is not shown enters the statistics by its value, without a gradient.
        values = torch.where(latents.shown[:, :, None, None], flat, flat.detach())
        weight = (latents.subset[:, :, None] & brain[:, None]).to(flat)  # [B, M, V]
        # The mean at each position, over all samples and sequences that have brain there.
        samples = (latents.subset.any(1)[:, None] & brain).to(flat).sum(0)
        constants = latents.sums.add(torch.stack([weight.sum((0, 1)), samples])).detach()
        count, samples = constants.unbind()
        centre = latents.sums.add((values * weight[:, :, None]).sum((0, 1))) / count.clamp_min(1)
        # One deviation per channel around it, over the positions that two patients share.
        compared = brain & (samples > 1)
        weight = weight * compared[:, None]
        squares = ((values - centre).square() * weight[:, :, None]).sum((0, 1, 3))
        total = latents.sums.add(weight.sum().view(1)).detach().clamp_min(1)
        scale = (latents.sums.add(squares) / total + self.epsilon).rsqrt()
        # Centred and divided at some of these positions, the same in every step.
        share = max(self.points // (len(flat) * world_size()), 1)
        places, inside = brain_points(
            compared.view(latents.brain.shape), share, self.seed * 1000 + latents.level
        )
        chosen = take(latents.features, places)
        centre = centre[None].expand(len(flat), -1, -1)
        centre = centre.gather(2, places[:, None].expand(-1, centre.shape[1], -1))
        return (chosen - centre[:, None]) * scale[:, None], inside

    def _targets(
        self, residuals: Tensor, latents: LevelLatents, anchor: Anchor
    ) -> tuple[Tensor, Presence]:
        """Return every modality's anchor ``[B, M, C, P]``, and whether it has one ``[B, M]``."""
        maps = residuals[..., None, None]
        targets, exists = [], []
        for m in range(maps.shape[1]):
            subset = latents.subset
            if self.leave_out:
                kept = torch.arange(maps.shape[1], device=subset.device) != m
                subset = subset & kept
            targets.append(anchor(maps, subset, latents.level, detach_weights=True)[..., 0, 0])
            exists.append(subset.any(1))
        return torch.stack(targets, 1), torch.stack(exists, 1)
