"""Anchors, distances and stop-gradients as flags of ``pmixseg fit``."""

import math

import pytest
import yaml

from pmixseg.losses.alignment import DISTANCES
from tests.cli.presets import SMALL_UNET, fit, metrics

STUDENT = ["brats2018/student.yaml", *SMALL_UNET, "--align.weight=0.1"]
NORMAL = "--align.anchor=pmixseg.losses.NormalAnchor"
PRODUCT = "--align.anchor=pmixseg.losses.ProductAnchor"


def train(store, folder, *flags):
    assert fit(store, folder, *STUDENT, *flags, "--trainer.limit_train_batches=1") == 0
    value = metrics(folder)["train/align"]
    assert math.isfinite(value)
    return value


QUICK = ("nmse", "kl", "joint")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in DISTANCES]
)
def test_every_distance_by_name(name, phantom_store, tmp_path):
    train(phantom_store, tmp_path, f"--align.distance={name}", *([NORMAL] if name == "vid" else []))


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
def test_anchors_projections_levels_and_stop_gradients(flags, phantom_store, tmp_path):
    assert train(phantom_store, tmp_path, *flags) >= 0


def test_a_distance_with_arguments(phantom_store, tmp_path):
    flags = ["--align.distance=pmixseg.losses.JointKL", "--align.distance.correlation=matched"]
    train(phantom_store, tmp_path, *flags)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["align"]["distance"]["init_args"]["correlation"] == "matched"


def test_a_learned_anchor_that_nothing_trains_is_one_sentence(phantom_store, tmp_path, capsys):
    flags = ["--model.fill=zero", "--model.anchor=pmixseg.losses.MixtureAnchor"]
    assert fit(phantom_store, tmp_path, *STUDENT, *flags) == 1
    assert "would stay uniform" in capsys.readouterr().err
