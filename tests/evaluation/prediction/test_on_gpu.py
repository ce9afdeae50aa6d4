"""Testing as a GPU does it, forced on a CPU: windows in batches, scores in a thread."""

import copy
import itertools
import threading

import pandas as pd
import pytest
import torch

from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.splits import WholeCohort
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction import cases
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.evaluation.prediction.scoring import CaseRows, scorers
from pmixseg.evaluation.prediction.windows import FULL_CARD
from pmixseg.evaluation.records.examples import examples_of
from pmixseg.evaluation.records.records import Records
from pmixseg.execution import as_on_gpu
from pmixseg.modules import StudentModule
from pmixseg.types import Latents
from tests.callbacks.memory_data import quiet_trainer, tiny
from tests.evaluation.made_up import predict_combinations
from tests.inference.tiny_models import BACKBONES

FLAGS = torch.tensor([row for row in itertools.product([False, True], repeat=4) if any(row)])
NETWORKS = ("unet", "rfnet", "early")


def network(name):
    """In float64: what is left is the order of sums, not the rounding of small norms."""
    torch.manual_seed(0)
    make, _, _ = BACKBONES[name]
    return make().eval().double()


def volume(*shape):
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [(16, 16, 16), (24, 16, 16)])  # 1 and 2 windows
def test_batches_of_windows_and_combinations_equal_one_by_one(name, shape):
    net, image = network(name), volume(*shape)
    with as_on_gpu():
        one, many = (
            predict_combinations(net, image, FLAGS[::3], patch=(16,) * 3, batch_size=size)
            for size in (1, "auto")
        )
    torch.testing.assert_close(many, one, rtol=0, atol=1e-6)
    assert torch.equal(many.argmax(1), one.argmax(1))
    lean = predict_combinations(net, image, FLAGS[::3], patch=(16,) * 3, batch_size="auto")
    torch.testing.assert_close(many, lean, rtol=0, atol=1e-6)


class Counted:
    """A network that counts its passes, with memory for some windows at once."""

    def __init__(self, net, memory):
        self.net, self.memory, self.decoded = net, memory, []
        self.modalities, self.num_classes = net.modalities, net.num_classes
        self.strides, self.shares_encoding = net.strides, net.shares_encoding

    def encode(self, image, present):
        return self.net.encode(image, present)

    def decode(self, latents):
        self.decoded.append(len(latents.features[0]))
        if self.decoded[-1] > self.memory:
            raise torch.OutOfMemoryError("no memory")
        return self.net.decode(latents)


def test_a_card_gets_windows_and_combinations_together():
    net = Counted(network("unet"), FULL_CARD)
    with as_on_gpu():
        predict_combinations(net, volume(16, 16, 16), FLAGS, patch=(16,) * 3, batch_size="auto")
        assert net.decoded == [15]
        net.decoded = []
        predict_combinations(net, volume(24, 16, 16), FLAGS, patch=(16,) * 3, batch_size="auto")
        assert net.decoded == [16, 14]  # 2 windows, 8 combinations at once
    net.decoded = []
    predict_combinations(net, volume(16, 16, 16), FLAGS, patch=(16,) * 3, batch_size="auto")
    assert net.decoded == [1] * 15


@pytest.mark.parametrize("memory", [1, 3, 8])
def test_where_memory_ends_windows_are_halved_and_sums_stay_exact(memory):
    net, image = network("unet"), volume(24, 24, 16)
    small = Counted(net, memory)
    with as_on_gpu():
        expected = predict_combinations(net, image, FLAGS[::2], patch=(16,) * 3, batch_size=1)
        halved = predict_combinations(small, image, FLAGS[::2], patch=(16,) * 3, batch_size="auto")
    torch.testing.assert_close(halved, expected, rtol=0, atol=1e-6)
    failed = [n for n in small.decoded if n > memory]
    assert failed == [n for n in (16, 8, 4, 2) if n > memory]  # each size is tried once


def test_memory_that_ends_between_two_combinations_adds_nothing_twice():
    net, image = network("unet"), volume(24, 16, 16)

    class Leaking(Counted):
        def decode(self, latents):
            self.memory = 1 if len(self.decoded) >= 3 else 16
            return super().decode(latents)

    small = Leaking(net, 16)
    with as_on_gpu():
        expected = predict_combinations(net, image, FLAGS, patch=(16,) * 3, batch_size=2)
        halved = predict_combinations(small, image, FLAGS, patch=(16,) * 3, batch_size=2)
    torch.testing.assert_close(halved, expected, rtol=0, atol=1e-6)
    assert small.decoded[:4] == [2] * 4 and set(small.decoded[4:]) == {1}


