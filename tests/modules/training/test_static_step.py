"""The training step of a GPU, as far as a CPU can show it: static, whole, in few operations."""

import copy
import functools
import itertools
import logging
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from lightning.pytorch import LightningModule, Trainer
from torch.utils._python_dispatch import TorchDispatchMode

from pmixseg.backbones import MMFormer, MultiEncoderUNet, RFNet
from pmixseg.callbacks import Distillation, PmixAlignment
from pmixseg.execution import as_on_gpu, seed_device
from pmixseg.losses import DiceCE, LogitKL, MixtureAnchor
from pmixseg.losses.rfnet import RFNetCriterion
from pmixseg.losses.term import TermWeight
from pmixseg.modules import StudentModule, TeacherModule
from pmixseg.modules.training.compilation import CompiledStep, Plan
from pmixseg.modules.training.optimization import clip_norm, fuse, place_steps
from tests.callbacks.memory_data import MemoryData, quiet_trainer, tiny
from tests.inference import tiny_models as small

pytestmark = pytest.mark.long

BACKBONES = small.BACKBONES | {
    "unet": (lambda: MultiEncoderUNet(width=4, levels=2, deep_supervision=True), DiceCE, 16),
    "mmformer": (lambda: MMFormer(**small.MMFORMER | {"width": 1}), RFNetCriterion, 32),
}
PATTERNS = ([[1, 1, 1, 1], [1, 0, 1, 1]], [[0, 1, 0, 0], [1, 0, 0, 1]], [[0, 0, 1, 0]] * 2)


def module_of(name, kind, fill, aligned, taught):
    """A module with its terms, as a training would have it."""
    make, criterion, _ = BACKBONES[name]
    torch.manual_seed(0)
    backbone = make()
    own = name in ("uhved", "shaspec", "demoseg", "early")
    module = kind(backbone=backbone, criterion=criterion(), fill="zero" if own else fill)
    if aligned and name != "early":
        anchor = None if module.anchor is not None else MixtureAnchor(weights="uniform")
        term = PmixAlignment(weight=0.1, anchor=anchor).build_term(module)
        module.add_term("align", term, TermWeight(0.1))
    if taught:
        teacher = TeacherModule(backbone=make())
        terms = {"logit": LogitKL()} if name == "early" else None
        term = Distillation(teacher, weight=1.0, terms=terms).build_term(module)
        module.add_term("distill", term, TermWeight(0.5, warmup_epochs=3))
    return module.train()


def batch_of(name, number, pattern=((1, 1, 1, 1), (1, 1, 1, 1))):
    side, torch_generator = BACKBONES[name][2], torch.Generator().manual_seed(number)
    acquired = torch.tensor(pattern, dtype=torch.bool)
    image = torch.randn(2, 4, side, side, side, generator=torch_generator)
    return {
        "image": image * acquired[:, :, None, None, None],
        "label": torch.randint(0, 4, (2, side, side, side), generator=torch_generator),
        "case_id": [f"a{number}", f"b{number}"],
        "acquired": acquired,
        "key": torch.tensor([2 * number, 2 * number + 1]),
    }


@pytest.fixture(autouse=True)
def same_noise(monkeypatch):
    """Noise that does not depend on the order of a volume in memory."""
    monkeypatch.setattr(
        torch, "randn_like", lambda x: torch.linspace(-1, 1, x.numel()).view(x.shape)
    )


def three_steps(module, name):
    module.log = lambda *args, **kwargs: None
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, eps=1e-3)
    losses = []
    for number, pattern in enumerate(PATTERNS):
        optimizer.zero_grad()
        batch = batch_of(name, number, pattern)
        batch["image"] = batch["image"].to(next(module.parameters()).dtype)
        loss = module.training_step(batch, number)
        loss.backward()
        module.on_after_backward()
        if number == 0:
            # An order of channels has no gradient (DeMoSeg).
            learnt = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
            gradients = {n: gradient.clone() for n, gradient in learnt.items()}
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), gradients, dict(module.named_parameters())


