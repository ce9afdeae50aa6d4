"""DDP told that every step is the same (``static_graph``) trains what DDP trains."""

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from pmixseg.callbacks import PmixAlignment
from pmixseg.modules import StudentModule
from tests.callbacks.memory_data import MemoryData, quiet_trainer, tiny
from tests.callbacks.test_ddp import UNEQUAL, RanksAgree

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


def trained(folder, processes):
    torch.manual_seed(0)
    module = StudentModule(backbone=tiny(), optimizer=torch.optim.SGD)
    spread = {}
    if processes == 2:
        strategy = DDPStrategy(static_graph=True, start_method="spawn")
        spread = {"devices": 2, "strategy": strategy}
    callbacks = [PmixAlignment(weight=1.0), RanksAgree()]
    trainer = quiet_trainer(folder, max_epochs=3, callbacks=callbacks, **spread)
    trainer.fit(module, MemoryData(UNEQUAL, batch_size=4 // processes))
    return torch.load(folder / "state.pt", weights_only=True)


def test_ranks_that_skip_different_encoders_have_one_static_graph(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = trained(tmp_path / "one", 1), trained(tmp_path / "two", 2)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)