def test_a_window_that_memory_does_not_hold_is_one_sentence():
    with pytest.raises(InputError, match=r"does not hold one window of \[16, 16, 16\] voxels"):
        predict_combinations(
            Counted(network("unet"), 0), volume(16, 16, 16), FLAGS, patch=(16,) * 3, batch_size=2
        )


def test_repeated_latents_are_blocks_and_one_block_is_itself():
    features = [torch.arange(2.0).view(2, 1, 1, 1, 1, 1)]
    latents = Latents(features, ("a",), [torch.tensor([[True], [False]])], cache={"x": features[0]})
    assert latents.repeated(1) is latents
    twice = latents.repeated(2)
    assert twice.features[0].flatten().tolist() == [0, 1, 0, 1]
    assert twice.usable[0].flatten().tolist() == [True, False, True, False]
    assert twice.cache == {}


def counted(predictions, each):
    return [row for rows in each(lambda p: [{"row": p}], predictions) for row in rows]


def test_rows_come_in_order_from_here_and_from_threads():
    for apart, threads in ((False, 1), (True, 1), (True, 3)):
        rows = CaseRows(threads)
        for case in range(4):
            rows.add(counted, (10 * case + k for k in range(30)), apart=apart)
        assert [r["row"] for r in rows.rows] == [10 * c + k for c in range(4) for k in range(30)]
        assert [r["row"] for r in rows.rows][-1] == 59  # asked again


def test_an_error_of_a_score_is_raised_and_stops_the_case():
    def fails(predictions, each):
        next(iter(predictions))
        raise InputError("a damaged label")

    rows = CaseRows()
    with pytest.raises(InputError, match="a damaged label"):
        rows.add(fails, iter(range(1000)), apart=True)
        rows.rows  # noqa: B018  # waits

    def breaks():
        yield 1
        raise InputError("a damaged scan")

    rows = CaseRows()
    with pytest.raises(InputError, match="a damaged scan"):
        rows.add(counted, breaks(), apart=True)
    assert rows.rows == [{"row": 1}]


def test_the_scores_of_one_case_are_made_at_the_same_time():
    meeting = threading.Barrier(3, timeout=20)

    def meets(predictions, each):
        return [{"row": r} for r in each(lambda p: meeting.wait() >= 0 and p, predictions)]

    rows = CaseRows(3)
    rows.add(meets, iter(range(6)), apart=True)
    assert [r["row"] for r in rows.rows] == list(range(6))


def test_processes_share_the_threads_of_a_machine(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    assert [scorers(p) for p in (1, 2, 4, 100)] == [8, 6, 3, 1]


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(1)  # no voxel has two classes that are equal but for rounding
    return StudentModule(backbone=tiny(), evaluation=EvaluationSettings(window=(32, 40, 32)))


def records_of(student, folder, store, limit=2):
    trainer = quiet_trainer(folder, limit_test_batches=limit)
    data = BraTSDataModule(store=store, patch_size=16, split=WholeCohort())
    trainer.test(student, data, verbose=False)
    return Records.read(folder).table.drop(columns="run")


def test_records_and_examples_are_equal(student, tmp_path, phantom_store, monkeypatch):
    monkeypatch.setattr("pmixseg.modules.scoring.scorers", lambda processes: 3)
    scored_in = []
    score = cases.CaseMetrics.score
    monkeypatch.setattr(
        cases.CaseMetrics,
        "score",
        lambda *arguments: scored_in.append(threading.current_thread().name) or score(*arguments),
    )
    here = records_of(student, tmp_path / "cpu", phantom_store)
    with as_on_gpu():
        apart = records_of(student, tmp_path / "gpu", phantom_store)
    assert set(scored_in[:30]) == {"MainThread"}
    assert set(scored_in[30:]) == {"scores_0", "scores_1", "scores_2"}
    assert len(apart) == 2 * 15 * 3
    pd.testing.assert_frame_equal(apart, here, check_exact=False, rtol=0, atol=1e-6)
    assert examples_of(tmp_path / "gpu").keys() == examples_of(tmp_path / "cpu").keys()
    assert len(examples_of(tmp_path / "gpu")) == 2
    copy.deepcopy(student)  # no thread is left that could not be copied


def test_compiled_networks_get_windows_of_one_shape(tmp_path, phantom_store, monkeypatch):
    shapes = set()

    def compiled(function):
        def spy(net, given, *further):
            shapes.add(tuple(given.shape if further else given.features[0].shape))
            return function(net, given, *further)

        return spy

    monkeypatch.setattr("pmixseg.modules.network.compiled", compiled)
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
    def damaged(*arguments):
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
