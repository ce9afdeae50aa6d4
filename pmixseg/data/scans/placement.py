"""Find scans and labels that do not lie where the other scans of a case do.

Everything is done at about 4 mm, on intensities as bins of equal population: whatever the sequence,
scans that lie on each other share information.

The thresholds were chosen on real cases and damaged copies of them: what passes may still be wrong.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import entr

from pmixseg.data.scans.brains import DIRECTIONS

Volume = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int16]

SAME_BINS = 0.5
"""Share of voxels in the same bin from which two scans are one: of 64 real cases at most 0.33, with
noise of a fifth of the deviation at least 0.62."""

LEAST_SHOWN = 0.6
"""Least credible share of the brain of other scans; of 64 real cases 0.66, next 0.97, of halves
left-right at most 0.54, of lower and upper ones 0.63."""

STRANGE_OUTLINE, STRANGE_INFORMATION = 0.015, 0.15
"""A scan is another patient's if so much of it lies outside each other scan, and of each outside
it (64 real cases: 0.005), and if it shares no more nats with them on average. 420 of 488 scans that
were exchanged between patients in one atlas space are."""

MAX_GAIN = 1.1
"""A scan is out of place if, moved, it shares this many times the information with the others."""

MIN_SHARED_ML = 600.0
"""Volume in common below which placement is not judged, about two fifths of a brain."""

COARSE_MM = 4.0
"""Voxel size at which placement is judged."""

SHIFTS_MM = (-16.0, -8.0, 8.0, 16.0)
TURNS_DEGREES = (-20.0, -10.0, 10.0, 20.0)
BINS = 16
TOGETHER = 9
"""Moves that are tried in one call: numpy's calls cost more than so few voxels."""

LABEL_SAMPLE = 1000
"""At most about twice as many voxels of a label are moved."""

LABEL_GAIN, LABEL_EXCESS, LABEL_STANDS_OUT = 1.3, 500.0, 3.0
"""A label is out of place if, somewhere else, it shares this many times the information, so much
more (nats times blocks), and this many times what it shares at half of the places: smooth scans
tell something about any compact region.

No true label of 64 real cases is refused (they share at most 0.95 times as much elsewhere), and
none of 1,790 phantoms, but 16 of 1,010 whose sequences have signals of their own as well.
Copies of the real labels are found: mirrored or with exchanged axes 99 %, shifted by 10 mm 87 %, by
20 to 40 mm 94 %."""

LABEL_SHIFTS_MM = (-40, -24, -16, -8, 8, 16, 24, 40)
"""Along each axis."""

PROMISING = 0.8
"""Ratio on every second voxel per axis above which a move is tried on all voxels.

Where all voxels give more than :data:`MAX_GAIN`, the eighth of them gives at least 1.04 on 57 real
cases and 171 copies with a scan out of place. The cases as they are give at most 0.76."""


