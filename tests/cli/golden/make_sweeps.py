"""Validate and expand the sweep files with W&B's own engine; writes sweeps.json beside itself.

In an environment of its own, since ``sweeps`` needs numpy < 2::

    python -m venv /tmp/sweeps && /tmp/sweeps/bin/pip install sweeps==0.3.0
    /tmp/sweeps/bin/python tests/cli/golden/make_sweeps.py
"""

import json
import random
from pathlib import Path

import numpy as np
import sweeps
import yaml
from sweeps.config import SweepConfig

HERE = Path(__file__).parent
FOLDER = HERE.parents[2] / "experiments" / "sweeps"
DRAWS = 6


def observed(number: int, config: dict) -> sweeps.SweepRun:
    """A finished run for the Gaussian process, its score a made-up function of its number."""
    score = 0.5 + 0.1 * np.sin(number)
    return sweeps.SweepRun(
        name=str(number),
        config=config,
        state=sweeps.RunState.finished,
        summary_metrics={"val/dice": float(score)},
        history=[{"val/dice": float(score)}],
    )


def expand(path: Path) -> dict:
    """The file as it was read, and the arguments of its runs."""
    raw = yaml.safe_load(path.read_text())
    config = SweepConfig(raw)  # raises if the schema is not met
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # the engine draws from NumPy's global state
    runs: list[sweeps.SweepRun] = []
    while len(runs) < (1000 if raw["method"] == "grid" else DRAWS):
        run = sweeps.next_run(config, runs, validate=True)
        if run is None:
            break
        runs.append(observed(len(runs), run.config))
    expanded = {"sweep": raw, "runs": [run.config for run in runs]}
    if "early_terminate" in raw:
        poor = sweeps.SweepRun(
            name="poor",
            config=runs[0].config,
            state=sweeps.RunState.running,
            history=[{"val/dice": 0.01}] * 4,
        )
        good = [
            sweeps.SweepRun(
                name=f"good{k}",
                config=runs[0].config,
                state=sweeps.RunState.running,
                history=[{"val/dice": 0.6 + 0.01 * k}] * 4,
            )
            for k in range(5)
        ]
        expanded["stopped"] = [run.name for run in sweeps.stop_runs(config, [*good, poor])]
    return expanded


def main() -> None:
    """Write the golden file."""
    golden = {path.name: expand(path) for path in sorted(FOLDER.glob("*-*.yaml"))}
    golden["engine"] = "sweeps 0.3.0"
    (HERE / "sweeps.json").write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
