"""Simulate MRI contrasts from the phantom's anatomy.

Signals are in units of white matter. Enhancement enters a contrast only through
:attr:`Contrast.enhancement`, which is 0 for T2, FLAIR and T1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pmixseg.argument_checks import check_fields
from pmixseg.data.phantom.anatomy import Field, Grid, Tissues, smooth_noise, stream
from pmixseg.data.phantom.tumour import Tumour
from pmixseg.describe import FRACTION, Ranges


@dataclass(frozen=True)
class Contrast:
    """Mean signal per tissue, in units of white matter, and how one sequence sees a tumour.

    Args:
        wm: white matter.
        gm: grey matter.
        csf: cerebrospinal fluid.
        oedema: added in oedema.
        core: added to white matter's signal inside the core.
        fluid: added where the core is liquid; liquid and enhancing parts are independent.
        enhancement: added where the core enhances, and partly in vessels.
        lesion: added in white-matter lesions of age, which are no tumour.
        blur: how far (mm, standard deviation) the border seen here strays from the labelled one.
    """

    wm: float
    gm: float
    csf: float
    oedema: float
    core: float
    fluid: float = 0.0
    enhancement: float = 0.0
    lesion: float = 0.0
    blur: float = 2.0


CONTRASTS: Mapping[str, Contrast] = {
    "flair": Contrast(0.95, 1.05, 0.25, oedema=0.60, core=0.56, fluid=-0.26, lesion=0.4, blur=0.9),
    "t1ce": Contrast(
        1.0, 0.84, 0.36, oedema=-0.20, core=-0.36, fluid=-0.16, enhancement=1.0, blur=1.3
    ),
    "t1": Contrast(1.0, 0.78, 0.30, oedema=-0.24, core=-0.36, fluid=-0.16, blur=1.6),
    "t2": Contrast(0.85, 1.10, 2.10, oedema=0.50, core=0.66, fluid=0.40, lesion=0.2, blur=1.3),
    "pd": Contrast(0.90, 1.10, 1.10, oedema=0.25, core=0.32, fluid=0.1, lesion=0.2, blur=1.6),
    "adc": Contrast(0.80, 0.90, 2.60, oedema=0.55, core=0.45, fluid=0.5, lesion=0.2, blur=2.0),
}
"""The four sequences of BraTS, and proton density and a diffusion map for tasks with more."""


@dataclass(frozen=True)
class Scanner:
    """Imperfections that every scan has, and how modalities relate.

    Args:
        noise: standard deviation at 1 mm of the complex noise behind the Rician one, in units of
            white matter; it falls with the root of the voxel size.
        bias: standard deviation of the logarithm of the bias field.
        texture: standard deviation of the tumour's signal around its mean, relative.
        private_signal: share of a tumour's signal that only one modality shows, another one in
            every few centimetres: 0 shows everything in every modality, 1 every place in one only.
        dependence: correlation between modalities of texture and of how the border is misjudged.
            At 1 a second modality repeats the errors of the first, at 0 it averages them out.
        disagreement: scales :attr:`Contrast.blur`; 0 shows every border where the label has it.
        thick_slices: probability that a scan has slices of 3-6 mm.

    Raises:
        InputError: a share, correlation or probability out of 0 to 1.
    """

    ranges = Ranges(private_signal=FRACTION, dependence=FRACTION, thick_slices=FRACTION)

    noise: float = 0.05
    bias: float = 0.10
    texture: float = 0.25
    private_signal: float = 0.15
    dependence: float = 0.4
    disagreement: float = 1.0
    thick_slices: float = 0.3

    def __post_init__(self) -> None:
        check_fields(self)


class Shared:
    """Fields that all modalities of a case have in common.

    They are on the voxels of the scan; private signal is divided among all ``modalities``.
    """

    def __init__(
        self,
        seed: int,
        index: int,
        grid: Grid,
        tissues: Tissues,
        tumour: Tumour,
        modalities: tuple[str, ...],
    ) -> None:
        self.key, self.grid = (seed, index), grid
        self.tissues, self.tumour = tissues, tumour
        rng = stream(seed, index, "shared")
        self.texture = _texture(rng, grid)
        self.border = smooth_noise(rng, grid, 20.0)
        fluid = smooth_noise(rng, grid, 24.0) + rng.normal(0, 0.7)
        self.fluid = _inside(fluid, 0.3)
        lesions = smooth_noise(rng, grid, 12.0)
        self.lesions = _inside(lesions - rng.uniform(2.2, 3.5), 0.15) * tissues.wm
        tubes = smooth_noise(rng, grid, 18.0) ** 2 + smooth_noise(rng, grid, 18.0) ** 2
        wide = 0.2**2 + (0.08 * grid.spacing) ** 2
        self.vessels = np.exp(-tubes / wide) * (0.2**2 / wide) * (tissues.gm + tissues.csf)
        claims = [smooth_noise(stream(seed, index, f"owner {m}"), grid, 26.0) for m in modalities]
        owner = np.argmax(np.stack(claims), axis=0) if claims else np.zeros(grid.shape, dtype=int)
        self.owned = {
            m: ndimage.gaussian_filter((owner == n).astype(np.float32), 3.0 / grid.spacing)
            for n, m in enumerate(modalities)
        }


def scan(shared: Shared, modality: str, contrast: Contrast, scanner: Scanner) -> NDArray[np.int16]:
    """Return one sequence of one case, ``[X, Y, Z]``: at least 1 in the brain, exactly 0 outside.

    The name of the modality selects the random numbers.
    """
    grid, tissues, tumour = shared.grid, shared.tissues, shared.tumour
    rng = stream(*shared.key, f"scan {modality}")
    own, common = np.sqrt(1 - scanner.dependence), np.sqrt(scanner.dependence)
    texture = own * _texture(rng, grid) + common * shared.texture
    border = own * smooth_noise(rng, grid, 20.0) + common * shared.border
    stray = scanner.disagreement * contrast.blur * border
    # Half a voxel of partial volume on either side of a border.
    soft = 0.4 * grid.spacing
    core = _inside(tumour.core + 0.6 * stray, soft)
    oedema = _inside(tumour.oedema + stray, soft)
    enhancing = _inside(tumour.enhancement + 0.25 * stray, soft) * core

    wm, gm, csf = (
        level * rng.normal(1, 0.04) for level in (contrast.wm, contrast.gm, contrast.csf)
    )
    strength = rng.lognormal(0, 0.15, 3)
    uneven = np.clip(1 + scanner.texture * texture, 0.1, None)
    seen = uneven * (1 - scanner.private_signal * (1 - shared.owned[modality]))
    signal = wm * tissues.wm + gm * tissues.gm + csf * tissues.csf
    signal += contrast.lesion * shared.lesions
    signal += 0.6 * contrast.enhancement * shared.vessels
    signal += oedema * (1 - tissues.csf) * contrast.oedema * strength[0] * seen
    inner = (contrast.core + contrast.fluid * shared.fluid) * strength[1] * seen
    inner = wm + inner + contrast.enhancement * strength[2] * enhancing * uneven
    signal += core * (inner - signal)

    signal *= np.exp(scanner.bias * smooth_noise(rng, grid, 140.0))
    signal = np.clip(signal, 0, None) ** rng.uniform(0.85, 1.2)
    thickness = rng.uniform(3.0, 6.0) if rng.random() < scanner.thick_slices else 0.0
    acquire, show = _slices(grid, thickness)
    signal = np.tensordot(signal, acquire, axes=([2], [1])).astype(np.float32)
    sigma = scanner.noise * rng.uniform(0.6, 1.4) / np.sqrt(grid.spacing)
    real = signal + sigma * rng.standard_normal(signal.shape, dtype=np.float32)
    imaginary = sigma * rng.standard_normal(signal.shape, dtype=np.float32)
    signal = np.tensordot(np.hypot(real, imaginary), show, axes=([2], [1]))
    counts = np.clip(np.rint(signal * rng.uniform(200, 1200)), 1, 32767)
    return np.where(tissues.brain, counts, 0).astype(np.int16)


def _texture(rng: np.random.Generator, grid: Grid) -> Field:
    """Draw patches of a centimetre with finer ones on them, variance 1."""
    return np.asarray(0.8 * smooth_noise(rng, grid, 16.0) + 0.6 * smooth_noise(rng, grid, 7.0))


def _inside(level: Field, soft: float) -> Field:
    """Return 1 where ``level`` is positive, 0 where negative, smooth within ``soft`` of 0."""
    return np.asarray(1 / (1 + np.exp(-np.clip(level / soft, -30, 30))), dtype=np.float32)


def _slices(grid: Grid, thickness: float) -> tuple[Field, Field]:
    """Return matrices that average voxels into slices of ``thickness`` mm, and interpolate back."""
    n = grid.shape[2]
    if thickness <= grid.spacing:
        return np.eye(n, dtype=np.float32), np.eye(n, dtype=np.float32)
    count = max(round(n * grid.spacing / thickness), 2)
    edges = np.linspace(0, n, count + 1)
    voxel = np.arange(n)
    overlap = np.minimum(edges[1:, None], voxel + 1) - np.maximum(edges[:-1, None], voxel)
    acquire = np.clip(overlap, 0, None)
    acquire /= acquire.sum(axis=1, keepdims=True)
    middles = (edges[1:] + edges[:-1]) / 2
    show = np.stack([np.interp(voxel + 0.5, middles, unit) for unit in np.eye(count)], axis=1)
    return acquire.astype(np.float32), show.astype(np.float32)
