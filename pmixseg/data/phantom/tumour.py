"""The phantom's glioma: nested irregular regions, oedema along white matter, mass effect.

Everything is grown on one 3 mm lattice as smooth level fields in millimetres, positive inside, and
evaluated on the voxels of the scan afterwards, so that a case keeps its tumour at every voxel size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pmixseg.data.phantom.anatomy import (
    Deformation,
    Field,
    Grid,
    Tissues,
    refine,
    smooth_noise,
    stream,
)

GROWTH_GRID = Grid((50, 64, 52), 3.0)
"""The lattice that tumours grow on: it contains every brain."""

LOWEST_SEED = 52.0
"""Adult gliomas sit in the cerebrum: no seed below this height in mm, where the cerebellum is."""

REACH = 42.0
"""How far oedema may extend from a core's border, in mm."""


@dataclass(frozen=True)
class Focus:
    """One tumour centre: position, core radius and the radius of displaced volume, all in mm."""

    centre: tuple[float, float, float]
    radius: float
    push: float


@dataclass(frozen=True)
class Tumour:
    """Level fields in mm, positive inside, on :data:`GROWTH_GRID` until :meth:`on` another grid.

    Args:
        foci: the centres.
        core: depth inside the core (necrosis and enhancing rim).
        oedema: depth inside the oedema's outer border (the core included).
        enhancement: depth inside the enhancing part, to be cut with the core; negative everywhere
            in a tumour that does not enhance.
    """

    foci: tuple[Focus, ...]
    core: Field
    oedema: Field
    enhancement: Field

    def on(self, grid: Grid) -> Tumour:
        """Return the tumour that has grown on the voxels of a scan."""
        levels = (self.core, self.oedema, self.enhancement)
        return Tumour(self.foci, *(refine(level, GROWTH_GRID, grid) for level in levels))


def displacement(foci: tuple[Focus, ...], grid: Grid) -> Field:
    """Return how far the tumour pushed tissue outwards (mass effect), ``[3, X, Y, Z]`` mm.

    Incompressible tissue around a ball of radius a that grew at its centre: what is now at distance
    r was at (r³ - a³)^(1/3), so the push decays like a³/3r².
    """
    moved = np.zeros((3, *grid.shape), dtype=np.float32)
    for focus in foci:
        offsets = _offsets(grid, focus.centre)
        r = np.sqrt(sum(o**2 for o in offsets)) + 1e-3
        before = np.cbrt(np.clip(r**3 - focus.push**3, 0, None))
        for axis in range(3):
            moved[axis] += offsets[axis] * (1 - before / r)
    return moved


def grow(
    seed: int,
    index: int,
    anatomy: Deformation,
    *,
    high_grade: bool,
    foci: int,
    enhancing: bool,
    mass_effect: float = 1.0,
) -> Tumour:
    """Grow the tumour of one case.

    The enhancing part has random numbers of its own and nothing else in the case depends on it:
    what share of the core enhances (0-100 %, 80 % on average), how thick the rim is, and where it
    has gaps cannot be read from the core's or the oedema's shape. Only the grade shows a little in
    geometry (low grades have less oedema and a smoother core), and they never enhance. Low grades
    are ``high_grade=False``; a ``mass_effect`` of 1 displaces up to the core's own volume, 0 pushes
    no tissue aside.
    """
    rng = stream(seed, index, "tumour")
    healthy = anatomy.tissues(GROWTH_GRID)
    centres = _seeds(rng, healthy, foci)
    radius = float(np.clip(rng.lognormal(np.log(19.0 if high_grade else 20.0), 0.25), 10, 30))
    grown = []
    for n, centre in enumerate(centres):
        r = radius if n == 0 else radius * rng.uniform(0.35, 0.7)
        grown.append(Focus(centre, r, r * mass_effect * rng.uniform(0.4, 0.95)))
    tissues = anatomy.tissues(GROWTH_GRID, displacement(tuple(grown), GROWTH_GRID))
    core = _core(rng, grown, tissues, irregularity=1.0 if high_grade else 0.7)
    ratio = float(rng.lognormal(np.log(1.8 if high_grade else 0.7), 0.5))
    oedema = _oedema(rng, core, tissues, ratio)
    own = stream(seed, index, "enhancement")
    level = enhancement(own, core) if enhancing else np.full_like(core, -10.0)
    return Tumour(tuple(grown), core, oedema, level)


def enhancement(rng: np.random.Generator, core: Field) -> Field:
    """Return the depth inside the enhancing share of a core.

    A voxel scores by its nearness to the core's border plus random patches, and the best share is
    taken: without patches a closed rim, with them a rim with gaps, islands, or a solid nodule. The
    depth inside the core is in mm, on :data:`GROWTH_GRID`; nothing else in the case uses the random
    numbers.
    """
    # Most cores enhance for the larger part, so that without T1ce guessing pays, as it does in
    # published results; about every seventh core may have any share.
    share = rng.beta(6.0, 1.0) if rng.random() < 0.85 else rng.random()
    thickness = rng.uniform(2.5, 7.0)
    patchiness = rng.uniform(0.2, 1.3)
    patches = np.zeros(core.shape, dtype=np.float32)
    for amplitude, wavelength in ((0.9, 26.0), (0.45, 14.0)):
        patches += amplitude * smooth_noise(rng, GROWTH_GRID, wavelength)
    score = thickness * patchiness * patches - np.clip(core, 0, None)
    threshold = np.quantile(score[core > 0], 1 - share)
    return np.asarray(score - threshold, dtype=np.float32)


