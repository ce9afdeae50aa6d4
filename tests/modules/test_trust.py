"""A checkpoint from elsewhere names classes: none is imported or called that nobody trusts."""

import contextlib
import inspect
import socket
import sys
import threading
import urllib.request

import pytest
import torch
from monai.networks import nets

from pmixseg.backbones import EarlyFusion, MultiEncoderUNet
from pmixseg.callbacks import Distillation
from pmixseg.cli import main
from pmixseg.errors import InputError
from pmixseg.losses.segmentation import DiceCE
from pmixseg.modules import StudentModule, load
from pmixseg.modules.checkpoint import write_checkpoint
from pmixseg.modules.preparation import Preparation
from pmixseg.modules.trust import MONAI_NETWORKS, offline, resolve
from pmixseg.task import BRATS
from tests.cli.presets import TINY_UNET

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
        payload = module.payload().to_dict()
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


PLACES = {
    "criterion": lambda named: {"criterion": named},
    "sampler": lambda named: {"sampler": named},
    "optimizer": lambda named: {"optimizer": named},
    "scheduler": lambda named: {"scheduler": named},
    "a network in the backbone": lambda named: {"backbone": early(named)},
    "an argument of that": lambda named: {
        "backbone": early(
            {"class_path": "monai.networks.nets.SegResNet", "init_args": {"act": named}}
        )
    },
}


@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_calls_nothing_but_parts_of_a_model(write, touch, place):
    path = write(**PLACES[place](touch))
    with pytest.raises(InputError, match=r"names subprocess\.Popen, .*--import subprocess "):
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
        "pmixseg.cli.main",
        "pmixseg.backbones.monai.inspect.signature",
        "pmixseg.callbacks.Distillation",
        "pmixseg.data.SplitFiles",
        "pmixseg.modules.network.LightningModule",
        "torch.optim.Optimizer.load_state_dict",
        "__main__.sys.exit",
    ],
)
@pytest.mark.parametrize("place", ["criterion", "optimizer", "a network in the backbone"])
def test_functions_and_other_classes_of_trusted_packages_are_no_parts_of_a_model(
    write, monkeypatch, name, place
):
    monkeypatch.setattr(sys.modules["__main__"], "sys", sys, raising=False)
    path = write(**PLACES[place]({"class_path": name, "init_args": {}}))
    with pytest.raises(InputError, match=f"names {name}, which is no network, criterion"):
        load(path)


@pytest.mark.parametrize(
    "name",
    [
        "torch.hub.load",
        "torch.utils.cpp_extension.load_inline",
        "torch.nn.Sequential",
        "monai.utils.optional_import",
        "monai.losses.PerceptualLoss",
        "monai.networks.nets.HoVerNet",
        "monai.networks.nets.Transchex",
        "monai.networks.nets.FlexibleUNet",
        "monai.networks.nets.seresnet50",
    ],
)
@pytest.mark.parametrize("place", ["criterion", "optimizer", "a network in the backbone"])
def test_of_other_packages_only_what_is_listed_may_be_named(write, name, place):
    path = write(**PLACES[place]({"class_path": name, "init_args": {}}))
    with pytest.raises(InputError, match=f"names {name}, .*--import {name.rpartition('.')[0]} "):
        load(path)


def test_a_loss_that_fetches_code_is_not_made(write, tmp_path, phantom_root, capsys):
    """MONAI's perceptual loss runs the hubconf.py of a folder or address that it is told."""
    cache = tmp_path / "cache"
    repository = cache / "Project-MONAI_perceptual-models_main"
    repository.mkdir(parents=True)
    (repository / "hubconf.py").write_text(
        f"import torch\nopen({str(tmp_path / 'RAN')!r}, 'w')\n"
        "def medicalnet_resnet10_23datasets(*a, **k): return torch.nn.Identity()\n"
    )
    arguments = {"spatial_dims": 3, "network_type": "medicalnet_resnet10_23datasets"}
    arguments |= {"is_fake_3d": False, "cache_dir": str(cache)}
    loss = {"class_path": "monai.losses.PerceptualLoss", "init_args": arguments}
    case = next(phantom_root.rglob("*_flair.nii.gz"))
    path = str(write(criterion=loss))
    assert main(["segment", path, "--flair", str(case), "-o", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "RAN").exists()
    assert "--import monai.losses" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(c.__name__ for c in MONAI_NETWORKS))
def test_listed_networks_fetch_nothing(name):
    source = inspect.getsource(getattr(nets, name))
    for word in (
        "torch.hub",
        "download",
        "urlopen",
        "load_state_dict_from_url",
        "torch.load",
        "open(",
    ):
        assert word not in source


@pytest.mark.parametrize(
    "fetch",
    [
        lambda: torch.hub.load("somebody/something", "net"),
        lambda: torch.hub.load(".", "net", source="local"),
        lambda: torch.hub.load_state_dict_from_url("https://example.org/x.pth"),
        lambda: torch.hub.download_url_to_file("https://example.org/x.pth", "x.pth"),
        lambda: urllib.request.urlopen("http://127.0.0.1:1/x"),
        lambda: socket.create_connection(("127.0.0.1", 1)),
        lambda: socket.socket().connect(("127.0.0.1", 1)),
    ],
)
def test_nothing_is_fetched_while_a_model_is_made(fetch):
    with pytest.raises(InputError, match="something of the network"), offline("a.ckpt"):
        fetch()


