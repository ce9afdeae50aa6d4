"""The sentence that a person reads stays one sentence, wherever it was raised."""

import errno
import multiprocessing
import multiprocessing.synchronize  # before a test replaces what it is made of
import os
import re

import pytest
from torch.utils.data import DataLoader, Dataset

from pmixseg import BraTSDataModule, GapMonitor, StudentModule
from pmixseg.backbones import MultiEncoderUNet
from pmixseg.cli import main
from pmixseg.errors import InputError, disk_error, memory_error, restoring_error

SENTENCE = "case 'a7': the label holds value 7; map it in the layout's codes."


class Wrong(Dataset):
    """Every case is at fault, for a reason with a cause of its own."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise KeyError(7)
        except KeyError as error:
            raise InputError(SENTENCE) from error


def test_a_worker_of_a_data_loader_says_the_sentence_only():
    with pytest.raises(InputError) as raised:
        next(iter(DataLoader(Wrong(), num_workers=1)))
    assert str(raised.value) == SENTENCE
    assert "in __getitem__" in raised.value.__notes__[0]  # where it was stays known


def test_other_arguments_are_left_alone():
    assert InputError().args == ()
    assert InputError(SENTENCE, 3).args == (SENTENCE, 3)
    told = "a traceback (most recent call last) of\npmixseg.errors.InputError: is mentioned."
    assert str(InputError(told)) == told


def raising(error):
    def run(*args):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            NotADirectoryError(20, "Not a directory", "a/b"),
            "a/b cannot be read or written (Not a directory); correct the path, or choose another "
            "folder.",
        ),
        (
            PermissionError(13, "Permission denied", "c"),
            "c cannot be read or written (Permission denied); correct the path, or choose another "
            "folder.",
        ),
        (
            OSError(30, "Read-only file system", "c"),
            "c cannot be read or written (Read-only file system); correct the path, or choose "
            "another folder.",
        ),
        (
            OSError(28, "No space left on device", "d"),
            "d cannot be read or written (No space left on device); free space, or choose another "
            "folder.",
        ),
        (
            OSError(28, "No space left on device"),
            "the disk refused a file (No space left on device); free space on it.",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
            "the disk refused a file of weights; free space on it.",
        ),
    ],
)
def test_disk_and_path_are_told_in_a_sentence(monkeypatch, capsys, error, told):
    monkeypatch.setattr("pmixseg.cli.run_plain", raising(error))
    assert main(["any", "command"]) == 1
    assert capsys.readouterr().err == f"pmixseg: {told}\n"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a programming error"),
        FileNotFoundError("without a file"),
        PermissionError(13, "Permission denied"),
        BrokenPipeError(32, "Broken pipe", "a"),
        ConnectionResetError(104, "Connection reset by peer"),
        ValueError("a programming error"),
        KeyError("b"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_keep_their_traceback(monkeypatch, error):
    monkeypatch.setattr("pmixseg.cli.run_plain", raising(error))
    with pytest.raises(type(error)):
        main(["any", "command"])


def test_the_command_line_prints_the_sentence_of_a_worker(monkeypatch, capsys):
    loader = DataLoader(Wrong(), num_workers=1)
    monkeypatch.setattr("pmixseg.cli.run_plain", lambda *args: len(list(loader)))
    assert main(["any", "command"]) == 1
    assert capsys.readouterr().err == f"pmixseg: {SENTENCE}\n"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (MemoryError(), "smaller batches"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "smaller batches"),
        (RuntimeError("can't start new thread"), "allow more (ulimit -u), or use fewer workers"),
        (RuntimeError("cannot join thread before it is started"), "allow more (ulimit -u)"),
        (ImportError("x.so: failed to map segment from shared object"), "too little memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), "smaller"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "num_workers 0"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "num_workers 0"),
        (RuntimeError("unable to write to file </torch_7_1>: No space left"), "/dev/shm"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It"), "/dev/shm"),
        (OSError(errno.EMFILE, "Too many open files", "a.npy"), "ulimit -n"),
    ],
)
def test_lack_of_memory_is_a_sentence(error, advice):
    sentence = str(memory_error(error))
    assert advice in sentence and "\n" not in sentence and "()" not in sentence


def test_other_errors_are_none_of_memory():
    assert memory_error(RuntimeError("sizes do not match")) is None
    assert memory_error(OSError(errno.ENOENT, "No such file or directory", "x")) is None


def test_a_semaphore_that_shared_memory_does_not_hold_is_no_full_disk(monkeypatch):
    def refused(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("_multiprocessing.SemLock", refused)
    with pytest.raises(OSError, match="No space left") as full:
        multiprocessing.get_context("spawn").Lock()
    assert "/dev/shm" in str(memory_error(full.value))
    with pytest.raises(OSError, match="No space left") as full:
        refused()
    assert memory_error(full.value) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_may_not_be_started(monkeypatch):
    def refused():
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("os.fork", refused)
    with pytest.raises(OSError, match="temporarily") as full:
        multiprocessing.get_context("fork").Process(target=print).start()
    assert "allow more (ulimit -u), or use fewer workers." in str(memory_error(full.value))
    with pytest.raises(OSError, match="temporarily") as full:
        refused()
    assert memory_error(full.value) is None


def test_a_link_that_leads_back_to_itself(tmp_path, capsys):
    (tmp_path / "a.nii.gz").symlink_to(tmp_path / "b.nii.gz")
    (tmp_path / "b.nii.gz").symlink_to(tmp_path / "a.nii.gz")
    try:
        (tmp_path / "a.nii.gz").resolve()
    except RuntimeError as error:  # before Python 3.13
        told = str(disk_error(error))
        assert told.endswith("a.nii.gz is a link that leads back to itself; correct the path.")
    words = ["segment", "no.ckpt", "--t2", str(tmp_path / "a.nii.gz"), "-o", str(tmp_path / "o")]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith("pmixseg: ") and len(said.splitlines()) == 1


class NoBase(MultiEncoderUNet):
    def __init__(self, width=2):
        self.width = width


class LateBase(StudentModule):
    def __init__(self):
        self.setting = self.task.name
        super().__init__()


class NoData(BraTSDataModule):
    def __init__(self):
        self.mine = 1


class Monitor(GapMonitor):
    def __init__(self):
        self.mine = 1


@pytest.mark.parametrize("own", [NoBase, LateBase, NoData, Monitor])
def test_a_subclass_that_forgets_its_base_is_told(own):
    words = f"{own.__name__}: {own.__name__}.__init__ does not call super().__init__(...); let it"
    with pytest.raises(InputError, match=re.escape(words)):
        own()


class Broken(StudentModule):
    def __init__(self):
        super().__init__(backbone=MultiEncoderUNet(width=2, levels=2))
        self.nothing  # noqa: B018  # it fails


def test_other_mistakes_of_a_subclass_keep_their_error():
    with pytest.raises(AttributeError, match="nothing"):
        Broken()


def called(*modules, ckpt_path):
    """Raise a KeyError of the last module, which the one before calls, and so on."""
    call = "raise KeyError('lr')"
    inner = None
    for name in reversed(modules):
        names = {"__name__": name, "inner": inner}
        exec(f"def outer(ckpt_path):\n    {call}", names)
        inner, call = names["outer"], "inner(ckpt_path)"
    with pytest.raises(KeyError) as raised:
        inner(ckpt_path)
    return raised.value


TRAINER = "lightning.pytorch.trainer.trainer"
CONNECTOR = "lightning.pytorch.trainer.connectors.checkpoint_connector"


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        ((TRAINER, CONNECTOR, "packaging.version"), True),
        ((TRAINER, CONNECTOR, "copy"), True),
        ((TRAINER, CONNECTOR, "mine"), False),  # a class of the user's own tells its fault
        ((TRAINER, "mine", "torch.optim.adamw"), True),  # the first step that uses the state
        ((TRAINER, "mine"), False),
        ((CONNECTOR, "copy"), False),  # no checkpoint was asked for
    ],
)
def test_a_damaged_state_of_a_training_is_told(modules, told):
    error = restoring_error(called(*modules, ckpt_path="x.ckpt"))
    assert (error is not None) == told
    if error is not None:
        assert str(error).startswith("x.ckpt holds a state of the training that cannot be restored")
        assert "(KeyError: 'lr')" in str(error)
    assert restoring_error(called(*modules, ckpt_path=None)) is None
