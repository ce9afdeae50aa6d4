"""Check the scans of a case together: background, spacing, registration, labels.

`inspect`, `prepare` and `segment` ask this one judge, and say what it says in the same words.

Heuristics with thresholds that were chosen on real cases and damaged copies of them. They find
gross mistakes and prove nothing: what passes may still be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pmixseg.data.scans.boxes import bounds
from pmixseg.data.scans.brains import noisy, odd_slices, turned
from pmixseg.data.scans.canonical import CanonicalCase
from pmixseg.data.scans.placement import (
    Overview,
    copies,
    misplaced,
    misplaced_label,
    outlines,
)
from pmixseg.data.scans.sequences import common_sequence
from pmixseg.task import Task

MAX_OUTSIDE = 0.1
"""Largest credible share of a label's voxels where no scan has signal; 72 real cases have none."""

MIN_OUTSIDE = 8
"""Fewer voxels outside are an edge of a coarse grid; no share is taken of them."""

MIN_LENGTH_MM, USUAL_LENGTH_MM, LEAST_WIDTH = 20.0, 100.0, 0.6
"""Least length of what the scans show. 64 brains have 156 to 186 mm, a newborn's has 110; a header
in centimetres that calls them millimetres makes 19 of 186. Between the two it is told, and where
the least of the three is a smaller share of the largest: 64 brains have 0.71 and more, their halves
left-right, or down-up, and those with every second slice, at most 0.49."""

LONGEST_MM, BRIGHTEST = 215.0, 50
"""Length above which specks must lie outside a brain, and distance from the mean, in standard
deviations, that no tissue has: 64 real scans reach 186 mm and 14.5."""

WRONG_UNIT = "so the voxel size in its headers is not in mm, or not that of its voxels"
PERHAPS_A_PART = (
    "shorter than a whole one; if the voxel size in its headers is not that of its voxels, volumes "
    "and distances are wrong"
)
"""What a length below each of the two means; phrases."""

LEAST_LIKENESS = -0.15
"""Least difference of correlation with T1, of FLAIR and of T2; 64 real cases have 0.09 and more.

T1 and T2 look exchanged, or inverted, where T2's bright tail is a smaller multiple of its dark one
than T1's: of 64 real cases it is at least 1.4 times as large."""

LEAST_TAIL, LEAST_ENHANCED = 0.7, 0.5
"""Least ratio of the bright tails of T1ce and T1, for vessels enhance: 64 real cases have 1.08 and
more; and of what is brighter in T1ce to what is brighter in T1: they have 1.41 and more, phantoms
without enhancement 0.7. T1ce falls below both where it is the T1."""

LEAST_ALIKE = 0.25
"""T1 or T1ce looks exchanged if another sequence is correlated with its fellow by this more than it
is: of 64 real cases at most 0.01, of 60 phantoms 0.18. Of the 64 with FLAIR and T1 exchanged 59 are
told, with FLAIR and T1ce 45, with T2 and T1ce all."""

CREDIBLE_FLUID = {"t1": (0.0, 1.65), "t1ce": (0.0, 1.65), "t2": (0.8, math.inf)}
"""Credible ratio of a scan's bright tail to its dark one: fluid is dark in T1 and bright in T2. Of
64 real cases T1 has at most 1.12, T1ce 1.41, T2 at least 1.07; of 98 phantoms 1.53, 1.48, 0.92."""

OPPOSED = 0.0
"""Correlation of T1 and T1ce below which one is inverted or another sequence: 64 real cases have
0.24 and more."""

LARGEST_TREND = 1.4
"""Largest difference of the logarithm of a scan's intensities, by a linear fit, between two ends of
a brain: 64 real cases have at most 1.06, with T1 times 1 to 6 from end to end at least 1.57."""

JUDGED_BLOCKS = 1000
"""Fewer blocks of 4 mm tell nothing about which sequence a scan is."""

LEAST_OUTSIDE, LEAST_BRIGHTER = 0.1, 0.3
"""Two labels look exchanged if the inner one's share of surface that meets healthy tissue is larger
by this than the oedema's, or if the core is brighter by this, in deviations, in T1ce than what
enhances. Of 64 real cases the core's share is smaller by 0.17 and more, the enhancing tumour's by
0.28 and more, and the core darker by 0.63 and more."""

SHIFT_SCANS = 4
"""Fewer scans are not judged for a label that is shifted."""

JUDGED_VOXELS = 50
"""Fewer voxels of a label tell nothing about its surface."""

LARGEST_SHARE = 0.5
"""Largest credible share of a brain that is tumour; the largest of 72 real cases has 0.16."""


