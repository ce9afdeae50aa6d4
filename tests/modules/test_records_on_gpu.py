"""A test as a GPU runs it (batches, scores in a thread) leaves the records of a CPU's."""

import copy
import threading

import pandas as pd
import pytest
import torch

from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.splits import WholeCohort
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction import cases
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.evaluation.records.examples import examples_of
from pmixseg.evaluation.records.records import Records
from pmixseg.execution import as_on_gpu
from pmixseg.modules import StudentModule
from tests.callbacks.memory_data import quiet_trainer, tiny


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(1)  # no voxel has two classes that are equal but for rounding
    return StudentModule(backbone=tiny(), evaluation=EvaluationSettings(window=(32, 32, 32)))


def records_of(student, folder, store, limit=2):
    trainer = quiet_trainer(folder, limit_test_batches=limit)
    data = BraTSDataModule(store=store, patch_size=16, split=WholeCohort())
    trainer.test(student, data, verbose=False)
    return Records.read(folder).table.drop(columns="run")


def test_records_and_examples_are_equal(student, tmp_path, phantom_store, monkeypatch):
    scored_in = []
    score = cases.CaseMetrics.score
    monkeypatch.setattr(
        cases.CaseMetrics,
        "score",
        lambda *given: scored_in.append(threading.current_thread().name) or score(*given),
    )
    here = records_of(student, tmp_path / "cpu", phantom_store)
    with as_on_gpu():
        apart = records_of(student, tmp_path / "gpu", phantom_store)
    assert set(scored_in[:30]) == {"MainThread"}
    assert set(scored_in[30:]) == {"scores_0"}
    assert len(apart) == 2 * 15 * 3
    pd.testing.assert_frame_equal(apart, here, check_exact=False, rtol=0, atol=1e-6)
    assert examples_of(tmp_path / "gpu").keys() == examples_of(tmp_path / "cpu").keys()
    assert len(examples_of(tmp_path / "gpu")) == 2
    copy.deepcopy(student)  # no thread is left that could not be copied


def test_compiled_networks_get_windows_of_one_shape(tmp_path, phantom_store, monkeypatch):
    shapes = set()

    def compiled(function, **how):
        def spy(*given):
            shapes.add(tuple(given[0].shape if len(given) == 2 else given[0].features[0].shape))
            return function(*given)

        return spy

    monkeypatch.setattr(torch, "compile", compiled)
    module = StudentModule(
        backbone=tiny(), evaluation=EvaluationSettings(window=(32, 32, 32)), compile=True
    )
    data = BraTSDataModule(phantom_store, patch_size=16, split=WholeCohort())
    data.setup("test")
    with as_on_gpu(), torch.no_grad():
        item = next(iter(data.test_dataloader()))
        some = [("flair",), ("flair", "t1"), ("t2",)]
        assert len(list(module.eval().predict_item(item, some))) == 3
    assert shapes == {(1, 4, 32, 32, 32), (1, 4, 4, 32, 32, 32)}


def test_an_error_in_the_thread_ends_the_test(student, tmp_path, phantom_store, monkeypatch):
    def damaged(*given):
        raise InputError("case 'x' is damaged.")

    monkeypatch.setattr(cases.CaseMetrics, "score", damaged)
    with as_on_gpu(), pytest.raises(InputError, match="case 'x' is damaged"):
        records_of(student, tmp_path, phantom_store, limit=1)


def test_the_next_case_is_read_while_one_is_worked_on(phantom_store):
    data = BraTSDataModule(store=phantom_store, patch_size=16, split=WholeCohort())
    data.setup("test")
    loader = data.test_dataloader()
    asked = []
    read = loader.dataset.__class__.__getitem__

    class Watched(loader.dataset.__class__):
        def __getitem__(self, index):
            asked.append((index, threading.current_thread().name))
            return read(self, index)

    loader.dataset.__class__ = Watched
    names = [(item["case_id"], len(asked)) for item in loader]
    assert [name for name, _ in names] == list(data.parts.test)
    assert {thread for _, thread in asked} == {"cases_0"}
    assert [index for index, _ in asked] == list(range(len(names)))