QUICK = {(TeacherModule, "unet"), *((StudentModule, name) for name in BACKBONES)}
"""A teacher's step is that of a student who is shown everything; the others are marked slow."""
EVERY = [
    pytest.param(kind, name, marks=pytest.mark.slow if (kind, name) not in QUICK else ())
    for kind, name in itertools.product((TeacherModule, StudentModule), BACKBONES)
]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_static_and_lean_steps_give_equal_losses_gradients_and_weights(name, kind):
    near = {"rtol": 1e-6, "atol": 1e-8}
    plan = (name, kind, "anchor", True, False)
    losses, gradients, weights = three_steps(module_of(*plan).double(), name)
    with as_on_gpu():
        static = three_steps(module_of(*plan).double(), name)
    torch.testing.assert_close(static[0], losses, **near)
    assert static[1].keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(static[1][key], gradient, **near, msg=lambda m, k=key: k + m)
    for key, weight in weights.items():
        torch.testing.assert_close(static[2][key], weight, **near, msg=lambda m, k=key: k + m)


ROWS = list(
    itertools.product(
        BACKBONES,
        (TeacherModule, StudentModule),
        ("anchor", "zero"),
        (False, True),
        (False, True),
    )
)


def row_id(name, kind, fill, aligned, taught):
    return "-".join([name, kind.__name__[:7], fill, "align" * aligned, "distill" * taught])


def is_quick(name, kind, fill, aligned, taught):
    """The fullest step of three backbones; the rest of the matrix is marked slow."""
    quick = {"unet": StudentModule, "early": StudentModule, "rfnet": TeacherModule}
    return quick.get(name) is kind and fill == "anchor" and aligned and taught == (name != "rfnet")


@pytest.mark.parametrize(
    "row",
    [pytest.param(r, marks=() if is_quick(*r) else pytest.mark.slow, id=row_id(*r)) for r in ROWS],
)
def test_a_step_is_one_graph_compiled_once_for_every_pattern_and_epoch(row, monkeypatch):
    name = row[0]
    module = module_of(*row)
    module.log = lambda *args, **kwargs: None
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, mode=None, **options: compiled(f, backend=counter, **options)
    )
    module._step = CompiledStep(module.losses, Plan(cuda_graphs=False, whole=True), module)
    for epoch, pattern in enumerate(PATTERNS):
        monkeypatch.setattr(type(module), "current_epoch", epoch, raising=False)
        torch.manual_seed(1)
        with as_on_gpu():
            loss = module.training_step(batch_of(name, epoch, pattern), epoch)
            assert module._step.compiled is not None, "the compiler failed"
            plain = module.losses(
                *compiled_arguments(module, batch_of(name, epoch, pattern), epoch)
            )[0]
        torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def compiled_arguments(module, batch, epoch):
    batch = module.own_batch({**batch, "present": module.draw_present(batch)})
    for term in module.terms.values():
        batch = term.prepare(batch)
    return batch, epoch, {name: w.at(epoch) for name, w in module.term_weights.items()}


def test_no_value_of_a_tensor_is_asked_for(monkeypatch):
    module = module_of("rfnet", StudentModule, "anchor", True, True)
    arguments = compiled_arguments(module, batch_of("rfnet", 0), 0)

    def refused(*args):
        raise AssertionError("a step asked for a tensor's value")

    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refused)
    with as_on_gpu():
        module.losses(*arguments)


def test_a_failure_of_the_compiler_is_one_sentence_and_leaves_no_trace(monkeypatch, caplog):
    module = module_of("unet", StudentModule, "anchor", False, False)
    module.log = lambda *args, **kwargs: None

    def broken(graph, inputs):
        logging.getLogger("torch._inductor.scheduler").critical("Error in codegen\nfor this")
        raise RuntimeError("no compiler here.\nMuch more.")

    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, mode=None, **options: compiled(f, backend=broken, **options)
    )
    torch.compiler.reset()
    batch = batch_of("unet", 0)
    torch.manual_seed(3)
    expected = module.training_step(batch, 0), torch.rand(1)
    module._step = CompiledStep(module.losses, Plan(cuda_graphs=False, whole=True), module)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=r"could not be compiled .*; model.compile: false spares"):
        actual = module.training_step(batch, 0), torch.rand(1)
    torch.testing.assert_close(actual, expected)
    assert module._step.compiled is None
    assert "codegen" not in caplog.text


