"""Makes brats2023.json: lesion-wise scores by the metric code that BraTS 2023 published.

It needs pandas < 1.4, which Python 3.11 does not have, and is no package, so it is run from a
checkout in an environment of its own and only its numbers come here:

    git clone https://github.com/rachitsaluja/BraTS-2023-Metrics && cd BraTS-2023-Metrics
    git checkout 43c9052
    python3.10 -m venv oracle
    oracle/bin/pip install numpy==1.23.5 scipy==1.10.1 pandas==1.3.5 nibabel==5.1.0 \
        connected-components-3d==3.12.1
    PYTHONPATH=. oracle/bin/python PATH_OF_PMIXSEG/tests/evaluation/scores/golden/make_brats2023.py

Its code runs unchanged, but for masks being given to cc3d as integers: it hands over floats, which
cc3d 3.12 refuses. Per pair and region: lesion-wise Dice and HD95, and the numbers of found,
invented and missed lesions. ``--check`` compares with the file instead of writing it;
on another day the 210 pairs were made anew, and no difference was found.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

import cc3d
import metrics  # of the checkout
import nibabel
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[3]))
from tests.evaluation.scores.mask_pairs import lesion_pairs  # noqa: E402  # found only after the path is set

PAIRS, SEED = 210, 3

_components = cc3d.connected_components
cc3d.connected_components = lambda mask, **rest: _components(mask.astype(np.uint8), **rest)
warnings.filterwarnings("ignore")  # 0 / 0 where there is no lesion, which the code expects

COLUMNS = ("LesionWise_Score_Dice", "LesionWise_Score_HD95", "Num_TP", "Num_FP", "Num_FN")
scores = {}
with tempfile.TemporaryDirectory() as folder:
    for name, prediction, truth, spacing in lesion_pairs(PAIRS, SEED):
        paths = []
        for kind, volume in (("prediction", prediction), ("truth", truth)):
            paths.append(f"{folder}/{kind}.nii.gz")
            nibabel.save(nibabel.Nifti1Image(volume, np.diag([*spacing, 1.0])), paths[-1])
        table = metrics.get_LesionWiseResults(*paths, "BraTS-GLI").set_index("Labels")
        scores[name] = {
            region: [
                *(float(table.loc[region, c]) for c in COLUMNS[:2]),
                *(int(table.loc[region, c]) for c in COLUMNS[2:]),
            ]
            for region in ("WT", "TC", "ET")
        }
golden = {"pairs": PAIRS, "seed": SEED, "scores": scores}
path = HERE / "brats2023.json"
if "--check" in sys.argv:
    held = json.loads(path.read_text())
    off = [
        (name, region)
        for name, regions in held["scores"].items()
        for region, values in regions.items()
        if not np.allclose(values, scores[name][region], rtol=1e-9)
    ]
    sys.exit(
        f"{len(off)} of {len(held['scores'])} pairs and regions differ: {off[:5]}" if off else 0
    )
path.write_text(json.dumps(golden) + "\n")
