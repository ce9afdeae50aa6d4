"""What a step of a GPU starts: optimizer and clipping in a few operations, bounded in all."""

import copy
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pmixseg.backbones import MultiEncoderUNet, RFNet
from pmixseg.execution import as_on_gpu
from pmixseg.losses import DiceCE
from pmixseg.losses.rfnet import RFNetCriterion
from pmixseg.modules import StudentModule
from pmixseg.modules.training.optimization import fuse, place_steps


class Kernels(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def module(**arguments):
    torch.manual_seed(0)
    return StudentModule(backbone=MultiEncoderUNet(width=4, levels=2), **arguments)


def stepped(made, optimizer):
    """Weights after three steps with the same gradients."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in made.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return dict(made.named_parameters())


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)]
)
def test_a_fused_optimizer_takes_one_operation_per_group_and_the_same_steps(make):
    one = module(optimizer=make)
    other = copy.deepcopy(one)
    plain = one.configure_optimizers()
    with as_on_gpu():
        fused = other.configure_optimizers()
    assert {g["fused"] for g in plain.param_groups} == {None}
    assert {g["fused"] for g in fused.param_groups} == {True}
    expected, found = stepped(one, plain), stepped(other, fused)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7)
    with Kernels() as counted:
        fused.step()
    assert sum("fused" in name for name in counted.names) == len(fused.param_groups) == 2
    assert len(counted.names) <= 6


def test_what_a_user_chose_stays():
    weights = [torch.nn.Parameter(torch.zeros(1))]
    for chosen in ({"foreach": True}, {"fused": False}, {"foreach": False}):
        optimizer = torch.optim.AdamW(weights, **chosen)
        fuse(optimizer)
        assert not optimizer.param_groups[0]["fused"]
    fuse(without := torch.optim.Adadelta(weights))
    assert "fused" not in without.param_groups[0]


def test_steps_of_a_restored_optimizer_lie_where_a_fused_one_reads_them():
    for fused, expected in ((True, "meta"), (None, "cpu")):
        weight = torch.nn.Parameter(torch.zeros(2, device="meta"))
        optimizer = torch.optim.AdamW([weight])
        optimizer.param_groups[0]["fused"] = fused
        optimizer.state[weight] = {"step": torch.tensor(3.0)}
        place_steps(optimizer)
        assert optimizer.state[weight]["step"].device.type == expected


@pytest.mark.parametrize(
    ("make", "criterion", "most"),
    [(MultiEncoderUNet, DiceCE, 280), (RFNet, RFNetCriterion, 1050)],
)
def test_the_number_of_operations_of_a_step_is_bounded(make, criterion, most):
    """2ddf8fe: 791 and 3,399; one operation costs some 45 µs of the host."""
    network = make(width=4).train()
    shown = torch.ones(1, 4, dtype=torch.bool)
    batch = {"present": shown, "acquired": shown, "label": torch.randint(0, 4, (1, 16, 16, 16))}
    with as_on_gpu(), Kernels() as counted:
        output = network(torch.randn(1, 4, 16, 16, 16), shown)
        criterion()(output, batch, 0).backward()
    assert len(counted.names) <= most
