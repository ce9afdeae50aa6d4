"""Makes surface_distance.json: surface Dice at 1 mm by the surface-distance package (PyPI, 0.1).

That package needs numpy < 2 and scipy < 1.11, so it cannot be installed beside pmixseg:

    python3.10 -m venv oracle
    oracle/bin/pip install surface-distance==0.1 "numpy<2" "scipy<1.11"
    oracle/bin/python tests/evaluation/scores/golden/make_surface_distance.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import surface_distance

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[3]))
from tests.evaluation.scores.mask_pairs import mask_pairs  # noqa: E402  # found only after the path is set

PAIRS, SEED = 260, 7

nsd = {}
for name, prediction, truth, spacing in mask_pairs(PAIRS, SEED):
    if prediction.any() and truth.any():
        distances = surface_distance.compute_surface_distances(truth, prediction, spacing)
        nsd[name] = surface_distance.compute_surface_dice_at_tolerance(distances, 1.0)
text = json.dumps({"pairs": PAIRS, "seed": SEED, "nsd": nsd}, indent=0)
(HERE / "surface_distance.json").write_text(text + "\n")
