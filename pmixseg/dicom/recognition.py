"""Recognise which DICOM series is which sequence, with reasons; doubt is reported.

Three things tell: the description, read as file names are; the echo, repetition and inversion time;
whether the header names a contrast agent. Where they contradict each other none is believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from pmixseg.data.scans.sequences import Reading, read_name
from pmixseg.dicom.series import Series, names_of
from pmixseg.errors import InputError

LONG_ECHO_MS = 60.0
SHORT_ECHO_MS = 30.0
FLUID_INVERSION_MS = 1500.0
"""Above it an inversion pulse nulls cerebrospinal fluid (1.5 T and 3 T): FLAIR."""

FEWEST_SLICES = 10
"""A series with fewer is a localiser or a single image."""

NO_SCANS = frozenset(
    {"derived", "localizer", "mip", "mpr", "projection image", "adc", "secondary", "p", "phase"}
    | {f"{what} map" for what in ("density", "diffusion", "phase", "t1", "t2", "velocity")}
    | {"modulus subtract", "phase subtract", "diffusion", "perfusion", "flow_encoded", "stir"}
    | {"proton_density", "tagging", "t2_star", "tof"}
)
"""Values of ImageType and AcquisitionContrast of what is computed or is another image: those of
DICOM PS3.3, and P, by which makers mean phase."""


@dataclass(frozen=True)
class Recognised:
    """What a series was taken for.

    Args:
        series: which.
        modality: sequence of the task; ``None``: it is not used.
        reason: phrase that says why.
        may_be: sequences of the task of which it is one, where it is unclear which.
    """

    series: Series
    modality: str | None
    reason: str
    may_be: tuple[str, ...] = ()

    @property
    def doubtful(self) -> bool:
        """Whether it is a sequence of the task, but unclear which one."""
        return bool(self.may_be)


def recognise(
    series: Sequence[Series], modalities: Sequence[str], chosen: Mapping[str, int] | None = None
) -> list[Recognised]:
    """Tell which series is which sequence.

    ``chosen`` (modality -> series number) is said by the user, and goes before everything else.

    Raises:
        InputError: ``chosen`` names no series or no modality of the task.
    """
    numbers = {s.number: s for s in series}
    for modality, number in (chosen or {}).items():
        if modality not in modalities or number not in numbers:
            raise InputError(
                f"--series {modality}={number}: the task has {', '.join(modalities)}, and the "
                f"study the series {', '.join(map(str, sorted(numbers)))}."
            )
    by_user = {number: modality for modality, number in (chosen or {}).items()}
    recognised = [_recognise_one(s, modalities, by_user.get(s.number)) for s in series]
    # What the user chose takes the place of every other candidate.
    return [
        Recognised(r.series, None, f"another series was chosen as {' and '.join(_taken(r))}")
        if _taken(r) and {*_taken(r)} <= {*(chosen or {})} and r.series.number not in by_user
        else r
        for r in recognised
    ]


def _taken(one: Recognised) -> tuple[str, ...]:
    """Return what a series is or may be."""
    return (one.modality,) if one.modality else one.may_be


def choose(recognised: Sequence[Recognised], modalities: Sequence[str]) -> dict[str, Series]:
    """Return one series per sequence of a model; what it does not read is of no matter."""
    recognised = [r for r in recognised if {*_taken(r)} & {*modalities}]
    if doubtful := [r for r in recognised if r.doubtful]:
        first = doubtful[0]
        raise InputError(
            f"{first.series.label} is not certain: {first.reason}; say what it is with "
            f"--series MODALITY={first.series.number}, or which series to use instead of it."
        )
    # One series for each modality.
    chosen: dict[str, Series] = {}
    for r in recognised:
        assert r.modality is not None  # in doubt it was told above
        if r.modality in chosen:
            both, number = names_of((chosen[r.modality], r.series)), r.series.number
            how = f"choose one with --series {r.modality}={number}"
            if number == chosen[r.modality].number:
                how = "they have one number, so move the files of one away"
            raise InputError(f"two series are {r.modality} ({both}); {how}.")
        chosen[r.modality] = r.series
    if not chosen:
        raise InputError(
            f"no series is a sequence of the model, which reads {', '.join(modalities)}; say which "
            "is what with --series MODALITY=NUMBER."
        )
    return chosen


def visits_apart(series: Iterable[Series]) -> str | None:
    """Say how far apart series of one study were acquired, where it is more than a day."""
    days = {s.acquired: s for s in series if s.acquired}
    first, last = min(days, default=date.min), max(days, default=date.min)
    if (apart := (last - first).days) <= 1:
        return None
    both = f"{days[first].label} and {days[last].label}"
    return f"{both} were acquired {apart} days apart; see that they are of one visit."


def _recognise_one(series: Series, modalities: Sequence[str], said: str | None) -> Recognised:
    """Recognise one series: what the user said, else its description and times together."""
    if said is not None:
        return Recognised(series, said, "said by --series")
    reading = read_name(series.description, modalities)
    if reason := _why_no_scan(series, reading):
        return Recognised(series, None, reason)
    # The names that the task gives the common sequences, and the one that the description means.
    named = {kind: read_name(kind, modalities).modality for kind in ("t1", "t1ce", "t2", "flair")}
    by_name = next((k for k, m in named.items() if m and m == reading.modality), None)
    by_times, times = weighting(series)
    like = {"t1": ("t1", "t1ce"), None: ()}.get(by_times, (by_times,))  # alike to the times

    def unsure(reason: str, *kinds: str) -> Recognised:
        return Recognised(series, None, reason, tuple(m for k in kinds if (m := named[k])))

    if by_name is None and by_times is None:
        return Recognised(series, None, f"neither its description nor its times tell ({times})")
    if by_name and by_times and by_name not in like:
        reason = f"its description says {by_name}, its times say {by_times} ({times})"
        return unsure(reason, by_name, *like)
    # What the times say must fit the description, as FLAIR fits "t2_tirm", and T2 no "ep2d_diff".
    if by_times and by_name is None:
        reading = read_name(f"{by_times} {series.description}", modalities)
    if reading.kind == "other":
        return Recognised(series, None, f"its description: {reading.doubt}")
    if by_times and reading.kind == "unknown":
        reason = f"its times say {by_times} ({times}), its description: {reading.doubt}"
        return unsure(reason, *like)
    # Both agree, or only one of them speaks; a contrast agent has a header field of its own.
    kind = by_name or by_times or ""
    reasons = [*["description"] * bool(by_name), *[times] * bool(by_times)]
    if kind == "t1" and series.agent:
        if by_name and read_name(f"gd {series.description}", modalities).kind == "unknown":
            return unsure("its header names a contrast agent, its description says without", *like)
        kind, reasons = "t1ce", [*reasons, "a contrast agent in the header"]
    elif kind == "t1" and by_name is None:
        reason = f"T1-weighted ({times}), but nothing tells whether with contrast agent"
        return unsure(reason, *like)
    if named[kind] is None:
        return Recognised(series, None, f"{kind}, which this task does not have")
    return Recognised(series, named[kind], ", ".join(reasons))


def _why_no_scan(series: Series, reading: Reading) -> str:
    """Say why a series is no structural scan of the task; nothing if it may be one."""
    if series.modality != "MR":
        return f"no MR image: its modality is {series.modality or 'not told'}"
    if series.slices < FEWEST_SLICES:
        return f"only {series.slices} slices"
    if computed := sorted(NO_SCANS & set(series.kind)):
        return f"image type {computed[0]}"
    if series.diffusion:
        return "diffusion-weighted"
    if reading.kind in ("foreign", "label", "other"):
        return f"its description: {reading.doubt or 'no scan'}"
    return ""


def weighting(series: Series) -> tuple[str | None, str]:
    """Tell ``t1``, ``t2`` or ``flair``, if any, from the times of a series, and put these in words.

    Example:
        >>> weighting(Series("1", 1, "", (), 30, echo=120, repetition=9000, inversion=2500))
        ('flair', 'TE 120, TR 9000, TI 2500 ms')
    """
    named = (("TE", series.echo), ("TR", series.repetition), ("TI", series.inversion))
    words = ", ".join(f"{name} {value:g}" for name, value in named if value is not None)
    words = f"{words} ms" if words else "no times"
    echo, inversion = series.echo, series.inversion
    if echo is None:
        return None, words
    # A long echo is T2 weighting; an inversion that nulls fluid makes it FLAIR.
    if inversion is not None and inversion > FLUID_INVERSION_MS and echo > LONG_ECHO_MS:
        return "flair", words
    if echo > LONG_ECHO_MS and (series.repetition or 0) > 2000 and not inversion:
        return "t2", words
    # A short echo is T1 weighting, by a short repetition or by an inversion pulse.
    prepared = inversion is not None and 300 <= inversion <= FLUID_INVERSION_MS
    if echo < SHORT_ECHO_MS and ((series.repetition or 1e9) < 1000 or prepared):
        return "t1", words
    return None, words
