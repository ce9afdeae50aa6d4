"""A compiled step within a whole training: accumulation, averages, a scaler, resuming, DDP.

The graph is made by torch's tracer and run without a code generator (``eager``), which is cheap.
"""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from pmixseg.callbacks import PmixAlignment
from pmixseg.modules import StudentModule
from pmixseg.modules.training.compilation import CompiledStep, Plan, plan
from tests.callbacks.memory_data import MemoryData, quiet_trainer, tiny
from tests.callbacks.test_ddp import UNEQUAL

NEAR = {"rtol": 1e-4, "atol": 1e-5}
COMPILE = torch.compile


class Tracer(Callback):
    """Compile without a code generator, in whichever process this is."""

    def setup(self, trainer, module, stage):
        torch.compiler.reset()
        torch.compile = lambda f, mode=None, **options: COMPILE(f, backend="eager", **options)

    def on_train_batch_end(self, trainer, module, *args):
        assert module._step is None or module._step.compiled is not None, "the compiler failed"

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero:
            torch.save(module.state_dict(), f"{trainer.default_root_dir}/state.pt")

    def teardown(self, trainer, module, stage):
        torch.compile = COMPILE


def trained(folder, compiled, *, callbacks=(), resume=None, epochs=2, batch_size=2, **arguments):
    """Weights after a training; batches lack different modalities."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    module = StudentModule(backbone=tiny(), optimizer=torch.optim.SGD)
    keys = list(module.state_dict())
    module.compile_setting = compiled  # of the training step alone; evaluation is not looked at
    terms = [PmixAlignment(weight=0.5), Tracer(), *callbacks]
    trainer = quiet_trainer(folder, max_epochs=epochs, callbacks=terms, **arguments)
    trainer.fit(module, MemoryData(UNEQUAL, batch_size=batch_size), ckpt_path=resume)
    assert [key for key in module.state_dict() if not key.startswith("terms")] == keys
    trainer.save_checkpoint(folder / "last.ckpt")
    return torch.load(folder / "state.pt", weights_only=True)


def compare(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, **NEAR, msg=name)


@pytest.mark.parametrize(
    "with_",
    ["accumulation", *(pytest.param(k, marks=pytest.mark.slow) for k in ("averages", "clipping"))],
)
def test_a_compiled_training_is_the_plain_one(tmp_path, with_):
    settings = {
        "accumulation": {"accumulate_grad_batches": 2},
        "averages": {},
        "clipping": {"gradient_clip_val": 0.1},
    }[with_]

    def run(name, compiled):
        averages = [EMAWeightAveraging(decay=0.5)] if with_ == "averages" else []
        return trained(tmp_path / name, compiled, callbacks=averages, **settings)

    compare(run("plain", False), run("compiled", True))


@pytest.mark.slow
def test_a_compiled_training_resumes_plain_and_compiled(tmp_path):
    whole = trained(tmp_path / "whole", False)
    trained(tmp_path / "first", True, epochs=1)
    for name, compiled in (("plain", False), ("compiled", True)):
        resumed = trained(tmp_path / name, compiled, resume=tmp_path / "first" / "last.ckpt")
        compare(whole, resumed)


def test_the_scaler_of_float16_scales_a_compiled_step(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    state = trained(tmp_path / "half", True, plugins=[plugin])
    plain = trained(tmp_path / "plain", False)
    assert scaler.get_scale() == 256.0  # no step was skipped
    for name, value in plain.items():
        assert state[name].dtype == torch.float32
        torch.testing.assert_close(state[name], value, rtol=0.1, atol=0.02, msg=name)


@pytest.mark.ddp
@pytest.mark.slow
def test_two_compiled_processes_train_what_one_plain_does(tmp_path):
    one = trained(tmp_path / "one", False, batch_size=4)
    strategy = DDPStrategy(start_method="spawn")
    two = trained(tmp_path / "two", True, devices=2, strategy=strategy)
    compare(one, two)


@pytest.mark.parametrize(
    ("device", "steps", "compiles"),
    [("cuda", 3000, True), ("cuda", 2999, False), ("cpu", 9000, False)],
)
def test_auto_compiles_on_a_gpu_where_it_pays(device, steps, compiles, monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    trainer = SimpleNamespace(
        estimated_stepping_batches=steps,
        strategy=SingleDeviceStrategy(),
        accumulate_grad_batches=1,
        precision="bf16-mixed",
        callbacks=[],
    )
    chosen = plan("auto", torch.device(device), trainer)
    assert chosen == (Plan(cuda_graphs=True, whole=True, channels_last=True) if compiles else None)
    assert plan(False, torch.device(device), trainer) is None
    # Later steps add to gradients of earlier ones, which a replay would overwrite.
    trainer.callbacks = [GradientAccumulationScheduler({3: 2})]
    assert not getattr(plan("auto", torch.device(device), trainer), "cuda_graphs", False)


def test_torchs_settings_are_others_within_a_step_alone(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def losses(*_):
        return torch._dynamo.config.optimize_ddp

    step = CompiledStep(
        losses, Plan(cuda_graphs=False, whole=False), StudentModule(backbone=tiny())
    )
    assert torch._dynamo.config.optimize_ddp is True
    assert step.compiled() is False
    assert torch._dynamo.config.optimize_ddp is True
