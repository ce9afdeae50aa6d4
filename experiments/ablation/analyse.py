"""Tables of the ablation from ``results/``: written into README.md between its two markers.

python experiments/ablation/analyse.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import confirmatory
import exploratory
import grid
import real
from arms import ANCHORS, ARMS, SEEDS, alignment_jobs, curve_jobs, distillation_jobs
from choice import choose, choose_distillation
from results import Results
from study import REAL_COHORTS

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def sections(results: Results) -> list[tuple[str, str]]:
    """Titles and tables of what there is so far."""
    found = []
    if any(map(results.has, curve_jobs())):
        found.append(("Where the curve is flat (student alone)", grid.curve(results)))
    if not all(results.has(job) for _, job in distillation_jobs()):
        return found
    told = choose_distillation(results.folder)
    found.append(
        (f"λ of distillation on validation cases: {told:g} chosen", grid.distillation(results))
    )
    if not all(results.has(job) for *_, job in alignment_jobs(told)):
        return found
    weights = choose(results.folder)
    chosen = ", ".join(f"{arm} {value:g}" for arm, value in weights.alignment.items())
    found.append(
        (f"λ of alignment on validation cases: {chosen} chosen", grid.alignment(results, told))
    )
    seeds = confirmatory.whole_seeds(results, weights)
    if len(seeds) > 1:
        named = ", ".join(map(str, seeds))
        tested = confirmatory.comparisons(results, seeds)
        few = f"Fewer than the {len(SEEDS)} seeds planned. " if len(seeds) < len(SEEDS) else ""
        told_more = (
            f"{few}Seeds {named}; {len(next(iter(tested.values())).cases)} test cases. Detectable: "
            "the difference that four in five such studies would find."
        )
        teachers = ("teacher-none", *(f"teacher-{a}" for a in ANCHORS))
        found += [
            (
                f"Arms: {len(seeds)} of {len(SEEDS)} planned seeds ended ({named})",
                confirmatory.arms(results, seeds),
            ),
            (
                "Confirmatory tests of the primary endpoint",
                f"{confirmatory.primary(tested)}\n\n{told_more}",
            ),
            ("Exploratory: where the differences lie", confirmatory.exploratory(tested)),
            ("Gap of the teachers", confirmatory.gaps(results, seeds, teachers)),
            ("Gap of the students", confirmatory.gaps(results, seeds, ("alone", *ARMS[1:]))),
            ("Teachers", confirmatory.teachers(results, seeds)),
            ("Learned mixture weights of the teachers", confirmatory.mixture(results, seeds)),
            ("Cost of the training", confirmatory.costs(results, seeds)),
        ]
    folds = real.whole_folds(results)
    if folds:
        title = f"Real scans: {len(folds)} of {len(REAL_COHORTS)} cases left out, no inference"
        found.append((title, real.cases(results, folds)))
    return found + exploratory.tables(results, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    args = parser.parse_args()
    parts = [f"### {title}\n\n{table}" for title, table in sections(Results(args.results))]
    text = args.readme.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{args.readme} lacks the lines {BEGIN} and {END}.")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    args.readme.write_text("\n\n".join([head + BEGIN, *parts, END + tail]))
    print(f"{args.readme}: {len(parts)} tables")


if __name__ == "__main__":
    sys.exit(main())
