"""Optimizer and learning-rate schedule: parameter groups, and schedules over a whole training."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from pmixseg.argument_checks import check_values
from pmixseg.describe import (
    FRACTION,
    NOT_NEGATIVE,
    Described,
    Ranges,
    build,
    class_behind,
    find_class,
    is_description,
)
from pmixseg.errors import InputError, explained
from pmixseg.evaluation.records.measures import MEASURES, direction_of

SPARED = re.compile(r"bias|(^|_)pos|token")
"""Names of parameters without weight decay, whatever their shape: ``bias``, ``pos_embed``, …"""

VALIDATION = "val/dice"
"""The metric that schedules and checkpoints follow by default."""

Kind = TypeVar("Kind")


class Schedule(Described, ABC):
    """Schedule the learning rate over a whole training; the module passes the number of steps."""

    @abstractmethod
    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Build the scheduler, stepped after every optimizer step."""


class Polynomial(Schedule):
    """Lower the learning rate as ``lr(t) = lr_0 · (1 − t/T)^power`` after a linear warm-up.

    The schedule of RFNet, mmFormer and nnU-Net (power 0.9; docs/method/baselines.md).

    Args:
        power: exponent.
        warmup_steps: steps over which the rate rises linearly from 0.
    """

    ranges = Ranges(power=NOT_NEGATIVE, warmup_steps=NOT_NEGATIVE)

    def __init__(self, power: float = 0.9, warmup_steps: int = 0) -> None:
        self.power = power
        self.warmup_steps = warmup_steps

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Return a scheduler with polynomial decay over the steps of a training."""
        return LambdaLR(optimizer, functools.partial(self._factor, total_steps=total_steps))

    def _factor(self, step: int, total_steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        left = 1 - (step - self.warmup_steps) / max(total_steps - self.warmup_steps, 1)
        return float(max(left, 0.0) ** self.power)


class OneCycle(Schedule):
    """Schedule the learning rate by PyTorch's ``OneCycleLR``, up to the optimizer's own rate.

    Args:
        warmup_fraction: share of the steps in which the rate rises.
    """

    ranges = Ranges(warmup_fraction=FRACTION)

    def __init__(self, warmup_fraction: float = 0.3) -> None:
        self.warmup_fraction = warmup_fraction

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Return a scheduler with one cycle over the steps of a training."""
        peaks = [group["lr"] for group in optimizer.param_groups]
        # A warm-up has at least one step; in debugging runs of a few it has no share of them.
        # PyTorch divides by the length of both parts, so neither may have none.
        steps = max(total_steps, 3)
        rise = min(self.warmup_fraction, 1 - 1 / steps)
        if 0 < rise * steps < 2:
            rise = 2 / steps
        return OneCycleLR(optimizer, max_lr=peaks, total_steps=steps, pct_start=rise)


def callable_from(value: Callable[..., Any] | Mapping[str, Any]) -> Callable[..., Any]:
    """Return a callable as it is; a ``{class_path, init_args}`` as a partial of the class."""
    if is_description(value):
        assert isinstance(value, Mapping)
        value = functools.partial(find_class(value["class_path"]), **(value.get("init_args") or {}))
    if not callable(value):
        raise InputError(
            f"{value!r} makes no optimizer or schedule; give a class, or functools.partial(CLASS, "
            "...) with its arguments."
        )
    if isinstance(value, functools.partial) and (cls := class_behind(value)) is not None:
        check_values(cls, value.keywords)
    return value


def made_by(make: Callable[..., Any], given: Any, what: str) -> Any:
    """Call what makes an optimizer or a schedule; what torch complains of is one sentence."""
    of = class_behind(make) if isinstance(make, functools.partial) else make
    said = f"the {what} {getattr(of, '__name__', of)} cannot be made"
    with explained(said, "correct its arguments, or take another class", TypeError, ValueError):
        return make(given)


def schedule_from(value: Any) -> Schedule | Callable[..., Any] | None:
    """Return a :class:`Schedule`, or what makes a scheduler, from an object or a description.

    PyTorch's schedulers cannot be built before there is an optimizer, so of these a description
    becomes a partial. A plateau schedule gets the direction of its metric: PyTorch's default,
    ``mode: min``, lowers the rate while Dice rises.
    """
    named = find_class(value["class_path"]) if is_description(value) else Schedule
    own = inspect.isclass(named) and issubclass(named, Schedule)
    own &= not isinstance(value, functools.partial)
    make: Schedule | Callable[..., Any] | None = build(value) if own else callable_from(value)
    cls = class_behind(make) if isinstance(make, functools.partial) else None
    if cls is None or not issubclass(cls, ReduceLROnPlateau):
        return make
    assert isinstance(make, functools.partial)  # of which alone a class is known
    mode = mode_of(make.keywords.get("monitor", VALIDATION))
    return make if mode is None else functools.partial(make, mode=mode)


