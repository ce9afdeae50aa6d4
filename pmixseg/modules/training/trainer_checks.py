"""Refuse options of Lightning's Trainer, and batches of other loaders, that no module can use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import Subset

from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.patches import CaseDataset, CaseItem, PatchDataset
from pmixseg.errors import InputError, count_of
from pmixseg.modules.training.optimization import Schedule, callbacks_of, check_mode, validates
from pmixseg.task import Task
from pmixseg.types import Batch, kind_of

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
"""Those that keep weights, sums and scores in float32."""


LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "num_nodes": 1,
}
"""Numbers of a Trainer that Lightning does not check itself, and the least of each."""


PROCESSES_A_CORE = 4
"""More processes than this on each core only take memory from each other."""


def check_processes(trainer: Trainer) -> None:
    """Refuse to start far more processes than there are cores."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if not isinstance(trainer.accelerator, CPUAccelerator) or (
        environment is not None and environment.creates_processes_externally
    ):
        return
    cores = os.cpu_count() or 1
    if trainer.num_devices > PROCESSES_A_CORE * cores:
        raise InputError(
            f"devices {trainer.num_devices} (--trainer.devices) would start as many processes on "
            f"{count_of(cores, 'core')}, each with a model of its own; give "
            f"{PROCESSES_A_CORE * cores} or fewer."
        )


def check_machine(trainer: Trainer) -> None:
    """Refuse precisions and strategies that would change what a model is."""
    precision = str(trainer.precision)
    if precision not in PRECISIONS:
        lost = "half precision loses the small changes of an optimizer's step"
        if precision.startswith("64"):
            lost = "scores, checkpoints and stores are made for float32"
        raise InputError(
            f"precision {precision} (--trainer.precision) turns the weights into another type, "
            f"and {lost}; use 32-true, or bf16-mixed and 16-mixed, which compute in "
            "half precision and keep weights in float32."
        )
    strategy = trainer.strategy
    whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
    if not whole or isinstance(strategy, DeepSpeedStrategy):
        raise InputError(
            f"{type(strategy).__name__} cuts the weights into parts, which no checkpoint of "
            "pmixseg could hold; these networks fit every card whole, so use the strategy ddp "
            "(--trainer.strategy)."
        )


def check_dtype(module: nn.Module) -> None:
    """Refuse weights that were turned into another type than float32."""
    kinds = {
        str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()
    }
    if others := sorted(kinds - {"float32"}):
        raise InputError(
            f"weights of this {type(module).__name__} were turned into {', '.join(others)}; turn "
            "them back by .float(), and choose precision bf16-mixed to compute in half precision."
        )


def check_backbone(module: Any) -> None:
    """Refuse a backbone that was put into a module that was made for another.

    Raises:
        InputError: it has other modalities, classes or levels than the module.
    """
    net, anchor = module.backbone, module.anchor
    made = module.modalities, module.num_classes, anchor and anchor.levels
    if made != (net.modalities, net.num_classes, anchor and len(net.channels)):
        raise InputError(
            "the backbone was replaced by one with other modalities, classes or levels; make a "
            f"new {type(module).__name__} with it: backbone=..."
        )


def check_stage(module: LightningModule, stage: str) -> None:
    """Refuse what would change a model or its steps; say so where there is nothing to do."""
    # Lightning reads it from RANK or SLURM_PROCID, also where this process runs on its own.
    rank_zero_only.rank = module.trainer.global_rank  # type: ignore[attr-defined]  # as Lightning does
    check_dtype(module)
    check_backbone(module)
    check_machine(module.trainer)
    name = f"limit_{stage.replace('validate', 'val')}_batches"
    if stage != "fit" and not getattr(module.trainer, name):
        rank_zero_warn(f"{name} (--trainer.{name}) is 0, so there is nothing to do; leave it out.")
    name, parts = type(module).__name__, module.named_modules()
    within = [n for n, part in parts if isinstance(part, torch._dynamo.OptimizedModule)]
    if module._compiler_ctx is not None or within:
        what = f"{within[0]}, whose weights" if within else f"the whole {name}, whose steps"
        why = "a checkpoint would name otherwise" if within else "also log and draw"
        raise InputError(
            f"torch.compile was put around {what} {why}; use the module's own option instead: "
            f"{name}(compile=True), or --model.compile true."
        )


def check_task(data: object, task: Task) -> None:
    """Refuse data of another task, whose channels and classes would be taken for others."""
    theirs: Task = getattr(data, "task", task)
    if (theirs.modalities, theirs.labels) != (task.modalities, task.labels):
        has, needs = (
            f"'{t.name}' ({', '.join(t.modalities)}; {', '.join(t.labels)})" for t in (theirs, task)
        )
        raise InputError(f"the data are of the task {has}, the module of {needs}; give both one.")


