"""Makes brats_evaluation.json: lesion-wise scores by the package brats-evaluation 0.0.10 (PyPI).

It needs pandas < 3 and is licensed under the AGPL, so it lives in an environment of its own and
only its numbers come here:

    python3.11 -m venv oracle
    oracle/bin/pip install brats-evaluation==0.0.10 panoptica==2.1.7
    oracle/bin/python tests/evaluation/scores/golden/make_brats_evaluation.py

Per pair and region: lesion-wise Dice and HD95 (null: not a number, "inf": infinite), and the
numbers of matched, invented and missed lesions. The configuration is ``gli``.

brats-evaluation 0.0.10 reads volumes with their axes reversed but the spacing not, so with voxels
that are not cubes it measures along the wrong axes: its anisotropic values are compared with the
spacing reversed. BraTS data have 1 mm cubes and are not affected.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import nibabel
import numpy as np
from brats_evaluation.evaluation import evaluate_single_exam
from panoptica import Panoptica_Evaluator

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[3]))
from tests.evaluation.scores.mask_pairs import lesion_pairs  # noqa: E402  # found only after the path is set

PAIRS, SEED = 210, 5


def plain(value: float) -> float | str | None:
    """Numbers that JSON cannot hold, as a word or null."""
    if math.isnan(value):
        return None
    return "inf" if math.isinf(value) else float(value)


config = files("brats_evaluation").joinpath("configs", "config_gli.yaml")
evaluator = Panoptica_Evaluator.load_from_config(str(config))
scores = {}
with tempfile.TemporaryDirectory() as folder:
    for name, prediction, truth, spacing in lesion_pairs(PAIRS, SEED):
        paths = []
        for kind, volume in (("prediction", prediction), ("truth", truth)):
            paths.append(f"{folder}/{kind}.nii.gz")
            nibabel.save(nibabel.Nifti1Image(volume, np.diag([*spacing, 1.0])), paths[-1])
        result = evaluate_single_exam(*paths, name, evaluator)
        scores[name] = {
            region.upper(): [
                *(plain(result[region][key]) for key in ("sq_dsc", "sq_hd95")),
                *(int(result[region][key]) for key in ("tp", "fp", "fn")),
            ]
            for region in ("wt", "tc", "et")
        }
text = json.dumps({"pairs": PAIRS, "seed": SEED, "scores": scores})
(HERE / "brats_evaluation.json").write_text(text + "\n")
