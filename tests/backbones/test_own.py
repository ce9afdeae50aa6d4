"""The backbone that docs/howto/backbone.md shows: this very file is checked, trained, loaded."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from pmixseg.cli import main
from pmixseg.modules import load
from pmixseg.testing import check_backbone

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).parent / "own_backbone.py"


@pytest.fixture
def own(monkeypatch):
    monkeypatch.syspath_prepend(FILE.parent)
    yield importlib.import_module("own_backbone")
    del sys.modules["own_backbone"]


def test_it_keeps_the_contract(own):
    check_backbone(own.Tiny(width=2))


def test_its_class_has_about_twenty_lines():
    lines = FILE.read_text().partition("class ")[2].splitlines()
    assert len([line for line in lines if line.strip()]) <= 21


def test_the_page_shows_this_very_file():
    text = (ROOT / "docs" / "howto" / "backbone.md").read_text()
    assert FILE.read_text().strip() in text


def test_trains_with_alignment_from_the_command_line(own, phantom_store, tmp_path):
    flags = [
        *[
            "--model=StudentModule",
            "--model.backbone=own_backbone.Tiny",
            "--model.backbone.width=2",
        ],
        *["--align.weight=0.1", "--data.patch_size=16", "--trainer.accelerator=cpu"],
        *["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"],
        *["--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"],
    ]
    data = [f"--run={tmp_path}", f"--data.store={phantom_store}"]
    assert main(["fit", "--import", "own_backbone", *data, *flags]) == 0
    module = load(tmp_path / "checkpoints" / "last.ckpt", modules=["own_backbone"])
    assert type(module.backbone).__name__ == "Tiny"
    assert all(torch.isfinite(p).all() for p in module.parameters())
