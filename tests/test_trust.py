"""A checkpoint from elsewhere names classes: none is imported or called that nobody trusts."""

import sys

import pytest
import torch
from torch import nn

from pmixseg.backbones import EarlyFusion, MultiEncoderUNet
from pmixseg.callbacks import Distillation
from pmixseg.cli import main
from pmixseg.describe import find_class, restricted
from pmixseg.errors import InputError
from pmixseg.losses.segmentation import DiceCE
from pmixseg.modules import StudentModule, load
from pmixseg.modules.checkpoint import write_checkpoint
from pmixseg.modules.payload import payload_of
from pmixseg.modules.preparation import Preparation
from pmixseg.task import BRATS
from pmixseg.trust import check_description, trust, trusted

FOREIGN = "foreign_for_test"
APRIL = "pmixseg.backbones.april2025.April2025Network"


def network():
    return MultiEncoderUNet(BRATS.modalities, 4, width=2, levels=2)


def early(inner):
    return {"class_path": "pmixseg.backbones.EarlyFusion", "init_args": {"network": inner}}


@pytest.fixture
def write(tmp_path):
    """Write a checkpoint some of whose arguments were replaced by hand."""

    def written(module=None, **arguments):
        module = module or StudentModule(backbone=network())
        module.preparation = Preparation(normalisation="zscore-own-mask", patch=(16, 16, 16))
        payload = payload_of(module)
        payload["init_args"] |= arguments
        checkpoint = {"epoch": 0, "state_dict": module.state_dict(), "pmixseg": payload}
        return write_checkpoint(checkpoint, tmp_path / "given.ckpt")

    return written


@pytest.fixture
def touch(tmp_path):
    """A description whose making writes a file."""
    made = tmp_path / "PWNED"
    yield {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(made)]}}
    assert not made.exists()


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A module on the path that nobody has imported."""
    text = "from pmixseg.losses.segmentation import DiceCE\nclass Mine(DiceCE): ...\n"
    text += "from torch.nn import Sequential as Net\n"
    (tmp_path / f"{FOREIGN}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield FOREIGN
    sys.modules.pop(FOREIGN, None)
    trust([])


PLACES = {
    "criterion": lambda thing: {"criterion": thing},
    "sampler": lambda thing: {"sampler": thing},
    "optimizer": lambda thing: {"optimizer": thing},
    "scheduler": lambda thing: {"scheduler": thing},
    "a network in the backbone": lambda thing: {"backbone": early(thing)},
    "an argument of that": lambda thing: {
        "backbone": early(
            {"class_path": "monai.networks.nets.SegResNet", "init_args": {"act": thing}}
        )
    },
}


@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_calls_nothing_but_parts_of_a_model(write, touch, place):
    path = write(**PLACES[place](touch))
    with pytest.raises(InputError, match=r"uses subprocess\.Popen, which is not part of pmixseg"):
        load(path)


@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_imports_nothing_that_nobody_named(write, foreign, place):
    path = write(**PLACES[place]({"class_path": f"{FOREIGN}.Mine", "init_args": {}}))
    with pytest.raises(InputError, match=f"--import {FOREIGN} "):
        load(path)
    assert FOREIGN not in sys.modules


@pytest.mark.parametrize(
    "name",
    [
        "torch.hub.load",
        "torch.utils.cpp_extension.load_inline",
        "torch.utils.cpp_extension.subprocess.Popen",
        "monai.utils.optional_import",
        "pmixseg.cli.main",
        "__main__.sys.exit",
    ],
)
@pytest.mark.parametrize("place", ["criterion", "optimizer", "a network in the backbone"])
def test_functions_and_other_classes_of_trusted_packages_are_no_parts_of_a_model(
    write, monkeypatch, name, place
):
    monkeypatch.setattr(sys.modules["__main__"], "sys", sys, raising=False)
    path = write(**PLACES[place]({"class_path": name, "init_args": {}}))
    with pytest.raises(InputError, match=f"names {name}, which is no network, loss, optimizer"):
        load(path)


def test_a_name_that_is_not_in_a_description_is_checked_as_well(write, foreign):
    """April2025Network takes its network's class as plain text."""
    path = write(
        backbone=early({"class_path": APRIL, "init_args": {"network": f"{FOREIGN}.Net"}}),
    )
    with pytest.raises(InputError, match=f"--import {FOREIGN} "):
        load(path)
    assert FOREIGN not in sys.modules


