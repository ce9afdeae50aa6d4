"""Cases of the ablation: phantoms, real scans, and what a protocol takes from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from study import (
    BUDGET,
    COHORT_SEED,
    COHORTS,
    DEFAULT,
    NO_CONTRAST,
    NOT_AT_RANDOM,
    REAL_BUDGET,
    REAL_COHORTS,
    Job,
    budget,
    task,
)

from pmixseg.data.augment import Augmentation
from pmixseg.data.cohorts.layouts import find_cases, load_layout
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.masks import CaseMasks, CovariateMasks, Flags, MaskableCase
from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
from pmixseg.data.phantom.contrast import Scanner
from pmixseg.data.phantom.task import label_codes, write_layout
from pmixseg.data.splits import SplitJson
from pmixseg.data.store.prepare import prepare
from pmixseg.data.store.store import Store
from pmixseg.task import BRATS, format_combination


def make_cohort(work: Path, name: str) -> None:
    """Phantom, store and split of one of the cohorts in ``work / name``; what is there is kept."""
    folder, cohort = work / name, COHORTS[name]
    if (folder / "split.json").is_file():
        return
    cases = BUDGET.train + BUDGET.val + BUDGET.test
    settings = PhantomSettings(
        spacing=BUDGET.spacing,
        shape=BUDGET.shape,
        modalities=cohort.modalities,
        scanner=Scanner(dependence=cohort.dependence),
    )
    names = write_cohort(folder / "cohort", cases, COHORT_SEED, settings)
    grid, own = (BUDGET.spacing,) * 3, cohort.task
    layout = load_layout(write_layout(folder / "cohort", own, label_codes(own, {})))
    found = find_cases(folder / "cohort", own, layout)
    report = prepare(found, folder / "store", own, spacing=grid, progress=False)
    if report.failed:
        raise SystemExit(" ".join(report.failed.values()))
    first, last = BUDGET.train, BUDGET.train + BUDGET.val
    split = {"train": names[:first], "val": names[first:last], "test": names[last:]}
    write_split(folder, split)


def make_real(work: Path, root: Path) -> None:
    """Store of the real cases, and a split per case that is left out; what is there is kept."""
    cases = find_cases(root, BRATS)
    if len(cases) != len(REAL_COHORTS):
        raise SystemExit(f"{root} holds {len(cases)} cases; the study needs {len(REAL_COHORTS)}.")
    grid = (REAL_BUDGET.spacing,) * 3
    report = prepare(cases, work / "real" / "store", BRATS, spacing=grid, progress=False)
    if report.failed:
        raise SystemExit(" ".join(report.failed.values()))
    names = [case.case_id for case in cases]
    for cohort, name in zip(REAL_COHORTS, names, strict=True):
        split = {"train": [n for n in names if n != name], "val": [], "test": [name]}
        write_split(work / cohort, split)


def write_split(folder: Path, split: dict[str, list[str]]) -> None:
    """The last file of a cohort."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "split.json.part"
    part.write_text(json.dumps(split))
    part.replace(folder / "split.json")


def data_module(job: Job, work: Path) -> BraTSDataModule:
    """Augmented patches; what the job's protocol takes from a case for good is not there."""
    folder, own = work / job.cohort, budget(job.cohort)
    return BraTSDataModule(
        store=work / ("real" if job.cohort in REAL_COHORTS else job.cohort) / "store",
        split=SplitJson(folder / "split.json"),
        task=task(job.cohort),
        patch_size=own.shape,
        foreground=0.0 if own.spacing > 2 else 0.5,
        batch_size=own.batch_size,
        augmentation=Augmentation(flip=(0.5, 0.0, 0.0), resample=0.2),
        masks=protocol(job.missing),
        seed=job.seed,
    )


def protocol(name: str, seed: int = 0) -> CaseMasks | None:
    """What a protocol takes from each case for good; nothing for ``uniform``.

    Not at random: half of the cases lack FLAIR, the more so the smaller the tumour, and a third
    each of the others.
    """
    if name == NOT_AT_RANDOM:
        rates = dict.fromkeys(BRATS.modalities, 1 / 3) | {"flair": 0.5}
        return CovariateMasks(rates, {"flair": -2.0}, seed=seed)
    return Without("t1ce") if name == NO_CONTRAST else None


def protocol_weights(work: Path, draws: int = 500) -> pd.DataFrame:
    """How often each test case is seen with each combination when it is missing not at random.

    Args:
        work: folder of the default cohort.
        draws: of the rule, seeds 1 to this: 0 was drawn for training.
    """
    data = data_module(Job("explore", "student", 0, 0), work)
    data.setup("test")
    store = Store.open(work / DEFAULT / "store")
    cases = [store.read(name) for name in store.cases]
    tested = {str(item["case_id"]) for item in data.test_dataloader()}
    counts: Counter[tuple[str, str]] = Counter()
    for seed in range(1, draws + 1):
        rule = protocol(NOT_AT_RANDOM, seed)
        assert rule is not None
        for case, flags in rule.allowed(cases, BRATS.modalities).items():
            if case in tested:
                shown = [m for m, kept in zip(BRATS.modalities, flags, strict=True) if kept]
                counts[case, format_combination(shown)] += 1
    rows = [(case, shown, n / draws) for (case, shown), n in sorted(counts.items())]
    return pd.DataFrame(rows, columns=["case", "combination", "weight"])


class Without(CaseMasks):
    """No case has this modality.

    Args:
        modality: its name.
    """

    def __init__(self, modality: str) -> None:
        self.modality = modality

    def allowed(self, cases: Sequence[MaskableCase], modalities: Sequence[str]) -> dict[str, Flags]:
        """See :class:`CaseMasks`."""
        kept = [m != self.modality for m in modalities]
        return {
            c.case_id: tuple(a and k for a, k in zip(c.acquired, kept, strict=True)) for c in cases
        }