def check_trainer(trainer: Trainer) -> None:
    """Refuse callbacks whose result would be lost, or the opposite of what is wanted.

    Raises:
        InputError: weights that are averaged after the last checkpoint is written; an optimizer
            that no checkpoint would name; a metric that is watched in the wrong direction; or a
            number of the trainer that makes no sense.
    """
    module: Any = trainer.lightning_module
    module.check_changes()
    name_coupled_losses(module, trainer)
    if not any(p.requires_grad for p in module.parameters()):
        raise InputError(
            f"no weight of this {type(module).__name__} can be trained; free them by "
            "requires_grad_(True), since a teacher of Distillation stays frozen after it."
        )
    own = type(module).training_step.__module__.partition(".")[0]
    if not module.automatic_optimization and own == __name__.partition(".")[0]:
        raise InputError(
            f"automatic_optimization of this {type(module).__name__} is False, and its "
            "training_step leaves the optimizer to Lightning, so nothing would be trained; leave "
            "it True, or override training_step."
        )
    if "configure_optimizers" in vars(module):
        raise InputError(
            f"configure_optimizers of this {type(module).__name__} was replaced, as LightningCLI's "
            "--optimizer and --lr_scheduler do, so its checkpoints would name an optimizer that "
            "was not used; give --model.optimizer and --model.scheduler (in Python optimizer=..., "
            "scheduler=...), or override it in a class of your own."
        )
    for name, least in LEAST.items():
        value = getattr(trainer, name)
        if value is not None and value < least:
            raise InputError(f"{name} (--trainer.{name}) is {value}; give {least} or more.")
    for callback in callbacks_of(trainer, Callback):
        if isinstance(callback, StochasticWeightAveraging):
            raise InputError(
                "StochasticWeightAveraging puts the averaged weights into the model after the last "
                "checkpoint is written, so no checkpoint holds them; use "
                "lightning.pytorch.callbacks.EMAWeightAveraging, whose checkpoints do."
            )
        schedule = getattr(module, "make_scheduler", None)
        if isinstance(callback, BaseFinetuning) and isinstance(schedule, Schedule):
            name = type(schedule).__name__
            raise InputError(
                f"{type(callback).__name__} adds parameters to the optimizer during the training, "
                f"for which {name} has no rates; leave the schedule out, or use one of PyTorch's "
                "that multiplies the present rate, such as StepLR."
            )
        if isinstance(callback, EarlyStopping) and callback.patience < 0:
            raise InputError(f"EarlyStopping has patience {callback.patience}; give 0 or more.")
        # Who watches a metric must watch one that is logged, in its direction.
        if not isinstance(callback, EarlyStopping | ModelCheckpoint) or callback.monitor is None:
            continue
        if getattr(callback, "strict", True):
            _check_name(type(callback).__name__, callback.monitor, trainer)
        check_mode(type(callback).__name__, callback.monitor, callback.mode)


def check_loaders(trainer: Trainer, *loaders: Any) -> None:
    """Refuse loaders that were taken out of a data module: they bring less than it does.

    Raises:
        InputError: their samples are a prepared cohort's, and the trainer has no data module of it.
    """
    if isinstance(trainer.datamodule, BraTSDataModule):  # type: ignore[attr-defined]  # set by Trainer.fit
        return
    each = [one for some in loaders for one in (some if isinstance(some, list) else [some])]
    sources = [getattr(one, "dataset", None) for one in each]
    sources = [one.dataset if isinstance(one, Subset) else one for one in sources]
    if any(isinstance(one, PatchDataset | CaseDataset) for one in sources):
        raise InputError(
            "the loaders of a BraTSDataModule were given without it, so nothing would augment the "
            "patches, or tell which patients a test may score; give the data module itself, or "
            "one derived from it: trainer.fit(module, datamodule=data)."
        )