@pytest.mark.parametrize(
    "arguments",
    [
        {"criterion": f"{FOREIGN}.Mine"},
        {"optimizer": "os.system"},
        {"backbone": "elsewhere.yaml"},
        {"criterion.class_path": f"{FOREIGN}.Mine"},
        {"criterion.init_args.weight": 1},
        {"criterion": {"class_path": ["os"]}},
        {"criterion": {"class_path": "pmixseg.losses.DiceCE", "init_args": "x.yaml"}},
        {"criterion": {"dict_kwargs": {"class_path": 1}}},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_text_where_an_object_belongs_is_refused(write, foreign, arguments):
    path = write(**arguments)
    for read in (lambda: load(path), lambda: run("test", path)):
        with pytest.raises(InputError, match="describes no object; it was damaged or made to do"):
            read()
    assert FOREIGN not in sys.modules


def run(command, path, *flags):
    """A command whose InputError is seen rather than printed."""
    from pmixseg.cli.training import TrainingCLI

    TrainingCLI([command, f"--ckpt_path={path}", *flags])


@pytest.mark.parametrize("thing", ["touch", "foreign"])
@pytest.mark.parametrize("command", ["test", "validate", "predict", "segment", "export"])
def test_no_command_runs_what_a_checkpoint_names(
    write, touch, foreign, phantom_root, phantom_store, tmp_path, capsys, command, thing
):
    named = touch if thing == "touch" else {"class_path": f"{FOREIGN}.Mine", "init_args": {}}
    path = str(write(criterion=named))
    case = next(phantom_root.rglob("*_flair.nii.gz"))
    rest = {
        "segment": [path, "--flair", str(case), "-o", str(tmp_path / "out")],
        "export": [path, "--combination", "flair", "-o", str(tmp_path / "out")],
    }
    flags = [f"--ckpt_path={path}", f"--data.store={phantom_store}"]
    assert main([command, *rest.get(command, flags)]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"uses {named['class_path']}, which is not part of pmixseg" in told
    assert FOREIGN not in sys.modules


@pytest.mark.parametrize("thing", ["touch", "foreign"])
def test_a_teachers_checkpoint_is_no_exception(write, touch, foreign, thing):
    named = touch if thing == "touch" else {"class_path": f"{FOREIGN}.Mine", "init_args": {}}
    teacher = Distillation(teacher=str(write(criterion=named)), weight=1.0)
    with pytest.raises(InputError, match="is not part of pmixseg"):
        teacher.load_teacher()
    assert FOREIGN not in sys.modules


def test_named_modules_are_imported_and_trusted(write, foreign, phantom_root, tmp_path):
    path = write(criterion={"class_path": f"{FOREIGN}.Mine", "init_args": {}})
    assert type(load(path, modules=[FOREIGN]).criterion).__name__ == "Mine"
    case = next(phantom_root.rglob("*_flair.nii.gz"))
    flags = [str(path), "--flair", str(case), "-o", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(InputError, match="--import"):
        load(path)  # although it is imported now: that was for one call
    assert main(["segment", "--import", FOREIGN, *flags]) == 0
    assert type(Distillation(teacher=str(path)).load_teacher().criterion).__name__ == "Mine"
    assert main(["segment", *flags]) == 1  # what one command line names holds for that one


def test_a_notebooks_own_class_needs_no_name(write, monkeypatch):
    class Mine(DiceCE): ...

    Mine.__module__, Mine.__qualname__ = "__main__", "Mine"
    monkeypatch.setattr(sys.modules["__main__"], "Mine", Mine, raising=False)
    path = write(StudentModule(backbone=network(), criterion=Mine()))
    assert type(load(path).criterion) is Mine


def test_what_every_checkpoint_holds_passes():
    module = StudentModule(
        combination="flair+t1",
        backbone=network(),
        criterion=DiceCE(),
        optimizer=torch.optim.SGD,
        scheduler={"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2}},
        evaluation={"records": "test.csv"},
    )
    payload = payload_of(module)
    check_description(payload, trusted(), "given.ckpt")
    inner = {"class_path": "monai.networks.nets.SegResNet", "init_args": {"init_filters": 8}}
    own = {"class_path": APRIL, "init_args": {"arguments": {"init_filters": 8}}}
    for net in (inner, own):
        check_description(payload_of(StudentModule(backbone=EarlyFusion(net))), trusted(), "x")


def test_constructors_build_under_the_same_rule():
    with restricted(["torch"]):
        assert find_class("torch.nn.Linear") is nn.Linear
        with pytest.raises(InputError, match=r"uses pmixseg\.losses\.DiceCE"):
            find_class("pmixseg.losses.DiceCE")
    assert find_class("pmixseg.losses.DiceCE") is DiceCE
