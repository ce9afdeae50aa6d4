"""Tables of a study, from what its runs left; the plan says which tables, and what each compares.

Every function takes the results and the entry of the plan's ``tables``, and returns Markdown.
Common keys of an entry: ``group``; ``arms`` (default: all of the group); ``shown``: a sequence that
every scored combination must hold, where the endpoint is about that sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set

import numpy as np
import pandas as pd

from experiments.study.results import StudyResults
from experiments.study.tables import (
    Entry,
    arm_names,
    endpoint,
    figure,
    gap,
    interval,
    markdown,
    measured,
    percent,
    scored,
    spell,
)
from pmixseg.errors import InputError, count_of
from pmixseg.evaluation.comparison.compare import compare
from pmixseg.evaluation.comparison.paired_tests import holm, paired_t, two_way_bootstrap


def arms(results: StudyResults, entry: Entry) -> str:
    """Means of every arm: endpoint with its spread over blocks, regions, number of sequences."""
    names = arm_names(results, entry)
    blocks = results.whole_blocks(entry["group"], names)
    tables = {name: pd.concat(scored(results, entry, name, blocks)) for name in names}
    regions = list(dict.fromkeys(str(r) for t in tables.values() for r in t["region"].unique()))
    sizes = sorted({int(n) for t in tables.values() for n in t["n_present"].unique()})
    rows = []
    for name, table in tables.items():
        each = [t["dice"].mean() for t in scored(results, entry, name, blocks)]
        by_region = table.groupby("region", observed=True)["dice"].mean()
        by_size = table.groupby("n_present")["dice"].mean()
        spread = percent(float(np.std(each, ddof=1))) if len(each) > 1 else "–"
        cells = [percent(by_region[r]) for r in regions]
        cells += [percent(by_size[n]) if n in by_size else "–" for n in sizes]
        rows.append([name, percent(float(np.mean(each))), spread, *cells])
    shown = [f"{n} shown" if n == sizes[0] else str(n) for n in sizes]
    return markdown(["arm", "mean Dice, %", "SD over seeds", *regions, *shown], rows)


def each(results: StudyResults, entry: Entry) -> str:
    """Mean Dice of every arm, and of every block that has ended."""
    rows = []
    for name in arm_names(results, entry):
        blocks = list(results.arm(entry["group"], name)["block"].unique())
        means = [float(t["dice"].mean()) for t in scored(results, entry, name, blocks)]
        rows.append([name, percent(float(np.mean(means))), ", ".join(map(percent, means))])
    blocks = list(dict.fromkeys(results.group(entry["group"])["block"]))
    return markdown(["arm", "mean Dice, %", ", ".join(blocks)], rows)


def cases(results: StudyResults, entry: Entry) -> str:
    """Mean Dice of every case, over combinations, regions and whole blocks, a column per arm."""
    names = arm_names(results, entry)
    blocks = results.whole_blocks(entry["group"], names)
    columns = [endpoint(results, entry, name, blocks).mean(axis=0) for name in names]
    listed = dict.fromkeys(scored(results, entry, names[0], blocks)[0]["case"].astype(str))
    rows = [[case, *map(percent, row)] for case, *row in zip(listed, *columns, strict=True)]
    return markdown(["case", *names], rows)


def contrasts(entry: Entry) -> dict[str, dict[str, float]]:
    """Name of each comparison -> arm -> weight; a pair ``[a, b]`` is a − b."""
    named: dict[str, dict[str, float]] = {}
    for item in entry["contrasts"]:
        if isinstance(item, Mapping):
            named[str(item["name"])] = {str(k): float(v) for k, v in item["weights"].items()}
        else:
            named[f"{item[0]} − {item[1]}"] = {item[0]: 1.0, item[1]: -1.0}
    return named


def tests(results: StudyResults, entry: Entry) -> str:
    """Paired t over matched trainings for every contrast; interval, bootstrap, Holm.

    ``planned`` is the number of blocks that the plan asks for: fewer are said.
    """
    rows, p_values = [], []
    used: dict[str, int] = {}
    for name, weights in contrasts(entry).items():
        blocks = results.whole_blocks(entry["group"], entry.get("arms") or list(weights))
        parts = [w * endpoint(results, entry, arm, blocks) for arm, w in weights.items()]
        differences = np.sum(parts, axis=0)
        used[", ".join(blocks)] = differences.shape[1]
        test, drawn = paired_t(differences), two_way_bootstrap(differences)
        p_values.append(test.p)
        rows.append(
            [
                name,
                percent(test.difference, signed=True),
                interval(test.interval),
                interval(drawn),
                figure(test.p),
                "",
                "–" if np.isnan(test.detectable) else f"{100 * test.detectable:.2f}",
                " ".join(f"{100 * d:+.1f}" for d in differences.mean(axis=1)),
            ]
        )
    for row, corrected in zip(rows, holm(np.array(p_values)), strict=True):
        row[5] = figure(corrected)
    header = [
        "A − B",
        "difference, points",
        "95 % (paired t)",
        "95 % (bootstrap, seeds × cases)",
        "p",
        "p, Holm",
        "detectable, points",
        "per seed",
    ]
    notes = [f"Seeds {blocks}; {cases} cases." for blocks, cases in used.items()]
    planned = entry.get("planned", 0)
    if any(len(blocks.split(", ")) < planned for blocks in used):
        notes.insert(0, f"Fewer than the {planned} seeds planned.")
    notes.append("Detectable: the difference that four in five such studies would find.")
    return markdown(header, rows) + "\n\n" + " ".join(notes)


def verdict(results: StudyResults, entry: Entry) -> str:
    """Say what the interval of each contrast shows, by a rule that the plan fixed before the run.

    ``worth`` is the smallest gain, in points, that would be worth having.
    """
    worth = float(entry["worth"])
    gain = f"A gain of {worth:g} point{'s' * (worth != 1)}"
    sentences = []
    for name, weights in contrasts(entry).items():
        blocks = results.whole_blocks(entry["group"], entry.get("arms") or list(weights))
        by_arm = [w * endpoint(results, entry, arm, blocks) for arm, w in weights.items()]
        test = paired_t(np.sum(by_arm, axis=0))
        low, high = (100 * end for end in test.interval)
        many = f"{len(blocks)} seeds" if len(blocks) > 1 else "one seed"
        measured = f"{percent(test.difference, True)} points ({interval(test.interval)}; {many})."
        if np.isnan(low):
            said = f"not decided.** {measured} Without an interval nothing follows."
        elif low > 0:
            said = f"helps.** {measured}"
        elif high < 0:
            said = f"harms.** {measured}"
        elif high < worth:
            said = f"refuted.** {measured} {gain} or more is excluded."
        else:
            seen = (
                f"{100 * test.detectable:.1f} points would have been seen in four of five studies"
            )
            said = f"not decided.** {measured} {gain} is not excluded; {seen}."
        sentences.append(f"- **{name}: {said}")
    return "\n".join(sentences)


def parts(results: StudyResults, entry: Entry) -> str:
    """Differences of pairs by region and number of sequences; how many cells pass Holm."""
    rows, cells = [], 0
    regions: list[str] = []
    sizes: list[int] = []
    for a, b in entry["contrasts"]:
        blocks = results.whole_blocks(entry["group"], entry.get("arms") or [a, b])
        sides = (scored(results, entry, arm, blocks) for arm in (a, b))
        table = compare(*sides).exploratory
        by_region = table.groupby("region", observed=True)["difference"].mean()
        by_size = table.groupby("n_present")["difference"].mean()
        regions = regions or list(dict.fromkeys(map(str, table["region"])))
        sizes = sizes or sorted(int(n) for n in by_size.index)
        passed = table[table["p_holm"] < 0.05]
        better = int((passed["difference"] > 0).sum())
        cells = len(table)
        rows.append(
            [
                f"{a} − {b}",
                *(percent(by_region[r], True) for r in regions),
                *(percent(by_size[n], True) for n in sizes),
                f"{better} better, {len(passed) - better} worse",
            ]
        )
    shown = [f"{n} shown" if n == sizes[0] else str(n) for n in sizes]
    header = ["A − B", *regions, *shown, f"of {cells} cells with p (Holm) < 0.05"]
    return markdown(header, rows)


def differences(results: StudyResults, entry: Entry) -> str:
    """Exploratory arms: mean Dice, difference from the arm that each is compared with, and gap."""
    group = results.group(entry["group"])
    blocks = results.whole_blocks(entry["group"])
    rows = []
    regions: list[str] = []
    for name in arm_names(results, entry):
        own = group[group["arm"] == name].set_index("block")
        if own["against"].isna().all():
            continue
        against = str(own["against"].iloc[0])
        tables = scored(results, entry, name, blocks)
        means = [float(t["dice"].mean()) for t in tables]
        base = [float(t["dice"].mean()) for t in scored(results, entry, against, blocks)]
        by_region = pd.concat(tables).groupby("region", observed=True)["dice"].mean()
        regions = regions or list(dict.fromkeys(map(str, tables[0]["region"])))
        shift = [100 * (x - y) for x, y in zip(means, base, strict=True)]
        rows.append(
            [
                name,
                percent(float(np.mean(means))),
                *(percent(by_region[r]) for r in regions),
                f"{np.mean(shift):+.2f}",
                " ".join(f"{value:+.2f}" for value in shift),
                *_coarsest(own.loc[blocks], ("ratio", _rank(own))),
            ]
        )
    header = ["trained", "mean Dice, %", *regions, "against", "per seed"]
    return markdown([*header, "gap, coarsest level", "rank within a sequence"], rows)


def _rank(rows: pd.DataFrame) -> str:
    """Which rank was measured: the older studies pooled the sequences."""
    return "rank_within" if measured(rows, "gap", "rank_within") else "effective_rank"


def _coarsest(rows: pd.DataFrame, measures: Sequence[str]) -> list[str]:
    """Means of measures at the coarsest level that has them."""
    cells = []
    for measure in measures:
        columns = [c for c in measured(rows, "gap", measure) if rows[c].notna().all()]
        cells.append(spell(measure, float(rows[columns[-1]].mean())) if columns else "–")
    return cells


def figures(results: StudyResults, entry: Entry) -> str:
    """Columns of the trainings, mean over blocks: seconds, losses, learned weights."""
    columns = list(entry["columns"])
    rows = []
    for name in arm_names(results, entry):
        own = results.arm(entry["group"], name)
        cells = [own[c].mean() if c in own else float("nan") for c in columns]
        rows.append([name, *(figure(value) for value in cells)])
    return markdown(["trained", *columns], rows)


TABLES: dict[str, Callable[[StudyResults, Entry], str]] = {
    "arms": arms,
    "each": each,
    "cases": cases,
    "tests": tests,
    "verdict": verdict,
    "parts": parts,
    "differences": differences,
    "gap": gap,
    "figures": figures,
}
"""Kind of a table in a plan -> what makes it."""


NOTHING = "No seed has ended."
OPEN = ("verdict", "arms", "tests")
"""Kinds of tables that answer the question; a page folds all others."""


SHARED, OWN = ("arms", "cases", "differences"), ("gap", "figures")
"""Kinds of tables over the seeds that all arms have, and over all seeds of each."""


def seeds_of(results: StudyResults, entry: Entry) -> str:
    """Say which seeds a table is over, where its arms have not the same; else nothing."""
    names = arm_names(results, entry) if entry["kind"] in (*SHARED, *OWN) else []
    own = {name: set(results.arm(entry["group"], name)["block"]) for name in names}
    if all(blocks == own[names[0]] for blocks in own.values()):
        return ""
    if entry["kind"] in SHARED:
        blocks = ", ".join(results.whole_blocks(entry["group"], names))
        return f"\n\nSeeds {blocks}, which all of these arms have."
    counts = "; ".join(f"{name} {len(blocks)}" for name, blocks in own.items())
    return f"\n\nMeans over all seeds of each: {counts}."


def analyse(
    results: StudyResults,
    entries: Sequence[Entry],
    planned: Set[str] = frozenset(),
    fold: bool = False,
) -> str:
    """Make every table of a plan, each under its title.

    Args:
        results: what ended.
        entries: the plan's tables.
        planned: groups that are still trained: a table of one without a whole block says so, and
            a group that has not begun is one line instead of its tables.
        fold: close the tables that are not of a kind in :data:`OPEN`; a click opens them.

    Raises:
        InputError: a kind of table, a group or an arm that there is not.
    """
    sections = []
    begun = set(results.trainings["group"])
    later = dict.fromkeys(e["group"] for e in entries if e["group"] in planned - begun)
    for entry in entries:
        if entry["kind"] not in TABLES:
            raise InputError(
                f"table '{entry['title']}': no kind '{entry['kind']}'; use one of "
                f"{', '.join(TABLES)}."
            )
        if entry["group"] in later:
            continue
        waits = entry["group"] in planned and not has_ended(results, entry)
        text = NOTHING
        if not waits:
            text = TABLES[entry["kind"]](results, entry) + seeds_of(results, entry)
        if fold and entry["kind"] not in OPEN:
            text = folded(text)
        sections.append(f"### {entry['title']}\n\n{text}")
    if later:
        sections.append(f"Not run: {', '.join(later)}.")
    return "\n\n".join(sections)


def folded(text: str) -> str:
    """Put a table into an element that a click opens; what stands below it stays."""
    table, gap, below = text.partition("\n\n")
    rows = table.count("\n") - 1
    if not table.startswith("|"):
        return text
    opened = f'<details markdown="1"><summary>{count_of(rows, "row")}</summary>'
    return f"{opened}\n\n{table}\n\n</details>{gap}{below}"


def has_ended(results: StudyResults, entry: Entry) -> bool:
    """Whether a block of every arm that a table needs is whole."""
    if entry["group"] not in set(results.trainings["group"]):
        return False
    needed = list(entry.get("arms") or ())
    if "contrasts" in entry:
        needed += [arm for weights in contrasts(entry).values() for arm in weights]
    return bool(results.whole_blocks(entry["group"], needed or None))