def _offsets(grid: Grid, centre: tuple[float, float, float]) -> list[Field]:
    """Return the signed distance from ``centre`` per axis in mm, shaped to broadcast."""
    axes = np.meshgrid(*grid.axes(), indexing="ij", sparse=True)
    return [(axis - c).astype(np.float32) for axis, c in zip(axes, centre, strict=True)]


def _seeds(
    rng: np.random.Generator, tissues: Tissues, foci: int
) -> list[tuple[float, float, float]]:
    """Draw positions (mm) in deep white matter; later ones lie near the first."""
    depth = ndimage.distance_transform_edt(tissues.brain, sampling=GROWTH_GRID.spacing)
    axes = GROWTH_GRID.axes()
    possible = (tissues.wm > 0.7) & (depth > 9) & (axes[2] > LOWEST_SEED)
    positions = np.argwhere(possible) * GROWTH_GRID.spacing + np.asarray(GROWTH_GRID.origin)
    chosen = [positions[rng.integers(len(positions))]]
    while len(chosen) < foci:
        distance = np.linalg.norm(positions - chosen[0], axis=1)
        nearby = positions[(distance > 25) & (distance < 65)]
        chosen.append(nearby[rng.integers(len(nearby))])
    return [(float(x), float(y), float(z)) for x, y, z in chosen]


def _core(
    rng: np.random.Generator, foci: list[Focus], tissues: Tissues, irregularity: float
) -> Field:
    """Return the depth inside the union of distorted ellipsoids."""
    noise = np.zeros(GROWTH_GRID.shape, dtype=np.float32)
    for amplitude, wavelength in ((0.16, 45.0), (0.12, 22.0), (0.08, 12.0), (0.04, 8.0)):
        noise += irregularity * amplitude * smooth_noise(rng, GROWTH_GRID, wavelength)
    depth = np.full(GROWTH_GRID.shape, -np.inf, dtype=np.float32)
    for focus in foci:
        axes = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        stretch = rng.lognormal(0, 0.2, 3)
        stretch /= np.cbrt(stretch.prod())
        offsets = np.stack(np.broadcast_arrays(*_offsets(GROWTH_GRID, focus.centre)))
        local = np.tensordot((axes / stretch[:, None]).astype(np.float32), offsets, axes=1)
        level = 1 - np.sqrt((local**2).sum(axis=0)) / focus.radius + noise
        depth = np.maximum(depth, level * focus.radius)
    return np.where(tissues.brain, depth, np.minimum(depth, -1)).astype(np.float32)


def _oedema(rng: np.random.Generator, core: Field, tissues: Tissues, ratio: float) -> Field:
    """Return the depth inside the border of what diffuses from the core, fast in white matter.

    ∂u/∂t = ∇(D∇u) with u = 1 in the core and D large in white matter, small in grey matter and 0 in
    CSF (the diffusion part of the usual glioma growth model, Swanson et al. 2000,
    doi 10.1046/j.1365-2184.2000.00177.x), cut where it holds ``ratio`` times the core's volume.
    """
    inside = core > 0
    box = ndimage.find_objects(inside.astype(np.int8))[0]
    margin = int(REACH / GROWTH_GRID.spacing)
    box = tuple(slice(max(s.start - margin, 0), s.stop + margin) for s in box)
    source, candidate = inside[box], (tissues.brain & (tissues.csf < 0.5))[box]
    speed = np.where(candidate, 0.01 + 0.99 * tissues.wm[box] ** 3, 0.0).astype(np.float32)
    speed[source] = 1.0
    faces = [
        np.sqrt(_side(speed, axis, 1) * _side(speed, axis, 0)) / np.float32(6.0)
        for axis in range(3)
    ]
    u = source.astype(np.float32)
    for _ in range(70):
        change = np.zeros_like(u)
        for axis in range(3):
            flow = faces[axis] * np.diff(u, axis=axis)
            _side(change, axis, 0)[...] += flow
            _side(change, axis, 1)[...] -= flow
        u += change
        u[source] = 1.0
    # One factor e of concentration is some 5 mm of way; in mm, noise has a size one can picture.
    level = 5 * np.log(np.maximum(u, 1e-6))
    for amplitude, wavelength in ((2.5, 30.0), (1.5, 12.0)):
        level += amplitude * smooth_noise(rng, GROWTH_GRID, wavelength)[box]
    around = level[candidate & ~source & (u > 1e-5)]
    count = min(int(ratio * source.sum()), int(0.9 * len(around)))
    border = np.partition(around, len(around) - count)[len(around) - count] if count else 0.0
    depth = np.full(core.shape, -10.0, dtype=np.float32)
    depth[box] = np.where(candidate, np.clip(level - border, -10, 20), -3.0)
    return np.maximum(depth, core)


def _side(values: NDArray[np.float32], axis: int, first: int) -> NDArray[np.float32]:
    """Return a view without the last (``first=0``) or first (``first=1``) slice of ``axis``."""
    cut = [slice(None)] * 3
    cut[axis] = slice(1, None) if first else slice(None, -1)
    return values[tuple(cut)]
