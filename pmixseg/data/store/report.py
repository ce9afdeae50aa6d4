"""Report what became of every case of a cohort that was prepared."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pmixseg.data.cohorts.problems import grouped, ignored_lines, listed
from pmixseg.errors import count_of


@dataclass
class PrepareReport:
    """Report what became of every case that was to be prepared.

    Args:
        store: the store's folder.
        prepared: cases written by this call.
        kept: cases whose stored copy was up to date.
        failed: case -> the sentence that says why; a failed case is not in the store.
        notes: case -> sentences about a case that is in the store all the same.
        ignored: case -> number in its label file that became background -> voxels of it.
        unlabelled: cases in the store without a label.
        gone: cases that were prepared into the store before, are not among these, and whose
            source is where it was no longer; they are still split and trained on.
        elsewhere: the same, but their source is still there: another cohort's, as a rule.
        otherwise: cases that were prepared into the store with other parameters; while it has those
            of this call, nobody trains on them.
        pruned: cases that were gone and have been removed from the store.
        cohort: sentences about the cohort as a whole.
        seconds: wall time.
    """

    store: Path
    prepared: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: dict[str, dict[int, int]] = field(default_factory=dict)
    unlabelled: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    otherwise: list[str] = field(default_factory=list)
    pruned: list[str] = field(default_factory=list)
    cohort: tuple[str, ...] = ()
    seconds: float = 0.0

    def summary(self) -> str:
        """Return one line per fact; the cases that were left out last."""
        done = f"{len(self.prepared)} prepared, {len(self.kept)} up to date"
        lines = [
            f"{self.store}: {done}, {len(self.failed)} left out, in {self.seconds:.1f} s",
            *self.cohort,
            *ignored_lines(self.ignored),
            *grouped((case, text) for case, texts in self.notes.items() for text in texts),
        ]
        remove = "; remove them with --prune (prepare(..., prune=True))"
        again = "; prepare them again alike, or into a store of their own"
        other = "another spacing, dtype or normalisation"
        for cases, what, advice in (
            (self.unlabelled, "without a label, so of no use for training", ""),
            (self.pruned, "removed, for their sources are gone", ""),
            (self.gone, "still in the store and used, though their sources are gone", remove),
            (self.elsewhere, "also in the store, from other folders or under another layout", ""),
            (self.otherwise, f"no longer used, being prepared with {other}", again),
        ):
            lines += [f"{what}: {listed(cases)}{advice}"] if cases else []
        lines += [f"left out: {line}" for line in grouped(self.failed.items())]
        if self.failed:
            usable = len(self.prepared) + len(self.kept) - len(self.unlabelled)
            failed = count_of(len(self.failed), "case is", "cases are")
            others = count_of(usable, "other can", "others can") if usable else "no other can"
            lines.append(f"exit code 1: {failed} not in the store; {others} be trained on")
        return "\n".join(lines)