def misfit_label(case: CanonicalCase, overview: Overview, task: Task) -> list[str]:
    """Suspect a label that is of other scans, is mirrored or shifted, or marks the brain."""
    part = None if case.label is None else bounds(case.label)
    if case.label is None or part is None:
        tumour = np.zeros((0, 3), np.intp)
    else:
        tumour = np.argwhere(case.label[part.slices]) + part.lo  # its box is a tenth of the scan
    total = case.label_beyond + len(tumour)
    if total == 0:
        return []
    # The overview tells roughly, for exact counts of all scans take their time.
    rough = max(np.count_nonzero(c) for c in overview.codes.values()) * math.prod(overview.blocks)
    extents = [_extent(scan) for scan in case.image] if total > LARGEST_SHARE / 2 * rough else []
    whole = bool(extents) and all(total > LARGEST_SHARE * extent for extent in extents)
    box, shape = case.geometry.box(), case.geometry.grid_shape
    glioma = {"NCR", "ED", "ET"} <= set(task.labels) and len(overview.codes) >= SHIFT_SCANS
    if not whole and (elsewhere := misplaced_label(tumour, box.lo, shape, overview, shifts=glioma)):
        return elsewhere
    inside = np.count_nonzero((case.image[:, *tumour.T] != 0).any(axis=0))
    if total - inside >= max(MIN_OUTSIDE, MAX_OUTSIDE * total):
        outside = 1 - inside / total
        return [f"{outside:.0%} of its label lies where no scan has signal, as that of other scans"]
    if whole:
        share = total / max(extents)
        return [f"its label covers {share:.0%} of the brain, more than a tumour takes"]
    return []


def odd_label(case: CanonicalCase, task: Task) -> list[str]:
    """Remark on a label that is a result or empty, or whose numbers look exchanged.

    Oedema lies outside, and what enhances is bright in T1ce; see :data:`LEAST_OUTSIDE` and
    :data:`LEAST_BRIGHTER`.
    """
    if case.label is None:
        return []
    if case.predicted:
        return [
            "its label was written by pmixseg: a result, and no annotation to train or score on"
        ]
    box = bounds(case.label)
    if box is None:
        vanished = case.label_native is not None and case.label_native.any()
        what = "is too small for voxels of this spacing" if vanished else "marks nothing"
        return [] if case.label_beyond else [f"its label {what}"]
    label = case.label[box.slices]
    counts = np.bincount(label.ravel(), minlength=task.num_classes)
    index = {name: i + 1 for i, name in enumerate(task.labels) if counts[i + 1] >= JUDGED_VOXELS}
    words = "look as if each were the other ({}); see that their numbers in the file are right"
    # Who meets healthy tissue is the oedema.
    contact = _contact_with_healthy(label, task.num_classes)
    for name in ("NCR", "ET"):
        if {name, "ED"} <= set(index):
            more = contact[index[name]] - contact[index["ED"]]
            if more > LEAST_OUTSIDE:
                return [f"{name} and ED {words.format('oedema surrounds the tumour')}"]
    # Who is brighter in T1ce is what enhances.
    contrast = [i for i, name in enumerate(task.modalities) if common_sequence(name) == "t1ce"]
    if {"NCR", "ET"} <= set(index) and contrast and case.acquired[contrast[0]]:
        scan = case.image[contrast[0]][box.slices]
        core, bright = (np.median(scan[label == index[name]]) for name in ("NCR", "ET"))
        if core - bright > LEAST_BRIGHTER:
            return [f"NCR and ET {words.format('what enhances is bright in T1ce')}"]
    return []


def _contact_with_healthy(label: npt.NDArray[np.uint8], classes: int) -> npt.NDArray[np.float64]:
    """Return the share of each class's surface that meets class 0, on a quarter of the lines."""
    part = np.pad(label, 1)
    meets = np.zeros((classes, classes))
    for axis in range(3):
        lines = np.moveaxis(part, axis, 0)[:, ::2, ::2]
        pairs = lines[:-1].astype(np.intp) * classes + lines[1:]
        both = np.bincount(pairs.ravel(), minlength=classes**2).reshape(classes, classes)
        meets += both + both.T
    np.fill_diagonal(meets, 0)
    share: npt.NDArray[np.float64] = meets[:, 0] / np.maximum(meets.sum(axis=1), 1)
    return share


def _extent(scan: npt.NDArray[np.generic]) -> int:
    """Count voxels that are not 0; numpy counts integers ten times faster than float16."""
    # Without the sign, since -0 is 0.
    return int(np.count_nonzero(scan.view(f"u{scan.itemsize}") << 1))