def test_channels_last_is_another_order_of_the_same_numbers(monkeypatch):
    module = module_of("unet", StudentModule, "anchor", True, False)
    module.log = lambda *args, **kwargs: None
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, mode=None, **options: compiled(f, backend="eager", **options)
    )
    torch.compiler.reset()
    batch = batch_of("unet", 0)
    torch.manual_seed(1)
    plain = module.training_step(batch, 0)
    how = Plan(cuda_graphs=False, whole=True, channels_last=True)
    module._step = CompiledStep(module.losses, how, module)
    torch.manual_seed(1)
    reordered = module.training_step(batch, 0)
    weight = next(p for p in module.parameters() if p.dim() == 5 and p.shape[1] > 1)
    assert not weight.is_contiguous()
    torch.testing.assert_close(reordered, plain, rtol=1e-4, atol=1e-5)
    module._step.release()
    for name, parameter in module.named_parameters():
        assert parameter.is_contiguous()
        assert torch.equal(parameter, before[name])


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
    one = module(optimizer=functools.partial(make, fused=False))
    other = copy.deepcopy(one)
    other.make_optimizer = make
    plain, fused = one.configure_optimizers(), other.configure_optimizers()
    assert {g["fused"] for g in plain.param_groups} == {False}
    assert {g["fused"] for g in fused.param_groups} == {True}
    expected, weights = stepped(one, plain), stepped(other, fused)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-6, atol=1e-7)
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
    fuse(counts_from_birth := torch.optim.Adagrad(weights))
    assert counts_from_birth.param_groups[0]["fused"] is None


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


@pytest.mark.parametrize("most", [0.5, 1e6])
def test_clipping_gives_torch_s_numbers_in_eight_operations(most):
    one, generator = module(), torch.Generator().manual_seed(1)
    other = copy.deepcopy(one)
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    for parameter, same in pairs[1:]:  # the first has no gradient
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        same.grad = parameter.grad.clone()
    torch.nn.utils.clip_grad_norm_(other.parameters(), most)
    optimizer = torch.optim.AdamW(one.parameters())
    with Kernels() as counted:
        clip_norm(optimizer, most)
    assert len(counted.names) <= 8
    for parameter, same in pairs[1:]:
        torch.testing.assert_close(parameter.grad, same.grad, rtol=0, atol=0)
    clip_norm(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]), most)  # none has one


@pytest.mark.parametrize("fused", [None, True])
def test_an_optimizer_that_was_made_fused_is_left_to_lightning(fused):
    """Its gradients may still be scaled: in float16 Lightning refuses to clip them."""
    one = module()
    optimizer = torch.optim.AdamW(one.parameters(), fused=fused)
    for parameter in one.parameters():
        parameter.grad = torch.ones_like(parameter)
    one.trainer = Trainer(gradient_clip_val=1e-3, logger=False, enable_checkpointing=False)
    with as_on_gpu(), mock.patch.object(LightningModule, "configure_gradient_clipping") as theirs:
        one.configure_gradient_clipping(optimizer, 1e-3, "norm")
    assert theirs.called is bool(fused)


def test_one_device_is_seeded_as_all_are():
    torch.manual_seed(7)
    expected = torch.rand(2)
    seed_device(torch.device("cpu"), 7)
    assert torch.equal(torch.rand(2), expected)


def test_a_gpu_shows_one_loss_in_ten_and_the_last(tmp_path):
    steps = []

    class Shown(StudentModule):
        def log(self, name, value, **arguments):
            if name == "loss":
                steps.append(self.global_step)

    for static, shown in ((True, [0, 10, 11]), (False, list(range(12)))):
        steps.clear()
        trained = Shown(backbone=tiny(2))
        with as_on_gpu(static):
            quiet_trainer(tmp_path).fit(trained, MemoryData([[True] * 4] * 12, batch_size=1))
        assert steps == shown
