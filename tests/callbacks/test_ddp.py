"""Two gloo processes end with the weights of one process (docs/design/contracts.md)."""

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.callbacks import Distillation, PmixAlignment
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.splits import WholeCohort
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.evaluation.records.records import Records
from pmixseg.modules import StudentModule, TeacherModule, load
from tests.callbacks.memory_data import MemoryData, quiet_trainer, tiny
from tests.processes import Ranks, spread

pytestmark = [pytest.mark.ddp, pytest.mark.long]

UNEQUAL = (
    (True, True, True, True),
    (True, False, False, False),
    (False, True, True, False),
    (False, False, False, True),
)
"""Ranks get samples 0, 2 and 1, 3: each lacks encoders that the other needs."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    trainer = quiet_trainer(folder)
    trainer.fit(TeacherModule(backbone=tiny()), MemoryData())
    trainer.save_checkpoint(folder / "teacher.ckpt")
    return str(folder / "teacher.ckpt")


def train(folder, teacher, *, processes, acquired=UNEQUAL, make=StudentModule, **arguments):
    """Weights after two epochs; the size of a step's joined batch is 4 however many processes."""
    torch.manual_seed(0)
    module = make(backbone=tiny(deep_supervision=True), optimizer=torch.optim.SGD)
    data = MemoryData(acquired, batch_size=4 // processes)
    trainer = quiet_trainer(
        folder,
        max_epochs=2,
        callbacks=[
            PmixAlignment(weight=1.0, levels=[0, 2]),
            Distillation(teacher, weight=1.0),
            RanksAgree(),
        ],
        **spread(processes),
        **arguments,
    )
    trainer.fit(module, data)
    return torch.load(folder / "state.pt", weights_only=True)


class RanksAgree(Callback):
    """Compare every parameter across ranks at the end of training, and write them down."""

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero:
            torch.save(module.state_dict(), f"{trainer.default_root_dir}/state.pt")
        if trainer.world_size == 1:
            return
        flat = torch.cat([p.detach().flatten() for p in module.parameters()])
        both = trainer.strategy.all_gather(flat)
        assert torch.equal(both[0], both[1])


@pytest.mark.parametrize("make", [StudentModule, TeacherModule])
def test_two_processes_equal_one_on_the_joined_batch(tmp_path, teacher, make):
    one = train(tmp_path, teacher, processes=1, make=make)
    two = train(tmp_path, teacher, processes=2, make=make)
    assert one.keys() == two.keys()
    moved = 0
    torch.manual_seed(0)
    start = make(backbone=tiny(deep_supervision=True)).state_dict()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)
        if name in start:
            moved += int(not torch.equal(start[name], value))
    assert moved > 0.9 * len(start)
    assert not torch.equal(start["anchor.scores"], one["anchor.scores"])


def test_ddp_of_one_process_equals_no_ddp(tmp_path):
    """DDP waits for every gradient there, too: as on a cluster with one task."""
    states = []
    for arguments in ({}, {"strategy": Ranks(start_method="forkserver")}):
        torch.manual_seed(0)
        module = StudentModule(backbone=tiny(), optimizer=torch.optim.SGD)
        trainer = quiet_trainer(tmp_path, callbacks=[RanksAgree()], **spread(1), **arguments)
        trainer.fit(module, MemoryData(UNEQUAL[1:2] * 4, batch_size=1))
        states.append(torch.load(tmp_path / "state.pt", weights_only=True))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_bf16_and_ranks_that_lack_different_modalities(tmp_path, teacher):
    state = train(tmp_path, teacher, processes=2, precision="bf16-mixed")
    assert all(torch.isfinite(v).all() for v in state.values())


def test_records_of_two_processes_are_those_of_one(tmp_path, teacher, phantom_store):
    data = {"store": phantom_store, "patch_size": 16, "split": WholeCohort()}
    tables = []
    for processes in (1, 2):
        folder = tmp_path / f"of{processes}"
        module = load(teacher)
        module.evaluation = EvaluationSettings(window=(32, 40, 32), examples=1)
        trainer = quiet_trainer(
            folder, limit_test_batches=2 if processes == 1 else 1, **spread(processes)
        )
        trainer.test(module, BraTSDataModule(**data), verbose=False)
        tables.append(Records.read(folder).table)
    one, two = (t.drop(columns="run") for t in tables)
    assert one["case"].nunique() == 2
    assert not two.duplicated(["case", "combination", "region"]).any()
    pd.testing.assert_frame_equal(one, two)


ALL, LAST = (True, True, True, True), (False, False, False, True)


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


def trained_static(folder, processes):
    torch.manual_seed(0)
    module = StudentModule(backbone=tiny(), optimizer=torch.optim.SGD)
    ranks = {}
    if processes == 2:
        strategy = DDPStrategy(static_graph=True, start_method="spawn")
        ranks = {"devices": 2, "strategy": strategy}
    callbacks = [PmixAlignment(weight=1.0), RanksAgree()]
    trainer = quiet_trainer(folder, max_epochs=3, callbacks=callbacks, **ranks)
    trainer.fit(module, MemoryData(UNEQUAL, batch_size=4 // processes))
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.slow
def test_ranks_that_skip_different_encoders_have_one_static_graph(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = trained_static(tmp_path / "one", 1), trained_static(tmp_path / "two", 2)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)