@dataclass(frozen=True)
class Verdict:
    """What :func:`judge` thinks of a case.

    Args:
        findings: phrases; a case with one is refused, unless the user keeps it by force.
        oriented: whether any of its scans says how it lies.
        remarks: phrases about a case that is used all the same, but may not be what it seems.
    """

    findings: tuple[str, ...]
    oriented: bool = True
    remarks: tuple[str, ...] = ()

    def refusal(self, where: str) -> str:
        """Return the sentence by which the case is refused."""
        return (
            f"{where}: {'; '.join(self.findings)}. Scans are expected skull-stripped, registered "
            "to each other, with background 0: prepare them so, or go on all the same with force "
            "(--force)."
        )

    def notes(self, where: str) -> list[str]:
        """Return sentences about a case that is used."""
        notes = [] if self.oriented else [f"{where}: its scans {TAKEN_AS_LAS}"]
        notes += [f"{where}: {text}." for text in self.remarks]
        return [*notes, *(f"{where}: {text}; went on because of force." for text in self.findings)]


SILENT = "do not say how they lie (qform_code and sform_code are 0)"
TAKEN_AS_LAS = (
    f"{SILENT}, so they were taken as LAS, the standard's rule of old; which side is left holds "
    "only if that is so."
)
"""Ends of sentences about scans."""


def judge(case: CanonicalCase, task: Task, *, odd_one_out: bool = False) -> Verdict:
    """Judge a case: `inspect`, `prepare` and `segment` all ask here.

    With ``odd_one_out``, other cases of its cohort say how they lie; if this one does not, it may
    be mirrored or turned against them.
    """
    pairs = zip(task.modalities, case.image, case.acquired, strict=True)
    scans = {name: scan for name, scan, there in pairs if there}
    overview = Overview.of(scans, case.geometry.grid_spacing)
    label = misfit_label(case, overview, task)
    size = f"its brain is {' × '.join(f'{e:.3g}' for e in case.extent)} mm"
    too_small = [f"{size}, {WRONG_UNIT}"] if max(case.extent) < MIN_LENGTH_MM else []
    # Findings refuse the case; the slow search for a better place comes where there is no other.
    findings = [*case.doubts, *too_small, *noisy(overview.codes), *copies(overview), *label]
    findings = findings or misplaced(overview)
    if odd_one_out and not case.oriented:
        findings.append(f"its scans {SILENT}, where other cases of the cohort do")
    if findings:
        return Verdict(tuple(findings), case.oriented)
    # Remarks are told, and the case is used.
    remarks, length = [], max(case.extent)
    if length > LONGEST_MM:
        remarks.append(f"{size}, longer than any; look for voxels outside of it that are not 0")
    elif length < USUAL_LENGTH_MM or min(case.extent) < LEAST_WIDTH * length:
        remarks.append(f"{size}, {PERHAPS_A_PART}")
    else:
        remarks += turned(np.any([c > 0 for c in overview.codes.values()], axis=0), case.extent)
    slices: list[str] = []
    for name, scan in scans.items():
        spread = case.statistics[name][1]
        slices += speck(scan, name) or odd_slices(scan, case.geometry.grid_spacing, spread, name)
    remarks += slices or outlines(overview)
    remarks += uneven(overview, case.statistics) or exchanged(overview)
    remarks += odd_label(case, task)
    return Verdict((), case.oriented, tuple(remarks))


def speck(scan: npt.NDArray[np.generic], name: str) -> list[str]:
    """Remark on a voxel that is far brighter than the brain."""
    # As whole numbers without the sign: numpy compares halves of floats slowly.
    bits = f"u{scan.itemsize}"
    if (scan.view(bits) << 1).max() <= np.array(BRIGHTEST, scan.dtype).view(bits) << 1:
        return []
    return [
        f"{name} has a voxel more than {BRIGHTEST} standard deviations from its mean, so all "
        "others are pressed together; look for an artefact, and replace it"
    ]


def uneven(overview: Overview, statistics: Mapping[str, tuple[float, float]]) -> list[str]:
    """Remark on a scan that is far brighter at one end of the brain than at the other.

    ``statistics`` are those of the case, by which z-scores are intensities.
    """
    remarks = []
    for name, volume in overview.volumes.items():
        places, (mean, deviation) = np.argwhere(volume), statistics[name]
        values = volume[volume != 0].astype(np.float64) * deviation + mean
        if len(values) < JUDGED_BLOCKS or values.min() <= 0:
            continue
        lines = np.column_stack([np.ones(len(values)), places])
        fit, *_ = np.linalg.lstsq(lines, np.log(values), rcond=None)
        if (trend := float(np.ptp(lines @ fit))) > LARGEST_TREND:
            remarks.append(
                f"{name} is {math.exp(trend):.0f} times as bright at one end of the brain as at "
                "the other; correct its bias field, for one with N4"
            )
    return remarks


def _tails(values: npt.NDArray[np.float32], low: float, high: float = 0.999) -> tuple[float, float]:
    """Say how far a high quantile lies above the median, and a low one below it."""
    dark, middle, bright = np.quantile(values, [low, 0.5, high])
    return float(bright - middle), max(float(middle - dark), 1e-6)


