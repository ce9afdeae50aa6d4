"""Anchors, distances, stop-gradients and the gap monitor as flags of ``pmixseg fit``."""

import math

import pandas as pd
import pytest
import yaml

from pmixseg.callbacks import GapMonitor
from pmixseg.cli import main
from pmixseg.losses.distances import DISTANCES
from tests.cli.presets import SMALL_UNET, fit, metrics
from tests.evaluation.made_up import figures_left_empty

STUDENT = ["brats2018/student.yaml", *SMALL_UNET, "--align.weight=0.1"]
NORMAL = "--align.anchor=pmixseg.losses.NormalAnchor"
PRODUCT = "--align.anchor=pmixseg.losses.ProductAnchor"


def train(store, folder, *flags):
    """The alignment loss of two steps: the second one sees the first one's gradient."""
    assert fit(store, folder, *STUDENT, *flags, "--trainer.limit_train_batches=2") == 0
    value = metrics(folder)["train/align"]
    assert math.isfinite(value)
    return value


@pytest.fixture(scope="module")
def values(phantom_store, tmp_path_factory):
    """Flags by the loss that they gave, as they are tried: no two give the same."""
    return {train(phantom_store, tmp_path_factory.mktemp("default")): ()}


QUICK = ("nmse", "kl", "joint")
DEFAULT = "case_nce"


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in DISTANCES]
)
def test_every_name_of_a_distance_trains_with_another_value(name, phantom_store, tmp_path, values):
    flags = [f"--align.distance={name}", *([NORMAL] if name == "vid" else [])]
    value = train(phantom_store, tmp_path, *flags)
    assert values.setdefault(value, flags) == (() if name == DEFAULT else flags)


@pytest.mark.parametrize(
    "flags",
    [
        [NORMAL, "--align.distance=mse"],
        [PRODUCT, "--align.distance=kl"],
        ["--align.anchor=pmixseg.losses.ModalityAnchor", "--align.anchor.modality=t1ce"],
        ["--model.anchor=pmixseg.losses.MixtureAnchor", "--model.anchor.weights=[4,3,2,1]"],
        ["--model.anchor=pmixseg.losses.MixtureAnchor", "--model.anchor.shared=true"],
        ["--align.projection=linear", "--align.detach=none", "--align.levels=[0,-1]"],
        ["--align.detach=features"],
        ["--align.distance=kl", "--align.sample=true"],
    ],
)
def test_anchors_projections_levels_and_stop_gradients(flags, phantom_store, tmp_path, values):
    value = train(phantom_store, tmp_path, *flags)
    assert values.setdefault(value, flags) is flags


def test_arguments_of_a_distance_are_stored(phantom_store, tmp_path):
    flags = ["--align.distance=pmixseg.losses.JointKL", "--align.distance.correlation=matched"]
    train(phantom_store, tmp_path, *flags)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["align"]["distance"]["init_args"]["correlation"] == "matched"


def test_a_learned_anchor_that_nothing_trains_is_one_sentence(phantom_store, tmp_path, capsys):
    flags = ["--model.fill=zero", "--model.anchor=pmixseg.losses.MixtureAnchor"]
    assert fit(phantom_store, tmp_path, *STUDENT, *flags) == 1
    assert "would stay uniform" in capsys.readouterr().err


UNALIGNED = ["brats2018/student.yaml", *SMALL_UNET]


@pytest.mark.parametrize(
    "way", ["brats2018/gap.yaml", "--trainer.callbacks+=pmixseg.callbacks.GapMonitor"]
)
def test_the_gap_from_training_to_report(way, phantom_store, tmp_path):
    assert fit(phantom_store, tmp_path, *UNALIGNED, way) == 0
    table = pd.read_csv(tmp_path / "metrics.csv").dropna(subset=["gap/level2/ratio"])
    assert table["epoch"].tolist() == [-1, 0]
    assert (tmp_path / "gap" / "before.png").is_file()
    monitor = yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["callbacks"][-1]
    assert monitor["init_args"] == GapMonitor().init_args
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


def test_the_gap_monitor_is_off_by_default(phantom_store, tmp_path):
    assert fit(phantom_store, tmp_path, *UNALIGNED) == 0
    assert not [c for c in pd.read_csv(tmp_path / "metrics.csv") if c.startswith("gap/")]
