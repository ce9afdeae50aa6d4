"""Check the scans of a case together: background, spacing, registration, labels.

`inspect`, `prepare` and `segment` ask this one judge, and say what it says in the same words.

Heuristics with thresholds that were chosen on the seven BraTS 2021 cases of the tests and damaged
copies of them. They find gross mistakes and prove nothing: what passes may still be wrong.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import entr

from pmixseg.data.scans.canonical import CanonicalCase
from pmixseg.task import Task

Volume = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int16]

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

PROMISING = 0.8
"""Ratio on every second voxel per axis above which a move is tried on all voxels.

Where all voxels give more than :data:`MAX_GAIN`, the eighth of them gives at least 1.04 on 57 real
cases and 171 copies with a scan out of place. The cases as they are give at most 0.76."""

MAX_OUTSIDE = 0.1
"""Largest credible share of a label's voxels where no scan has signal; 72 real cases have none."""

MIN_OUTSIDE = 8
"""Fewer voxels outside are an edge of a coarse grid; no share is taken of them."""

LARGEST_SHARE = 0.5
"""Largest credible share of a brain that is tumour; the largest of 72 real cases has 0.16."""

DIRECTIONS = ("left-right", "back-front", "down-up")


def implausible(case: CanonicalCase, task: Task) -> list[str]:
    """What makes a case look unlike the scans a model was trained on.

    Args:
        case: a canonical case; background exactly 0.
        task: names of its channels.

    Returns:
        One phrase per suspicion, without a full stop; none if the case looks as it should.
    """
    scans = {
        name: case.image[index]
        for index, (name, there) in enumerate(zip(task.modalities, case.acquired, strict=True))
        if there
    }
    doubts = [*case.doubts, *copies(scans), *misfit_label(case)]
    return doubts or misplaced(scans, case.geometry.grid_spacing)