def exchanged(overview: Overview) -> list[str]:
    """Remark on two sequences that look like each other, and on T1 or T2 that looks like neither.

    Fluid is dark in T1 and bright in T2, but not in FLAIR; vessels are bright in T1ce alone.
    """
    names = {common_sequence(name): name for name in overview.codes}
    inside = np.all([codes > 0 for codes in overview.codes.values()], axis=0)
    if np.count_nonzero(inside) < JUDGED_BLOCKS:
        return []
    codes = {kind: overview.codes[name][inside] for kind, name in names.items()}
    volumes = {kind: overview.volumes[name][inside] for kind, name in names.items()}
    there, pairs = set(names), []
    opposed = {"t1", "t1ce"} <= there and _alike(codes, "t1", "t1ce") < OPPOSED
    if {"t1", "t2", "flair"} <= there and not opposed and _flair_is_t2(codes):
        pairs.append(("flair", "t2", "fluid is bright in the first, dark in the second", ""))
    if {"t1", "t2"} <= there and not pairs and _t1_is_t2(volumes):
        why = "fluid is dark in the first, bright in the second"
        pairs.append(("t1", "t2", why, ", and dark and bright"))
    if {"t1", "t1ce"} <= there and _t1ce_is_t1(volumes):
        pairs.append(("t1", "t1ce", "what enhances is bright in the first alone", ""))
    if pairs:
        words = "look as if each were the other"
        return [
            f"{names[one]} and {names[other]} {words} ({why}); see that their names are right{also}"
            for one, other, why, also in pairs
        ]
    if opposed:
        return [
            f"{names['t1']} and {names['t1ce']} are each bright where the other is dark, as if one "
            "were inverted or another sequence; see that their names are right, and dark and bright"
        ]
    return _stranger(codes, names) or _odd_fluid(volumes, names)


Values = Mapping[str | None, npt.NDArray[Any]]
"""Common sequence -> its bins, or means, in the blocks that all scans show."""


def _alike(codes: Values, one: str, other: str) -> float:
    return float(np.corrcoef(codes[one], codes[other])[0, 1])


def _flair_is_t2(codes: Values) -> bool:
    """Say whether T2 resembles T1 more than FLAIR does."""
    return _alike(codes, "t1", "flair") - _alike(codes, "t1", "t2") < LEAST_LIKENESS


def _t1_is_t2(volumes: Values) -> bool:
    """Say whether fluid lies on the bright side of T1, and on the dark one of T2."""
    dark, bright = (np.divide(*_tails(volumes[kind], 0.02, 0.98)) for kind in ("t1", "t2"))
    return bool(bright < dark)


def _t1ce_is_t1(volumes: Values) -> bool:
    """Say whether vessels are bright in T1, not in T1ce."""
    plain, enhanced = volumes["t1"], volumes["t1ce"]
    scaled = [(v - np.median(v)) / max(float(v.std()), 1e-6) for v in (plain, enhanced)]
    brighter, darker = _tails(scaled[1] - scaled[0], 0.001)
    own, other = (np.divide(*_tails(v, 0.05)) for v in (enhanced, plain))
    return bool(brighter < LEAST_ENHANCED * darker and own < LEAST_TAIL * other)


def _stranger(codes: Values, names: Mapping[str | None, str]) -> list[str]:
    """Remark on T1 or T1ce where T2 or FLAIR resembles it more than they do each other."""
    others = [kind for kind in ("t2", "flair") if kind in names]
    if not {"t1", "t1ce"} <= set(names) or not others:
        return []
    pair = ["t1", "t1ce"]
    alike = np.corrcoef([codes[kind] for kind in (*pair, *others)])
    more = alike[:2, 2:] - alike[0, 1]
    if more.max() <= LEAST_ALIKE:
        return []
    own, other = divmod(int(more.argmax()), len(others))
    return [
        f"{names[pair[own]]} resembles {names[others[other]]} more than {names[pair[1 - own]]}, as "
        "if two sequences were exchanged; see that their names are right"
    ]


def _odd_fluid(volumes: Values, names: Mapping[str | None, str]) -> list[str]:
    """Remark on sequences in which fluid is not as dark or bright as theirs is."""
    remarks = []
    for kind in (k for k in CREDIBLE_FLUID if k in names):
        ratio = np.divide(*_tails(volumes[kind], 0.1, 0.9))
        least, most = CREDIBLE_FLUID[kind]
        if not least <= ratio <= most:
            remarks.append(
                f"{names[kind]} shows fluid {'bright' if ratio > most else 'dark'}, as another "
                "sequence does; see that its name is right, and dark and bright"
            )
    return remarks
