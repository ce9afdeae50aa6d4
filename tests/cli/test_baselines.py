"""Every recipe of experiments/baselines through the command line, on two batches."""

import json
import math
import re

import pytest

from pmixseg.modules import load
from tests.cli.presets import EXPERIMENTS, fit, metrics

FOLDER = EXPERIMENTS / "baselines"
NETWORK = {
    "class_path": "monai.networks.nets.DynUNet",
    "init_args": {
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [4, 6, 8],
    },
}
TRANSFORMER = {"width": 4, "patch_size": 32, "embedding": 8, "heads": 2, "hidden": 8}
FEW = {
    "rfnet": ["--model.backbone.width=4"],
    "mmformer": [
        *(f"--model.backbone.{name}={value}" for name, value in TRANSFORMER.items()),
        "--data.patch_size=32",
    ],
    "uhved": ["--model.backbone.width=4", "--trainer.max_steps=2"],
    "unet": ["--model.backbone.width=4"],
    "nnunet-dropout": [f"--model.backbone.network={json.dumps(NETWORK)}"],
    "nnunet-dedicated": [
        f"--model.backbone.network={json.dumps(NETWORK)}",
        "--model.combination=t1+t2",
    ],
    "m3ae-pretrain": [
        "--model.backbone.width=4",
        "--model.backbone.levels=3",
        "--model.block=4",
        "--data.batch_size=1",
    ],
    "m3ae": ["--model.backbone.width=4", "--model.backbone.levels=3"],
    "shaspec": ["--model.backbone.width=4", "--trainer.max_steps=2"],
    "demoseg": ["--model.backbone.width=4", "--model.backbone.levels=3"],
    "dynunet": [f"--model.backbone.network={json.dumps(NETWORK)}"],
}
SLOTLESS = {"dynunet"}
"""Fused before encoding: no latents per sequence that could be aligned."""
OWN_RULES = {"uhved", "shaspec", "demoseg"}
"""For missing slots: their module has no anchor to lend, so the callback brings one."""
README = (FOLDER / "README.md").read_text()
RECIPES = sorted(p.stem for p in FOLDER.glob("*.yaml") if p.stem not in ("common", "dynunet"))
BACKBONES = {
    name: [w.removeprefix("experiments/") for w in flags.split() if w != "-c"]
    for name, flags in re.findall(r"^\| `(\w+)` \| `(.+?)` \|$", README, re.M)
}
"""Network -> flags in the README, or its file."""


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_its_own_network(name, phantom_store, tmp_path):
    assert fit(phantom_store, tmp_path, f"baselines/{name}.yaml", *FEW[name]) == 0
    assert math.isfinite(metrics(tmp_path)["train/loss"])
    module = load(tmp_path / "checkpoints" / "last.ckpt")
    modalities_seen = ("t1", "t2") if name == "nnunet-dedicated" else module.task.modalities
    assert module.backbone.modalities == modalities_seen


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_trains_by_the_common_recipe(name, aligned, phantom_store, tmp_path, capsys):
    assert len(BACKBONES) == 7
    files = ["baselines/common.yaml", *BACKBONES[name]]
    if aligned:
        files.append("brats2018/align.yaml")
    own = ["--align.anchor=pmixseg.losses.MixtureAnchor", "--align.anchor.weights=uniform"]
    flags = own if aligned and name in OWN_RULES else []
    flags += [f for f in FEW[name] if "max_steps" not in f]
    if aligned and name in SLOTLESS:
        assert fit(phantom_store, tmp_path, *files, *flags) == 1
        assert "mixes" in capsys.readouterr().err
        return
    assert fit(phantom_store, tmp_path, *files, *flags) == 0
    assert ("train/align" in metrics(tmp_path)) == aligned


def test_every_recipe_is_named_in_the_readme():
    for name in RECIPES:
        assert f"`{name}.yaml`" in README, name


def test_m3ae_goes_from_pre_training_to_fine_tuning(phantom_store, tmp_path):
    first, second = tmp_path / "pretrained", tmp_path / "student"
    assert fit(phantom_store, first, "baselines/m3ae-pretrain.yaml", *FEW["m3ae-pretrain"]) == 0
    start = first / "checkpoints" / "last.ckpt"
    flags = [*FEW["m3ae"], f"--init_from={start}", "--trainer.limit_train_batches=1"]
    # A learning rate of 0: what comes out is what came in.
    flags.append("--model.optimizer.lr=0")
    assert fit(phantom_store, second, "baselines/m3ae.yaml", *flags) == 0
    before, after = (load(run / "checkpoints" / "last.ckpt") for run in (first, second))
    states = before.backbone.state_dict(), after.backbone.state_dict()
    assert all(states[0][key].equal(states[1][key]) for key in states[1])


def test_pre_training_is_not_validated(phantom_store, tmp_path, capsys):
    flags = [*FEW["m3ae-pretrain"], "--trainer.limit_val_batches=1"]
    assert fit(phantom_store, tmp_path, "baselines/m3ae-pretrain.yaml", *flags) == 1
    assert "use limit_val_batches 0 (--trainer.limit_val_batches)" in capsys.readouterr().err