@dataclass(frozen=True)
class Overview:
    """The scans of a case at about :data:`COARSE_MM`.

    Args:
        volumes: sequence -> means over the non-zero voxels of blocks; 0 where most voxels are 0.
        codes: sequence -> bins of equal population of these means, 1 to :data:`BINS`; 0 outside.
        blocks: voxels per block and axis.
        zooms: size of a block in mm.
    """

    volumes: Mapping[str, Volume]
    codes: Mapping[str, Codes]
    blocks: tuple[int, ...]
    zooms: tuple[float, ...]

    @classmethod
    def of(cls, scans: Mapping[str, npt.NDArray[np.generic]], zooms: Sequence[float]) -> Overview:
        """Return the overview of scans.

        Of small voxels every second per axis is read, which is 8 of 64 in a block at 1 mm. Scans
        are ``[D, H, W]``, all of one shape.
        """
        every = [2 if z <= COARSE_MM / 4 else 1 for z in zooms]
        steps = [max(1, round(COARSE_MM / (z * e))) for z, e in zip(zooms, every, strict=True)]
        volumes = {}
        for name, scan in scans.items():
            sparse = scan[tuple(slice(None, None, e) for e in every)]
            shape = [n // s for n, s in zip(sparse.shape, steps, strict=True)]
            part = tuple(slice(0, n * s) for n, s in zip(shape, steps, strict=True))
            # torch turns float16 into float32 several times faster than numpy.
            whole = torch.from_numpy(np.ascontiguousarray(sparse[part])).float().numpy()
            share, mean = (_block_means(v, steps) for v in ((whole != 0).astype("f4"), whole))
            kept = np.where(share > 0.5, mean / np.maximum(share, 1e-6), 0)
            volumes[name] = kept.astype(np.float32)
        codes = {name: _quantised(volume) for name, volume in volumes.items()}
        blocks = tuple(s * e for s, e in zip(steps, every, strict=True))
        return cls(volumes, codes, blocks, tuple(z * b for z, b in zip(zooms, blocks, strict=True)))


def copies(overview: Overview) -> list[str]:
    """Suspect two scans that are one: a file under two names, or saved again in other intensities.

    Example:
        >>> scan = 1 + np.random.default_rng(0).random((20, 20, 20))
        >>> copies(Overview.of({"t1": scan, "t2": 1 / scan, "flair": scan**2}, (4, 4, 4)))
        ['t1 and flair are one and the same scan']
    """
    phrases = []
    for (one, first), (other, second) in combinations(overview.codes.items(), 2):
        counts = np.bincount(first[first > 0], minlength=1)
        if BINS * counts.max() > 2 * counts.sum():
            continue  # many voxels of one value, such as a background that is not 0, decide alone
        both = (first > 0) & (second > 0)
        if np.count_nonzero(both & (first == second)) > SAME_BINS * max(both.sum(), BINS):
            phrases.append(f"{one} and {other} are one and the same scan")
    return phrases


def outlines(overview: Overview) -> list[str]:
    """Remark on scans that show half of the brain of another, or another brain."""
    names = list(overview.codes)
    codes = np.stack([overview.codes[name].ravel() for name in names])
    brains = (codes > 0).astype(np.float32)
    shared = brains @ brains.T
    if shared.max() * math.prod(overview.zooms) < MIN_SHARED_ML * 1000:
        return []
    shown = shared / np.maximum(shared.diagonal(), 1)  # by each scan, of each other's brain
    phrases = []
    for one, name in enumerate(names):
        if shown[one].min() < LEAST_SHOWN:
            share = shown[one].min()
            phrases.append(
                f"{name} shows {share:.0%} of the brain that other scans show; see that it is whole"
            )
        rest = [other for other in range(len(names)) if other != one]
        alike = np.maximum(shown[one], shown[:, one])[rest]
        if len(rest) > 1 and alike.max() < 1 - STRANGE_OUTLINE:
            information = _information(codes[rest], codes[[one]], 0).item() / len(rest)
            if information < STRANGE_INFORMATION:
                phrases.append(
                    f"{name} shows another brain than {' and '.join(names[i] for i in rest)}, as "
                    "of another patient; see that it is this one's"
                )
    return phrases


@dataclass(frozen=True)
class Move:
    """A rigid move or mirroring about a scan's own centre.

    Args:
        matrix: 3 x 3, in mm.
        shift: in mm.
        words: how a message describes it.
    """

    matrix: npt.NDArray[np.float64]
    shift: npt.NDArray[np.float64]
    words: str


def moves() -> Iterator[Move]:
    """Yield the 27 moves that are tried: shifts, turns and mirrorings, one axis at a time."""
    for axis, direction in enumerate(DIRECTIONS):
        unit = np.eye(3)[axis]
        for shift in SHIFTS_MM:
            yield Move(np.eye(3), shift * unit, f"shifted {abs(shift):g} mm {direction}")
        for turn in TURNS_DEGREES:
            first, second = (a for a in range(3) if a != axis)
            matrix, angle = np.eye(3), np.radians(turn)
            matrix[first, first] = matrix[second, second] = np.cos(angle)
            matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
            words = f"turned {abs(turn):g} degrees about the {direction} axis"
            yield Move(matrix, np.zeros(3), words)
        yield Move(np.eye(3) - 2 * np.outer(unit, unit), np.zeros(3), f"mirrored {direction}")


def misplaced(overview: Overview) -> list[str]:
    r"""Suspect scans that are not registered to the others, are mirrored, or do not meet them.

    For scan m and each move T, with I the mutual information of intensities over the voxels that
    both have before and after the move,

    .. math:: g_m = \max_T \frac{\sum_{j \ne m} I(x_j, T x_m)}{\sum_{j \ne m} I(x_j, x_m)}

    Of 57 further real cases (BraTS 2018 to 2021 at 2 mm) one is suspected, with 1.24:
    Brats18_CBICA_AQQ_1, whose T2 is turned by 12 degrees indeed. Registered to T1, it shares 0.26
    nats with it instead of 0.08. The others have at most 0.76.

    The seven real cases have max g between 0.33 and 0.89 with all four scans, also where one covers
    half of the brain, and at most 1.02 with two. With one of four shifted by 10 mm it is at least
    1.9, turned by 15 degrees 1.28, mirrored left-right 1.67; by 6 mm, 1.09. The scan with the
    largest g is named, if that is above :data:`MAX_GAIN`.
    """
    codes, size = overview.codes, overview.zooms
    names = list(codes)
    if len(names) < 2:
        return []
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            both = np.count_nonzero((codes[name] > 0) & (codes[other] > 0))
            smaller = min(np.count_nonzero(codes[name]), np.count_nonzero(codes[other]))
            if both < 0.25 * smaller:
                return [f"{name} and {other} hardly overlap"]
    # The move that helps most; what helps little on an eighth of the voxels is not tried on all.
    worst, words = MAX_GAIN, ""
    for name in names:
        others = [codes[n] for n in names if n != name]
        tried = [m for g, m in _gains(codes[name], others, size, moves(), 2) if g > PROMISING]
        for gain, move in _gains(codes[name], others, size, tried):
            if gain > worst:
                worst = gain
                rest = " and ".join(n for n in names if n != name)
                words = f"{name} does not seem to lie on {rest}: {move.words} it would fit better"
    return [words] if words else []


def misplaced_label(
    tumour: npt.NDArray[np.intp],
    first: Sequence[int],
    shape: Sequence[int],
    overview: Overview,
    *,
    shifts: bool = False,
) -> list[str]:
    """Suspect a label that is mirrored, shifted or has other axes against the scans.

    That a voxel is labelled, and the intensities there, share information: see :data:`LABEL_GAIN`.
    ``tumour`` holds the labelled voxels ``[voxels, 3]``, counted from ``first``, where the overview
    begins in the grid of ``shape``. ``shifts`` are known to be safe for whole gliomas in four
    sequences alone.
    """
    if len(tumour) == 0:
        return []
    # Information that the label shares with the scans, in nats times blocks, where it lies.
    sample = tumour[:: 1 + len(tumour) // LABEL_SAMPLE]
    weight = len(tumour) / len(sample) / math.prod(overview.blocks)
    codes = np.stack(list(overview.codes.values()))
    everything = np.stack([np.bincount(c.ravel(), minlength=BINS + 1)[1:] for c in codes])

    def evidence(points: npt.NDArray[np.intp]) -> float:
        """Return what being one of these voxels tells about all scans, in blocks times nats."""
        place = points // overview.blocks
        place = place[((place >= 0) & (place < codes.shape[1:])).all(axis=1)]
        there = codes[:, place[:, 0], place[:, 1], place[:, 2]]
        inside = np.stack([np.bincount(t, minlength=BINS + 1)[1:] for t in there]) * weight
        table = np.stack([inside, np.maximum(everything - inside, 0)])
        count = np.maximum(table.sum(axis=(0, 2)), 1.0)
        p = table / count[:, None]
        own = entr(p.sum(axis=0)).sum(axis=1) + entr(p.sum(axis=2)).sum(axis=0)
        return float(count @ (own - entr(p).sum(axis=(0, 2))))

    # The same at every other place; the best must stand out from most of them.
    here, there = evidence(sample), []
    places = _elsewhere(sample + first, shape)
    for points, how in chain(places, _shifted(sample + first, overview) if shifts else ()):
        there.append((evidence(points - first), how))
    usual = statistics.median(value for value, _ in there)
    best, how = max(there)
    if best > max(LABEL_GAIN * here, here + LABEL_EXCESS, LABEL_STANDS_OUT * usual):
        return [f"its label does not seem to lie on the scans: {how} it would fit"]
    return []


def _shifted(
    points: npt.NDArray[np.intp], overview: Overview
) -> Iterator[tuple[npt.NDArray[np.intp], str]]:
    """Yield voxels after every shift along one axis, and what it is called."""
    zooms = np.array(overview.zooms) / overview.blocks
    for axis, direction in enumerate(DIRECTIONS):
        for shift in LABEL_SHIFTS_MM:
            moved = points.copy()
            moved[:, axis] += round(shift / zooms[axis])
            yield moved, f"shifted {abs(shift)} mm {direction}"


def _elsewhere(
    points: npt.NDArray[np.intp], shape: Sequence[int]
) -> Iterator[tuple[npt.NDArray[np.intp], str]]:
    """Yield voxels after every mirroring and exchange of two axes of one length, in words too."""
    orders = [([0, 1, 2], "")]
    for one, two in combinations(range(3), 2):
        if shape[one] == shape[two]:
            order = [0, 1, 2]
            order[one], order[two] = two, one
            axes = f"{DIRECTIONS[one]} and {DIRECTIONS[two]}"
            orders.append((order, f"with the axes {axes} exchanged"))
    for (order, exchanged), flips in product(orders, product((False, True), repeat=3)):
        directions = " and ".join(d for d, flip in zip(DIRECTIONS, flips, strict=True) if flip)
        words = [w for w in (exchanged, directions and f"mirrored {directions}") if w]
        if words:
            turned = points[:, order]
            yield np.where(flips, np.array(shape) - 1 - turned, turned), ", ".join(words)


def _gains(
    scan: Codes,
    others: Sequence[Codes],
    size: Sequence[float],
    tried: Iterable[Move],
    every: int = 1,
) -> Iterator[tuple[float, Move]]:
    """Return :func:`misplaced`'s ratio for moves of one scan, on each ``every``-th voxel."""
    points = np.argwhere(scan[::every, ::every, ::every]).T * every
    if points.size == 0:
        return
    steps = np.array(size)[:, None]
    centre = points.mean(axis=1, keepdims=True)
    offsets = (points - centre) * steps
    here = scan[tuple(points)]
    partners = np.stack([other[tuple(points)] for other in others])
    padded = np.pad(scan, 1)  # whatever is moved out of the volume meets a 0
    last = np.array(padded.shape)[:, None] - 1
    enough = MIN_SHARED_ML * 1000 / float(np.prod(size)) / every**3
    together = list(tried)
    for first in range(0, len(together), TOGETHER):
        some = together[first : first + TOGETHER]
        matrices, shifts = np.stack([m.matrix for m in some]), np.stack([m.shift for m in some])
        # Nearest neighbours: interpolation would smooth, and smooth scans share more.
        source = matrices @ offsets + shifts[..., None]
        index = np.clip(np.rint(source / steps + centre).astype(np.intp) + 1, 0, last)
        moved = padded[index[:, 0], index[:, 1], index[:, 2]]
        # Before and after each move, both times over the voxels that both have afterwards.
        pairs = np.stack([np.where(moved > 0, here, 0), moved], axis=1)
        shared = _information(partners, pairs.reshape(2 * len(some), len(here)), enough)
        for move, (before, after) in zip(some, shared.reshape(-1, 2).tolist(), strict=True):
            yield after / max(before, 1e-3), move


def _block_means(volume: Volume, steps: Sequence[int]) -> Volume:
    """Return means of blocks, axis by axis: a sum of slices is faster than numpy's mean."""
    for axis, step in enumerate(steps):
        before = (slice(None),) * axis
        parts = (volume[(*before, slice(k, None, step))] for k in range(step))
        volume = functools.reduce(np.add, parts) / np.float32(step)
    return volume


def _quantised(scan: Volume) -> Codes:
    """Sort values into bins of equal population, 1 to :data:`BINS`; 0 outside."""
    inside = scan != 0
    if not inside.any():
        return np.zeros(scan.shape, np.int16)
    values = np.sort(scan[inside])  # or np.quantile would part them once for each edge
    edges = np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1])
    return np.where(inside, np.searchsorted(edges, scan) + 1, 0).astype(np.int16)