def scheduler_from(
    make: Callable[..., Any], optimizer: Optimizer, trainer: Trainer | None
) -> tuple[LRScheduler | ReduceLROnPlateau, dict[str, Any]]:
    """Build a scheduler of PyTorch, and say when Lightning is to step it.

    Without a trainer, which says when validations come, a module stands alone. Lightning's settings
    for the scheduler come with it: per epoch, or per validation for one that follows a validation
    metric.

    Raises:
        InputError: a scheduler that follows a validation metric in a training that validates
            nothing, or in the wrong direction.
    """
    scheduler = made_by(make, optimizer, "schedule")
    monitor = str(getattr(scheduler, "monitor", VALIDATION))
    if not isinstance(scheduler, ReduceLROnPlateau):
        return scheduler, {"monitor": monitor}
    # A plateau follows a metric: in its direction, and only where it is measured.
    check_mode("ReduceLROnPlateau", monitor, scheduler.mode)
    if not monitor.startswith("val/") or trainer is None:
        return scheduler, {"monitor": monitor, "strict": False}
    if not validates(trainer):
        raise InputError(
            f"ReduceLROnPlateau watches {monitor}, but this training validates nothing; validate "
            "some cases (--trainer.limit_val_batches, data.val_cases), or use another schedule, "
            "such as pmixseg.modules.Polynomial."
        )
    every = trainer.check_val_every_n_epoch or 1
    return scheduler, {"monitor": monitor, "strict": False, "frequency": every}


def scheduled(
    optimizer: Optimizer, make: Schedule | Callable[..., Any] | None, trainer: Trainer | None
) -> OptimizerLRScheduler:
    """Return an optimizer with its schedule, as ``configure_optimizers`` must.

    A :class:`Schedule` is stepped after every step of the optimizer; for what makes a scheduler of
    PyTorch see :func:`scheduler_from`.
    """
    if make is None:
        return optimizer
    config: dict[str, Any]
    if isinstance(make, Schedule):
        if trainer is None:
            raise InputError(
                f"{type(make).__name__} needs the length of the training, which a trainer knows; "
                "in a loop of your own call it with the optimizer and the number of steps."
            )
        config = {"scheduler": make(optimizer, total_steps(trainer)), "interval": "step"}
    else:
        scheduler, settings = scheduler_from(make, optimizer, trainer)
        config = {"scheduler": scheduler, **settings}
    return cast(OptimizerLRScheduler, {"optimizer": optimizer, "lr_scheduler": config})


def total_steps(trainer: Trainer) -> int:
    """Return the optimizer steps of a training, which a schedule has to know."""
    steps = trainer.estimated_stepping_batches
    if steps == math.inf:
        raise InputError(
            "a schedule over the whole training needs its length; give max_epochs or "
            "max_steps (--trainer.max_epochs, --trainer.max_steps)."
        )
    change, epochs = accumulation(trainer), trainer.max_epochs or 0
    if change is not None and epochs > 0 and math.isfinite(trainer.num_training_batches):
        # Lightning counts as if the accumulation of before the training stayed.
        each = map(change.get_accumulate_grad_batches, range(epochs))
        whole = sum(math.ceil(trainer.num_training_batches / number) for number in each)
        steps = whole if trainer.max_steps < 0 else min(whole, trainer.max_steps)
    return int(steps)


def accumulation(trainer: Trainer) -> GradientAccumulationScheduler | None:
    """Return the callback that changes how many batches make a step, if there is one."""
    return next(iter(callbacks_of(trainer, GradientAccumulationScheduler)), None)


def callbacks_of(trainer: Trainer | None, kind: type[Kind]) -> list[Kind]:
    """Return the callbacks of a trainer that are of one class, in their order."""
    callbacks: list[Callback] = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]  # set in Trainer.__init__
    return [callback for callback in callbacks if isinstance(callback, kind)]


def active_terms(trainer: Trainer) -> list[Any]:
    """Return the callbacks whose terms are in the loss: only these say that they are active."""
    return [c for c in callbacks_of(trainer, Callback) if getattr(c, "active", False)]


def rate_of(make_optimizer: Callable[..., Any]) -> float:
    """Return the learning rate that an optimizer's constructor is given, or takes by default.

    Example:
        >>> import functools, torch
        >>> rate_of(functools.partial(torch.optim.SGD, lr=0.5)), rate_of(torch.optim.AdamW)
        (0.5, 0.001)
    """
    if isinstance(make_optimizer, functools.partial):
        if "lr" in make_optimizer.keywords:
            return float(make_optimizer.keywords["lr"])
        make_optimizer = class_behind(make_optimizer) or make_optimizer.func
    default = inspect.signature(make_optimizer).parameters.get("lr")
    return float(default.default) if default is not None else math.nan


def validates(trainer: Trainer) -> bool:
    """Say whether a training has validation cases and looks at them."""
    data = getattr(trainer, "datamodule", None)
    parts = getattr(data, "parts", None)
    return bool(trainer.limit_val_batches and (parts is None or parts.val))


def mode_of(metric: str) -> Literal["min", "max"] | None:
    """Say how a metric of a training gets better; ``None`` for one that is not pmixseg's.

    Example:
        >>> [mode_of(name) for name in ("val/dice", "val/dice/WT", "train/loss", "mine")]
        ['max', 'max', 'min', None]
    """
    stage, _, rest = metric.partition("/")
    if stage == "train" or metric == "loss":
        return "min"
    measure = rest.partition("/")[0]
    if stage not in ("val", "test") or measure not in MEASURES:
        return None
    return "min" if direction_of(measure) == "lower" else "max"


