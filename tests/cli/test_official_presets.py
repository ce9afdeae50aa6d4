"""The presets of the authors' snippets through the command line, beside the repaired default."""

import json
import math

import pytest
import torch

from pmixseg.backbones import April2025Network
from pmixseg.losses import April2025Alignment
from pmixseg.modules import July2025Student, StudentModule, load
from tests.cli.presets import SMALL_UNET, fit, metrics

NETWORK = {
    "class_path": "pmixseg.backbones.April2025Network",
    "init_args": {"arguments": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}},
}
SMALL = [f"--model.backbone.network={json.dumps(NETWORK)}"]


@pytest.mark.parametrize(
    ("name", "flags", "kind"),
    [
        ("official-2025-07", SMALL_UNET, July2025Student),
        ("repaired", SMALL_UNET, StudentModule),
    ],
)
def test_july_and_the_repaired_default_train_and_load(name, flags, kind, phantom_store, tmp_path):
    assert fit(phantom_store, tmp_path, f"official/{name}.yaml", *flags) == 0
    assert math.isfinite(metrics(tmp_path)["train/align"])
    module = load(tmp_path / "checkpoints" / "last.ckpt")
    assert type(module) is kind


def test_april_trains_and_loads(phantom_store, tmp_path):
    assert fit(phantom_store, tmp_path, "official/official-2025-04.yaml", *SMALL) == 0
    assert metrics(tmp_path)["train/align"] > 0
    module = load(tmp_path / "checkpoints" / "last.ckpt")
    assert isinstance(module.backbone.network, April2025Network)
    assert (module.backbone.channels[0], module.backbone.strides[0]) == (4, 1)


def test_april_alignment_has_four_weights_that_are_trained(phantom_store, tmp_path):
    fit(phantom_store, tmp_path, "official/official-2025-04.yaml", *SMALL)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state["terms.align.alignment.scores"].shape == (4,)
    assert April2025Alignment().scores.requires_grad


@pytest.mark.parametrize(
    ("files", "flags", "words"),
    [
        (["official/official-2025-07.yaml"], [*SMALL_UNET, "--align.distance=mse"], "whole loss"),
        (
            ["official/repaired.yaml"],
            [*SMALL_UNET, "--align.official=pmixseg.losses.April2025Alignment"],
            "one fused latent apart",
        ),
        (
            ["official/official-2025-04.yaml"],
            [*SMALL, "--align.official=pmixseg.losses.July2025Alignment"],
            "mixes the modalities at its input",
        ),
    ],
)
def test_wrong_mixtures_are_one_sentence(files, flags, words, phantom_store, tmp_path, capsys):
    assert fit(phantom_store, tmp_path, *files, *flags) == 1
    assert words in capsys.readouterr().err