def test_the_network_is_shut_for_the_making_thread_only_and_open_again_later():
    before = (socket.socket.connect, socket.getaddrinfo, torch.hub.load)
    answers = []

    def ask():
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", 1))
        answers.append("asked")

    with offline("a.ckpt"):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert answers == ["asked"]
    assert (socket.socket.connect, socket.getaddrinfo, torch.hub.load) == before


class Fetching(DiceCE):
    def __init__(self):
        super().__init__()
        urllib.request.urlopen("http://127.0.0.1:1/x")


def test_a_class_of_our_own_that_fetches_is_stopped(write, monkeypatch, phantom_store, capsys):
    monkeypatch.setattr(Fetching, "__module__", "pmixseg.losses.segmentation")
    monkeypatch.setattr("pmixseg.losses.segmentation.Fetching", Fetching, raising=False)
    name = {"class_path": "pmixseg.losses.segmentation.Fetching", "init_args": {}}
    path = write(criterion=name)
    with pytest.raises(InputError, match="something of the network"):
        load(path)
    assert main(["test", f"--ckpt_path={path}", f"--data.store={phantom_store}"]) == 1
    assert "something of the network" in capsys.readouterr().err


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


@pytest.mark.parametrize("origin", ["touch", "foreign"])
@pytest.mark.parametrize("command", ["test", "validate", "predict", "segment", "export"])
def test_no_command_runs_what_a_checkpoint_names(
    write, touch, foreign, phantom_root, phantom_store, tmp_path, capsys, command, origin
):
    named = touch if origin == "touch" else {"class_path": f"{FOREIGN}.Mine", "init_args": {}}
    path = str(write(criterion=named))
    case = next(phantom_root.rglob("*_flair.nii.gz"))
    rest = {
        "segment": [path, "--flair", str(case), "-o", str(tmp_path / "out")],
        "export": [path, "--combination", "flair", "-o", str(tmp_path / "out")],
    }
    flags = [f"--ckpt_path={path}", f"--data.store={phantom_store}"]
    assert main([command, *rest.get(command, flags)]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"names {named['class_path']}, " in told
    assert "--import" in told
    assert FOREIGN not in sys.modules


@pytest.mark.parametrize("origin", ["touch", "foreign"])
def test_a_teachers_checkpoint_is_no_exception(write, touch, foreign, origin):
    named = touch if origin == "touch" else {"class_path": f"{FOREIGN}.Mine", "init_args": {}}
    teacher = Distillation(teacher=str(write(criterion=named)), weight=1.0)
    with pytest.raises(InputError, match="--import"):
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
    assert main(["segment", *flags]) == 1  # what one command line names holds for that one


def test_a_teacher_may_name_what_its_callback_is_told_to_trust(write, foreign):
    path = str(write(criterion={"class_path": f"{FOREIGN}.Mine", "init_args": {}}))
    teacher = Distillation(teacher=path, weight=1.0, modules=[FOREIGN]).load_teacher()
    assert type(teacher.criterion).__name__ == "Mine"
    with pytest.raises(InputError, match="--import"):
        Distillation(teacher=path, weight=1.0).load_teacher()


def test_what_the_command_line_imports_is_trusted_in_a_teacher(
    write, foreign, phantom_store, tmp_path
):
    teacher = str(write(criterion={"class_path": f"{FOREIGN}.Mine", "init_args": {}}))
    flags = [f"--data.store={phantom_store}", f"--run={tmp_path / 'run'}", "--distill.weight=1"]
    flags += [f"--distill.teacher={teacher}", "--data.patch_size=16", "--trainer.max_steps=1"]
    flags += ["--trainer.limit_val_batches=0", "--trainer.accelerator=cpu"]
    flags += ["--model=StudentModule", *TINY_UNET]
    assert main(["fit", *flags]) == 1
    assert main(["fit", "--import", FOREIGN, *flags]) == 0


def test_a_class_of_a_script_is_found_in_the_module_that_is_named(write, foreign):
    path = write(criterion={"class_path": "__main__.Mine", "init_args": {}})
    with pytest.raises(InputError, match=r"Mine was defined in a script or notebook.*--import"):
        load(path)
    assert type(load(path, modules=[FOREIGN]).criterion).__name__ == "Mine"


def test_what_a_named_module_has_imported_is_not_its_own(write, foreign):
    path = write(backbone=early({"class_path": f"{FOREIGN}.Net", "init_args": {}}))
    with pytest.raises(InputError, match=f"names {FOREIGN}.Net, which is no network"):
        load(path, modules=[FOREIGN])


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
    payload = module.payload().to_dict()
    assert resolve(payload) == payload
    inner = {"class_path": "monai.networks.nets.SegResNet", "init_args": {"init_filters": 8}}
    own = {"class_path": APRIL, "init_args": {"arguments": {"init_filters": 8}}}
    for net in (inner, own):
        resolve(StudentModule(backbone=EarlyFusion(net)).payload().to_dict())
