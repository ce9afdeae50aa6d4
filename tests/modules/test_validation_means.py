"""What a validation epoch logs from the Dice of its cases."""

import pytest
import torch

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.modules import StudentModule
from pmixseg.task import Task


@pytest.mark.parametrize("regions", [["lesion"], ["lesion", "core"]])
def test_every_region_has_a_mean(regions, monkeypatch):
    task = Task("t", ("flair", "adc"), ("lesion", "core"), {r: (r,) for r in regions})
    module = StudentModule(
        task=task, backbone=MultiEncoderUNet(task.modalities, task.num_classes, width=2, levels=2)
    )
    logged = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    for case, dice in {"a": 0.5, "b": 0.7}.items():
        module.validation_dice.update(torch.full([len(regions)], dice), case)
    module.on_validation_epoch_end()
    expected = {"val/dice": 0.6, **{f"val/dice/{region}": 0.6 for region in regions}}
    assert {name: float(value) for name, value in logged.items()} == pytest.approx(expected)