def check_batch(trainer: Trainer | None, batch: Batch, task: Task) -> None:
    """Refuse a training batch of a user's own loader that is no :class:`~pmixseg.types.Batch`.

    A GPU is asked for the values of a label in the first step alone. Where a step is called by hand
    there is no trainer.
    """
    if trainer is None or _prepared(trainer):
        return
    holds = (
        f"a dictionary with image [B, {task.num_modalities}, D, H, W] "
        f"({', '.join(task.modalities)}), label [B, D, H, W] of class indices, acquired "
        f"[B, {task.num_modalities}], key [B] and case_id, a list of B names, as "
        "pmixseg.types.Batch says"
    )
    given: Any = batch
    if not isinstance(given, Mapping):
        raise InputError(f"the loader gives a {type(given).__name__} for a batch; give {holds}.")
    lacking = [n for n in ("image", "label", "acquired", "key", "case_id") if n not in given]
    if lacking:
        raise InputError(f"a batch of the loader has no {', '.join(lacking)}; give {holds}.")
    # The image says how many samples and voxels everything else must have.
    image: Any = given["image"]
    shape = list(image.shape) if isinstance(image, Tensor) else []
    if len(shape) != 5 or shape[1] != task.num_modalities:
        raise InputError(f"image of the loader's batch is {kind_of(image)}; give {holds}.")
    samples, _, *voxels = shape
    half = "16" in str(trainer.precision) and image.dtype in (torch.float16, torch.bfloat16)
    expected = {
        "image": (image.dtype if half else torch.float32, shape),
        "label": (torch.int64, [samples, *voxels]),
        "acquired": (torch.bool, [samples, task.num_modalities]),
        "key": (torch.int64, [samples]),
    }
    for name, (dtype, shape) in expected.items():
        wanted = f"{str(dtype).removeprefix('torch.')} {shape}"
        if (got := kind_of(given[name])) != wanted:
            meaning = " of class indices" if name == "label" else ""
            raise InputError(f"{name} of the loader's batch is {got}; give {wanted}{meaning}.")
    # Asking for a value makes a GPU wait.
    label = batch["label"]
    if label.device.type == "cpu" or trainer.global_step == 0:
        least, most = (int(value) for value in label.aminmax())
        if least < 0 or most >= task.num_classes:
            raise InputError(
                f"the labels of the loader's batch reach from {least} to {most}, but the classes "
                f"of the task '{task.name}' are 0 (background) to {task.num_classes - 1} "
                f"({', '.join(task.labels)}); give each label its class index."
            )


def check_item(trainer: Trainer | None, item: CaseItem) -> None:
    """Refuse what is no whole case of a prepared cohort, where one is scored or predicted."""
    if trainer is None or _prepared(trainer):
        return
    given: Any = item
    if not isinstance(given, Mapping) or "stored" not in given:
        raise InputError(
            "validation, test and prediction read whole cases of a prepared cohort, with the way "
            "back to the grid of its scans, which this loader does not bring; use a "
            "BraTSDataModule (to train on batches of your own, override its train_dataloader), "
            "score them in a step of your own, or call segment for the scans of a patient."
        )


def _prepared(trainer: Trainer) -> bool:
    """Say whether a data module's loaders are those of this package."""
    return type(trainer.datamodule) is BraTSDataModule  # type: ignore[attr-defined]  # as above


def check_parameters(module: nn.Module, trainer: Trainer) -> None:
    """Refuse trainable parameters that no optimizer has."""
    owned = {id(p) for opt in trainer.optimizers for g in opt.param_groups for p in g["params"]}
    lost = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in owned]
    if lost:
        raise InputError(
            f"{len(lost)} trainable parameters are in no optimizer ({', '.join(lost[:3])}, …); "
            "create them in __init__ or a callback's setup, before configure_optimizers."
        )


def name_coupled_losses(module: nn.Module, trainer: Trainer) -> None:
    """Warn of losses that several processes compute otherwise than one."""
    coupled = {type(p).__name__ for p in module.modules() if getattr(p, "couples_samples", False)}
    if coupled and trainer.world_size > 1:
        rank_zero_warn(
            f"{', '.join(sorted(coupled))}: the loss of a sample depends on the others of its "
            f"batch, and each of {trainer.world_size} processes sees its own batch alone, so this "
            "training is not that of one process."
        )


def _check_name(who: str, metric: str, trainer: Trainer) -> None:
    """Refuse a metric that a training does not log, where all that it logs is known."""
    module: Any = trainer.lightning_module
    everybody = [module, *callbacks_of(trainer, Callback)]
    own = [type(o).__module__.partition(".")[0] not in ("pmixseg", "lightning") for o in everybody]
    if any(own) or any(isinstance(o, LambdaCallback) for o in everybody):
        return  # code of the user's own may log anything
    metrics = ["loss", "train/loss", "train/seg", *(f"train/{name}" for name in module.terms)]
    if validates(trainer):
        metrics += ["val/dice", *(f"val/dice/{region}" for region in module.task.regions)]
    if who == ModelCheckpoint.__name__:
        metrics += ["epoch", "step"]  # which it counts itself
    parts = ("train/", "gap/", "anchor/")  # what terms and monitors log in detail
    if metric in metrics or metric.startswith(parts):
        return
    raise InputError(
        f"{who} watches {metric}, which this training does not log; use one of "
        f"{', '.join(metrics)}."
    )