def check_mode(who: str, metric: str, mode: str) -> None:
    """Refuse to watch a metric in the wrong direction."""
    right = mode_of(metric)
    if right not in (None, mode):
        raise InputError(
            f"{who} watches {metric} with mode {mode}, but it is better "
            f"{'lower' if right == 'min' else 'higher'}; give it mode: {right}."
        )


def fuse(optimizer: Optimizer) -> Optimizer:
    """Let an optimizer take its step in one operation per group, where torch has one; return it.

    Numbers are the same up to rounding. What a user has chosen stays (``foreach``, ``fused``), and
    so does an optimizer that counts its steps from birth (Adagrad): it counts them on the CPU.
    """
    for group in () if optimizer.state else optimizer.param_groups:
        chosen = group.get("foreach") is not None or group.get("differentiable")
        real = all(parameter.is_floating_point() for parameter in group["params"])
        if "fused" in group and group["fused"] is None and not chosen and real:
            group["fused"] = True
    return optimizer


def place_steps(optimizer: Optimizer) -> None:
    """Bring the counts of steps to where a fused optimizer reads them: beside the parameters.

    One that is not fused counts on the CPU, and so does the checkpoint of its training.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"].to(parameter.device)


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return trainable parameters in two groups: weights with decay, everything else without.

    Biases, affine normalisation parameters, anchor weights, positions and tokens have no direction
    for which shrinking towards zero would mean "simpler". A parameter of one dimension is one of
    them whatever it is called, one of more dimensions by its name (:data:`SPARED`). Parameters
    shared by two modules count once.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trainable if decays(name, p)]
    vectors = [p for name, p in trainable if not decays(name, p)]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def decays(name: str, parameter: Tensor) -> bool:
    """Tell whether weight decay shrinks a parameter.

    Example:
        >>> [decays(n, torch.ones(2, 2, 1)) for n in ("maps.8.weight", "maps.8.bias", "a.pos")]
        [True, False, False]
    """
    return parameter.ndim > 1 and not SPARED.search(name.rpartition(".")[2])


def regroup(state: dict[str, Any], module: nn.Module) -> None:
    """Bring the state of an optimizer that spared fewer parameters into today's groups.

    Checkpoints up to 0.1 told weights from the rest by their dimensions alone. A state in today's
    groups, or of other parameters, stays what it is. The state is that of one optimizer of
    ``module``'s :func:`parameter_groups`; it is changed in place.
    """
    # Weights come first, then the rest, each in the order of the module: today's and then.
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    now = sorted(range(len(named)), key=lambda i: not decays(*named[i]))
    before = sorted(range(len(named)), key=lambda i: named[i][1].ndim <= 1)
    matrices = sum(p.ndim > 1 for _, p in named)
    groups = state["param_groups"]
    if [len(group["params"]) for group in groups] != [matrices, len(named) - matrices]:
        return
    # An optimizer's state is by number: from numbers to parameters, and to today's numbers.
    numbers = [number for group in groups for number in group["params"]]
    of_parameter = {i: state["state"].get(n) for i, n in zip(before, numbers, strict=True)}
    state["state"] = {n: of_parameter[i] for n, i in enumerate(now) if of_parameter[i] is not None}
    weights = sum(decays(name, p) for name, p in named)
    groups[0]["params"], groups[1]["params"] = [*range(weights)], [*range(weights, len(named))]


def is_parallel(trainer: Trainer) -> bool:
    """Say whether a strategy for several processes wraps the module, also where there is one."""
    return isinstance(trainer.strategy, ParallelStrategy)


def every_parameter(module: nn.Module) -> Tensor:
    """Return 0, with every trainable parameter in its graph.

    DDP waits for the gradient of every parameter on every rank, and ranks skip different encoders,
    fills and outputs. Adding 0·Σp keeps all of them in every step's graph.
    """
    sums = [p.sum(dtype=torch.float32) for p in module.parameters() if p.requires_grad]
    return torch.stack(sums).sum() * 0.0


def complete_gradients(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Give parameters that a step did not use a gradient of 0.

    Optimizers pass over a parameter without one: its momentum and weight decay would wait for the
    next step that uses it, and a training would depend on which encoders are skipped. Without
    optimizers the module's parameters are taken: to look for them takes a millisecond.
    """
    groups: Sequence[Iterable[nn.Parameter]]
    groups = [group["params"] for one in optimizers for group in one.param_groups]
    advice = "remove it, or use it in every step"
    with explained("a lazy layer of the network was not used", advice, ValueError):
        for parameter in itertools.chain(*(groups or [module.parameters()])):
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def clip_norm(optimizer: Optimizer, most: float) -> None:
    """Scale all gradients of an optimizer so that their common norm is at most ``most``.

    The numbers of ``torch.nn.utils.clip_grad_norm_``, which walks over the gradients in Python six
    times.
    """
    groups = optimizer.param_groups
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