def _information(scans: Codes, others: Codes, enough: float) -> npt.NDArray[np.float64]:
    """Sum the mutual information of each other scan with all scans, in nats.

    Entropies are corrected for the number of voxels (Miller and Madow 1955). Voxels
    ``[scans, voxels]`` where either is 0 do not count, nor do scans with fewer than ``enough``.
    """
    pairs, rows = (len(others), len(scans)), BINS + 1
    table = np.arange(math.prod(pairs), dtype=np.int32).reshape(*pairs, 1)
    cells = (table * rows + scans) * rows + others[:, None]
    counts = np.bincount(cells.ravel(), minlength=table.size * rows * rows)
    both = counts.reshape(*pairs, rows, rows)[:, :, 1:, 1:]
    shared = both.sum(axis=(2, 3))
    total = np.maximum(shared, 1)[..., None]
    # One array for all three entropies: numpy's calls cost more than so few numbers.
    tables = [both.sum(axis=2), both.sum(axis=3), both.reshape(*pairs, -1)]
    p = np.concatenate(tables, axis=2) / total
    sign = np.repeat([1.0, -1.0], [2 * BINS, BINS * BINS])
    information = (entr(p) + (p > 0) / (2 * total)) @ sign - 0.5 / total[..., 0]
    summed: npt.NDArray[np.float64] = information.sum(axis=1, where=shared >= enough)
    return summed
