"""Augmentation of a training batch, on the device, as a pure function of the samples' keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pmixseg.data.augment_batch import change_batch, turn_batch
from pmixseg.data.keys import generator, uniform
from pmixseg.data.resample import Turn, turn_patch
from pmixseg.describe import FRACTION, NOT_NEGATIVE, SHARE, Described, Ranges
from pmixseg.execution import on_cpu
from pmixseg.types import Batch, Keys


class Augmentation(Described):
    """Augment a batch on its device: flips, one rotation with zoom, changes of intensity.

    Every sample has its own flips, axis, angle and zoom, shared by its modalities and its label;
    every modality of a sample has its own intensity changes, applied where that modality is not 0:
    x -> lo + (hi - lo)·((x - lo)/(hi - lo))^γ with the patch's extremes lo and hi, then
    x -> scale·x + shift + noise. Background and absent modalities stay exactly 0.

    Args:
        flip: probability of reversing an axis, one for all or one each for D, H, W.
        rotation: angle uniform in ± this, degrees, about one axis chosen at random.
        zoom: factor uniform in 1 ± this.
        resample: probability that a sample is rotated and zoomed; the others are not interpolated.
        shift: added intensity, uniform in ± this (images are z-scored: in standard deviations).
        scale: factor uniform in 1 ± this.
        gamma: log γ uniform in ± this, with probability ``gamma_probability``.
        gamma_probability: per modality.
        noise: standard deviation of Gaussian noise, uniform from 0 to this, with probability
            ``noise_probability``.
        noise_probability: per modality.

    The defaults of flip, rotation, shift and scale are those of RFNet's public code, which rotates
    every sample by whole degrees, and draws shift and scale anew for every slice.
    """

    ranges = Ranges(
        **dict.fromkeys(("flip", "resample", "gamma_probability", "noise_probability"), FRACTION),
        **dict.fromkeys(("rotation", "shift", "gamma", "noise"), NOT_NEGATIVE),
        **dict.fromkeys(("zoom", "scale"), SHARE),
    )

    def __init__(
        self,
        flip: float | tuple[float, float, float] = 0.5,
        rotation: float = 10.0,
        zoom: float = 0.1,
        resample: float = 0.5,
        shift: float = 0.1,
        scale: float = 0.1,
        gamma: float = 0.3,
        gamma_probability: float = 0.15,
        noise: float = 0.1,
        noise_probability: float = 0.15,
    ) -> None:
        self.flip = tuple(flip) if isinstance(flip, Sequence) else (flip,) * 3
        self.rotation, self.zoom, self.resample = rotation, zoom, resample
        self.shift, self.scale = shift, scale
        self.gamma, self.gamma_probability = gamma, gamma_probability
        self.noise, self.noise_probability = noise, noise_probability

    def __call__(
        self,
        batch: Batch,
        keys: Keys | None = None,
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> Batch:
        """Augment every sample of a batch, whose tensors may be overwritten.

        Args:
            batch: of any device.
            keys: the batch's keys on the CPU, if they are at hand: reading them off a GPU would
                wait for it.
            spacing: voxel size in mm, so that rotations are rigid.
        """
        keys = (batch["key"] if keys is None else keys).cpu()
        turns = self.turns(keys)
        table = self._intensities(keys, batch["image"].shape[1])
        image, label = batch["image"], batch["label"]
        if not on_cpu(image) and min(label.shape[1:]) > 1:
            with torch.no_grad():
                image, label = turn_batch(image, label, turns, spacing)
                batch["image"], batch["label"] = change_batch(image, table, keys), label
            return batch
        changes: list[list[tuple[float, float, float, float]]] = table.tolist()
        with torch.no_grad():
            for b, turn in enumerate(turns):
                turn_patch(batch["image"][b], batch["label"][b], turn, spacing)
                for m, change in enumerate(changes[b]):
                    _change(batch["image"][b, m], *change, key=int(keys[b]), stream=f"noise{m}")
        return batch

    def turns(self, keys: Keys) -> list[Turn]:
        """Return the spatial change of each sample."""
        flips = uniform(keys, "flip", 3) < torch.tensor(self.flip, dtype=torch.float64)
        made = []
        for flip, (do, axis, angle, zoom) in zip(
            flips.tolist(), uniform(keys, "turn", 4).tolist(), strict=True
        ):
            drawn = do < self.resample
            degrees = self.rotation * (2 * angle - 1) if drawn else 0.0
            factor = 1 + self.zoom * (2 * zoom - 1) if drawn else 1.0
            made.append(Turn(int(3 * axis), degrees, factor, (flip[0], flip[1], flip[2])))
        return made

    def _intensities(self, keys: Keys, n: int) -> Float[Tensor, "b m 4"]:
        """Draw scale, shift, γ and the noise's standard deviation per sample and modality."""
        signed = 2 * uniform(keys, "intensity", 2 * n) - 1
        chance, amount = uniform(keys, "gamma", 2 * n).chunk(2, 1)
        gamma = torch.exp(self.gamma * (2 * amount - 1))
        gamma = torch.where(chance < self.gamma_probability, gamma, 1.0)
        chance, amount = uniform(keys, "noise", 2 * n).chunk(2, 1)
        noise = torch.where(chance < self.noise_probability, amount * self.noise, 0.0)
        scale, shift = 1 + self.scale * signed[:, :n], self.shift * signed[:, n:]
        return torch.stack([scale, shift, gamma, noise], -1)


def _change(
    volume: Float[Tensor, "d h w"],
    scale: float,
    shift: float,
    gamma: float,
    noise: float,
    key: int,
    stream: str,
) -> None:
    """Change one modality in place, where it is not 0."""
    # A float mask: boolean ones are several times slower on a CPU.
    brain = torch.ne(volume, 0, out=torch.empty_like(volume))
    if gamma != 1.0:
        low, high = torch.aminmax(volume)
        span = (high - low).clamp(min=torch.finfo(volume.dtype).tiny)
        volume.sub_(low).div_(span).pow_(gamma).mul_(span).add_(low).mul_(brain)
    volume.mul_(scale)
    if noise > 0.0:
        field = torch.empty_like(volume)
        field.normal_(shift, noise, generator=generator(key, stream, volume.device))
        volume.addcmul_(field, brain)
    elif shift != 0.0:
        volume.add_(brain, alpha=shift)
