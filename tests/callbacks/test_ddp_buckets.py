"""Alignment beside DDP's own reductions, in a network large enough for several buckets."""

import pytest
import torch

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.callbacks import PmixAlignment
from pmixseg.modules import StudentModule
from tests.callbacks.memory_data import MemoryData, quiet_trainer
from tests.ranks import spread

ALL, LAST = (True, True, True, True), (False, False, False, True)


@pytest.mark.ddp
@pytest.mark.parametrize("distance", ["nmse", "smooth_l1"])
def test_ranks_that_skip_different_encoders_do_not_mix_their_messages(tmp_path, distance):
    """Rank 0 has one sequence and rank 1 has all: their encoders' gradients come at other times."""
    torch.manual_seed(0)
    module = StudentModule(backbone=MultiEncoderUNet(width=16, levels=4), optimizer=torch.optim.SGD)
    trainer = quiet_trainer(
        tmp_path,
        max_epochs=2,
        callbacks=[PmixAlignment(weight=1.0, distance=distance)],
        **spread(2),
    )
    trainer.fit(module, MemoryData((LAST, ALL) * 4, batch_size=1))
    assert trainer.state.finished