def copies(scans: Mapping[str, npt.NDArray[np.generic]]) -> list[str]:
    """Suspect scans that are equal voxel by voxel: one file, copied under two names.

    Args:
        scans: by sequence, on one grid.

    Example:
        >>> scan = np.arange(8.0).reshape(2, 2, 2)
        >>> copies({"t1": scan, "t2": scan + 1, "flair": scan.copy()})
        ['t1 and flair are one and the same scan']
    """
    # Other scans differ in their middle plane already, and need not be read whole.
    middle = {name: scan[len(scan) // 2] for name, scan in scans.items()}
    return [
        f"{one} and {other} are one and the same scan"
        for one, other in combinations(scans, 2)
        if np.array_equal(middle[one], middle[other]) and np.array_equal(scans[one], scans[other])
    ]


def misfit_label(case: CanonicalCase) -> list[str]:
    """Suspect a label that is of other scans, or marks the brain rather than a tumour.

    Args:
        case: with or without a label.
    """
    if case.label is None:
        return []
    tumour = np.flatnonzero(case.label > 0)
    total = case.label_beyond + len(tumour)
    if total == 0:
        return []
    scans = case.image.reshape(len(case.image), -1)
    inside = np.count_nonzero((scans[:, tumour] != 0).any(axis=0))
    if total - inside >= max(MIN_OUTSIDE, MAX_OUTSIDE * total):
        share = 1 - inside / total
        return [f"{share:.0%} of its label lies where no scan has signal, as that of other scans"]
    if all(total > LARGEST_SHARE * _extent(scan) for scan in scans):
        brain = max(_extent(scan) for scan in scans)
        return [f"its label covers {total / brain:.0%} of the brain, more than a tumour takes"]
    return []


def _extent(scan: npt.NDArray[np.generic]) -> int:
    """Voxels that are not 0; numpy counts whole numbers ten times faster than halves of floats."""
    # Without the sign, since -0 is 0.
    return int(np.count_nonzero(scan.view(f"u{scan.itemsize}") << 1))


@dataclass(frozen=True)
class Verdict:
    """What :func:`judge` thinks of a case.

    Args:
        findings: phrases; a case with one is refused, unless the user keeps it by force.
        oriented: whether any of its scans says how it lies.
    """

    findings: tuple[str, ...]
    oriented: bool = True

    def refusal(self, where: str) -> str:
        """The sentence by which the case is refused.

        Args:
            where: how messages name the case.
        """
        return (
            f"{where}: {'; '.join(self.findings)}. Scans are expected skull-stripped, registered "
            "to each other, with background 0: prepare them so, or go on all the same with force "
            "(--force)."
        )

    def notes(self, where: str) -> list[str]:
        """Sentences about a case that is used.

        Args:
            where: how messages name the case.
        """
        silent = f"{where}: {SILENT}, so it was taken as LAS, the standard's rule of old; which "
        notes = [] if self.oriented else [f"{silent}side is left holds only if that is so."]
        return [*notes, *(f"{where}: {text}; went on because of force." for text in self.findings)]


SILENT = "its scans do not say how they lie (qform_code and sform_code are 0)"
"""A phrase."""


def judge(case: CanonicalCase, task: Task, *, odd_one_out: bool = False) -> Verdict:
    """Judge a case: `inspect`, `prepare` and `segment` all ask here.

    Args:
        case: a canonical case.
        task: names of its channels.
        odd_one_out: other cases of its cohort say how they lie; if this one does not, it may be
            mirrored or turned against them.
    """
    findings = implausible(case, task)
    if odd_one_out and not case.oriented:
        findings.append(f"{SILENT}, where other cases of the cohort do")
    return Verdict(tuple(findings), case.oriented)


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
    """The 27 moves that are tried: shifts, turns and mirrorings, one axis at a time."""
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


def misplaced(scans: Mapping[str, npt.NDArray[np.generic]], zooms: tuple[float, ...]) -> list[str]:
    r"""Suspect scans that are not registered to the others, are mirrored, or do not meet them.

    For scan m and each move T, with I the mutual information of intensities over the voxels that
    both have before and after the move,

    .. math:: g_m = \max_T \frac{\sum_{j \ne m} I(x_j, T x_m)}{\sum_{j \ne m} I(x_j, x_m)}

    Of 57 further real cases (BraTS 2018 to 2021 at 2 mm) one is suspected, with 1.24:
    Brats18_CBICA_AQQ_1, whose T2 is turned by 12 degrees indeed. Registered to T1, it shares 0.26
    nats with it instead of 0.08. The others have at most 0.76.

    The seven real cases have max g between 0.33 and 0.89 with all four scans, also where one covers
    half of the brain, and at most 1.02 with two. With one of four shifted by 10 mm it is at least
    1.9, turned by 15 degrees 1.28, mirrored left-right 1.67; by 6 mm, 1.09. A scan of another
    patient in the same atlas space is noticed in 7 of 10 cases only.

    Args:
        scans: modality -> ``[D, H, W]``, all of one shape.
        zooms: voxel size in mm.

    Returns:
        A phrase for the scan with the largest g, if that is above :data:`MAX_GAIN`.
    """
    if len(scans) < 2:
        return []
    coarse, size = _coarse(scans, zooms)
    codes = {name: _quantised(scan) for name, scan in coarse.items()}
    names = list(codes)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            both = np.count_nonzero((codes[name] > 0) & (codes[other] > 0))
            smaller = min(np.count_nonzero(codes[name]), np.count_nonzero(codes[other]))
            if both < 0.25 * smaller:
                return [f"{name} and {other} hardly overlap"]
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


def _gains(
    scan: Codes,
    others: Sequence[Codes],
    size: Sequence[float],
    tried: Iterable[Move],
    every: int = 1,
) -> Iterator[tuple[float, Move]]:
    """The ratio of :func:`misplaced` for moves of one scan, on each ``every``-th of its voxels."""
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


def _coarse(
    scans: Mapping[str, npt.NDArray[np.generic]], zooms: tuple[float, ...]
) -> tuple[dict[str, Volume], list[float]]:
    """Means over the non-zero voxels of blocks of about :data:`COARSE_MM`, and their size.

    Of small voxels every second per axis is read, which is 8 of 64 in a block at 1 mm.
    """
    every = [2 if z <= COARSE_MM / 4 else 1 for z in zooms]
    zooms = tuple(z * e for z, e in zip(zooms, every, strict=True))
    scans = {name: scan[tuple(slice(None, None, e) for e in every)] for name, scan in scans.items()}
    steps = [max(1, round(COARSE_MM / z)) for z in zooms]
    made = {}
    for name, scan in scans.items():
        shape = [n // s for n, s in zip(scan.shape, steps, strict=True)]
        part = tuple(slice(0, n * s) for n, s in zip(shape, steps, strict=True))
        # torch turns float16 into float32 several times faster than numpy.
        whole = torch.from_numpy(np.ascontiguousarray(scan[part])).float().numpy()
        share, mean = (_block_means(v, steps) for v in ((whole != 0).astype(np.float32), whole))
        made[name] = np.where(share > 0.5, mean / np.maximum(share, 1e-6), 0).astype(np.float32)
    return made, [z * s for z, s in zip(zooms, steps, strict=True)]


def _block_means(volume: Volume, steps: Sequence[int]) -> Volume:
    """Means of blocks, one axis after the other: a sum of slices is faster than numpy's mean."""
    for axis, step in enumerate(steps):
        before = (slice(None),) * axis
        parts = (volume[(*before, slice(k, None, step))] for k in range(step))
        volume = functools.reduce(np.add, parts) / np.float32(step)
    return volume


def _quantised(scan: Volume) -> Codes:
    """Bins of equal population, 1 to :data:`BINS`; 0 outside."""
    inside = scan != 0
    if not inside.any():
        return np.zeros(scan.shape, np.int16)
    values = np.sort(scan[inside])  # or np.quantile would part them once for each edge
    edges = np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1])
    return np.where(inside, np.searchsorted(edges, scan) + 1, 0).astype(np.int16)


def _information(scans: Codes, others: Codes, enough: float) -> npt.NDArray[np.float64]:
    """Mutual information of each other scan with all scans, in nats, summed over the scans.

    Entropies are corrected for the number of voxels (Miller and Madow 1955).

    Args:
        scans: ``[scans, voxels]``.
        others: ``[others, voxels]``; voxels where either is 0 do not count.
        enough: scans that have fewer voxels than this do not count.
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
