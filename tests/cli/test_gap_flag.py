"""The gap monitor by flag and by file, off by default, and its table in the report."""

import pandas as pd
import pytest

from pmixseg.cli import main
from tests.cli.presets import SMALL_UNET, fit
from tests.evaluation.made_up import figures_left_empty

STUDENT = ["brats2018/student.yaml", *SMALL_UNET]


@pytest.mark.parametrize(
    "way", ["brats2018/gap.yaml", "--trainer.callbacks+=pmixseg.callbacks.GapMonitor"]
)
def test_from_training_to_report(way, phantom_store, tmp_path):
    assert fit(phantom_store, tmp_path, *STUDENT, way) == 0
    table = pd.read_csv(tmp_path / "metrics.csv").dropna(subset=["gap/level2/ratio"])
    assert table["epoch"].tolist() == [-1, 0]
    assert (tmp_path / "gap" / "before.png").is_file()
    if way.startswith("--"):
        return  # the rest is the same
    test = ["test", f"--ckpt_path={tmp_path}/checkpoints/last.ckpt"]
    test += [f"--data.store={phantom_store}", "--trainer.enable_progress_bar=false"]
    test += ["--trainer.limit_test_batches=1"]
    assert main(test) == 0
    with figures_left_empty():
        assert main(["report", str(tmp_path), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Gap between sequences" in page
    assert f"{table['gap/level2/ratio'].iloc[-1]:.3f}" in page


def test_it_is_off_by_default(phantom_store, tmp_path):
    assert fit(phantom_store, tmp_path, *STUDENT) == 0
    assert not [c for c in pd.read_csv(tmp_path / "metrics.csv") if c.startswith("gap/")]
