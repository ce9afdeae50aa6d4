"""Tables of the gap between sequences: what the latents of a study's trainings came to."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from experiments.study.results import StudyResults
from experiments.study.tables import Entry, arm_names, markdown, spell
from pmixseg.evaluation.gap.guards import low_guards


def gap(results: StudyResults, entry: Entry) -> str:
    """Measures of the latents after training (and, where known, before), mean over blocks.

    ``references`` names for an arm the one without alignment; the table then counts the blocks in
    which a guard is lost against that arm (docs/method/theory.md).
    """
    names = arm_names(results, entry)
    rows = []
    chosen = list(entry.get("measures") or ())
    references = entry.get("references") or {}
    for name in names:
        own = results.arm(entry["group"], name)
        # Students that see one sequence have a row each; a measure between sequences is missing.
        levels = list(
            dict.fromkeys(
                c.split("/")[1] for c in own if c.startswith("gap/level") and own[c].notna().any()
            )
        )
        for level in sorted(levels):
            known = [c.split("/", 2)[2] for c in own if c.startswith(f"gap/{level}/")]
            chosen = chosen or known
            cells = []
            for measure in chosen:
                after = own.get(f"gap/{level}/{measure}", pd.Series(dtype=float)).mean()
                before = own.get(f"gap_before/{level}/{measure}", pd.Series(dtype=float)).mean()
                was = f"{before:.2f} → " if measure == "ratio" and not np.isnan(before) else ""
                cells.append(was + spell(measure, float(after)))
            if references:
                cells.append(collapses(results, entry["group"], name, references, level))
            rows.append([name, level.removeprefix("level"), *cells])
    more = ["collapsed"] if references else []
    return markdown(["trained", "level", *(m.replace("_", " ") for m in chosen), *more], rows)


def collapses(
    results: StudyResults, group: str, arm: str, references: Mapping[str, str], level: str
) -> str:
    """In how many blocks a guard is too low, of those that the arm and its reference share."""
    if arm not in references:
        return "–"
    own = results.arm(group, arm).set_index("block")
    other = results.arm(group, references[arm]).set_index("block")
    shared = [block for block in own.index if block in other.index]
    guards = {f"gap/{level}/{name}": name for name in ("rank_within", "decodability")}
    known = [column for column in guards if column in own and column in other]

    def values(rows: pd.DataFrame, block: str) -> dict[str, float]:
        return {guards[column]: float(rows.loc[block, column]) for column in known}

    low = [bool(low_guards(values(own, block), values(other, block))) for block in shared]
    return f"{sum(low)} of {len(shared)}"
