"""``fit``, ``validate``, ``test``, ``predict``: Lightning's CLI with alignment flags."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch.nn.parameter import is_lazy

from pmixseg.callbacks.alignment import PmixAlignment
from pmixseg.callbacks.distillation import Distillation
from pmixseg.callbacks.predictions import PredictionWriter
from pmixseg.callbacks.run import RunCheckpoint, RunLogger
from pmixseg.callbacks.silence import silence_lightning
from pmixseg.callbacks.temperatures import TemperatureFitting
from pmixseg.cli.arguments import (
    NULL,
    config_files,
    flag_name,
    lost_file,
    options,
    repeated,
    with_checkpoint_path,
    with_split_class,
)
from pmixseg.cli.checkpoint_settings import with_checkpoint_defaults, with_evaluation
from pmixseg.cli.commands import TRAINING
from pmixseg.cli.mistakes import UsageError, subject, training_sentence
from pmixseg.cli.settings_files import broken_file, lacking_value
from pmixseg.cli.training_parser import TrainingParser, whole_numbers_first, with_files
from pmixseg.data.cohorts.shares import Share
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.describe import describe, find_class
from pmixseg.errors import InputError
from pmixseg.files import write_text
from pmixseg.interrupt import raise_on_interrupt
from pmixseg.modules.base import SegmentationModule
from pmixseg.modules.checkpoint import describing, read_checkpoint, restore
from pmixseg.modules.payload import Payload
from pmixseg.modules.preparation import Preparation
from pmixseg.modules.training.optimization import callbacks_of, schedule_from
from pmixseg.modules.training.resuming import differences
from pmixseg.modules.training.trainer_checks import check_processes
from pmixseg.modules.trust import offline, resolve
from pmixseg.old_paths import current_word

RUN_VARIABLE = "PMIXSEG_RUN"
"""Environment variable with the run folder, so that DDP's child processes use the same one."""

DEFAULT_TERMS = {"logit": "pmixseg.losses.LogitKL", "latent": "pmixseg.losses.LatentMatch"}
"""Distillation terms where no file names others."""

USAGE = """pmixseg {} [-c FILE] [--run FOLDER] [--data.store STORE]
           [--ckpt_path CHECKPOINT] {}[--OPTION VALUE ...]

Options follow by group; those of one class are shown by --OPTION.help CLASS,
as in --model.help StudentModule, and the values by --print_config."""
"""What stands above the options of a training command, which are more than a hundred."""

FIT_USAGE = """[--model CLASS] [--model.backbone CLASS]
           [--align.weight WEIGHT] [--distill.teacher CHECKPOINT]
           [--trainer.max_epochs N] """
"""Options that ``fit`` alone has a use for."""

OWN_FLAGS = {
    "run": "Folder of this run.",
    "init_from": "Checkpoint to take weights from.",
    "calibrate": "With validate: fit temperatures on the validation cases and write this "
    "checkpoint, which has them.",
    "part": "With predict: do only the I-th of N parts of the cases, as in 2/8.",
}
"""Flag -> its help; Lightning has the others."""


class SaveRunConfig(SaveConfigCallback):
    """Write ``config.yaml`` into the run folder, and into the logger as hyper-parameters."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing yet: another training may hold the run folder, as a later ``setup`` sees."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Describe the run in a training alone; testing it later must not overwrite that.

        Lightning's finders have by now found a batch size or a learning rate.
        """
        run = Path(trainer.default_root_dir)
        if not trainer.global_step and any(run.glob("checkpoints/*.ckpt")):
            rank_zero_warn(
                f"{run} holds checkpoints of an earlier training, which this one replaces as it "
                "writes its own; best.ckpt and records may stay the old ones. Give another --run "
                "for both to stay, or --ckpt_path last to resume."
            )
        self.config.data.batch_size = trainer.datamodule.batch_size  # type: ignore[attr-defined]  # of this command
        if "_lr" in vars(pl_module):
            settings = describe(pl_module)["init_args"]["optimizer"]
            self.config.model.init_args.optimizer = Namespace(settings)
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration into the run's folder and the logger."""
        path = Path(trainer.default_root_dir) / "config.yaml"
        if path.is_file() and not path.read_bytes().startswith(b"# lightning.pytorch"):
            raise InputError(
                f"{path} was written by no training and would be replaced; choose another --run."
            )
        # By place: what says that null is written too has another name in jsonargparse 5.
        text = self.parser.dump(self.config, "parser_mode", False)
        write_text(path, text)
        for logger in trainer.loggers:
            if not isinstance(logger, RunLogger):
                logger.log_hyperparams(yaml.safe_load(text))


class TrainingCLI(LightningCLI):
    """Model and data by class or YAML, alignment and distillation as top-level groups."""

    def __init__(self, args: Sequence[str], modules: Sequence[str] = ()) -> None:
        words = [NULL.sub("null", current_word(word)) for word in args]
        if twice := repeated(words):
            raise UsageError(f"{twice} is given more than once; keep one of them.")
        if lost := lost_file(words):
            raise UsageError(f"{lost[0]}: the file {lost[1]} does not exist; correct its path.")
        words = with_files(words)
        self.words, self.modules = with_split_class(with_checkpoint_path(words)), list(modules)
        silence_lightning()
        super().__init__(
            SegmentationModule,
            BraTSDataModule,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            # One case shows before a training whether validation works; a second shows no more.
            # Lightning's table of layers counts operations as 0; a line of our own says the rest.
            trainer_defaults={
                "max_epochs": 100,
                "num_sanity_val_steps": 1,
                "enable_model_summary": False,
            },
            parser_class=TrainingParser,
            args=with_checkpoint_defaults(self.words, modules),
            load_from_checkpoint_support=False,  # our modules describe themselves
        )

    # Static in Lightning, which sets up every command at once.
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Offer only the command that was given: the flags of all four take four times as long."""
        every = super().subcommands()
        return {name: every[name] for name in every if name == self.words[0]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line."""
        for path in config_files(self.words):
            if broken := broken_file(path):
                raise UsageError(broken)
        for name, value in options(self.words):  # settings may stand in the flag itself
            inline = name == "--config" and value is not None and value.startswith("{")
            if inline and (broken := broken_file(name, value)):
                raise UsageError(broken)
        if self.words[0] == "test":  # whose table we print
            self._parser("test").set_defaults({"verbose": False})
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            flags = [f"--{action.dest}" for action in self._parser(self.words[0])._actions]
            flags += ["--model.optimizer", "--model.scheduler"]  # of the model's class
            raise UsageError(training_sentence(str(error), self.words, flags)) from error
        self._refuse_what_cannot_be()

    def _refuse_what_cannot_be(self) -> None:
        """Refuse odd numbers, lacking values and a model of no kind; jsonargparse takes them."""
        settings = self.config[self.words[0]]
        flat = {flag_name(f"--{k}"): v for k, v in vars(settings.as_flat()).items()}
        for name, value in options(self.words):
            number = flat.get(flag := flag_name(name))
            if ":" in (value or "") and isinstance(number, int | float):
                raise UsageError(f"{flag}: YAML reads {value} as {number}; write {number}.")
        if settings.weights_only is False:
            raise UsageError(
                "--weights_only false would let a checkpoint run code; leave it out, and name a "
                "module whose classes you trust with --import."
            )
        model = settings.model
        if model.class_path.rpartition(".")[2] == SegmentationModule.__name__:
            raise UsageError(
                "--model is SegmentationModule, which teachers and students have in common; use "
                "pmixseg.StudentModule or pmixseg.TeacherModule."
            )
        lacking = lacking_value(BraTSDataModule, settings.data, "data") or lacking_value(
            find_class(model.class_path), model.init_args, "model"
        )
        if lacking is not None:
            place = subject(lacking.split("."), self.words)
            raise UsageError(f"{place} is null, but needs a value; give one.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the groups ``align`` and ``distill``, the run folder, and weights to start from."""
        for action in parser._actions:
            if hasattr(action, "_typehint"):
                action._typehint = whole_numbers_first(action._typehint)
        does = TRAINING[self.words[0]]
        parser.usage = USAGE.format(self.words[0], FIT_USAGE * (self.words[0] == "fit"))
        parser.description = f"{does[0].upper()}{does[1:]}."
        parser.add_lightning_class_args(PmixAlignment, "align")
        parser.add_lightning_class_args(Distillation, "distill")
        # Named here, so that one flag can change one argument of one term; a file replaces them.
        parser.set_defaults({"model": {"class_path": "pmixseg.StudentModule"}})
        terms = {name: {"class_path": path} for name, path in DEFAULT_TERMS.items()}
        parser.set_defaults({"distill.terms": terms})
        for name, meaning in OWN_FLAGS.items():
            parser.add_argument(f"--{name}", type=str | None, default=None, help=meaning)
        force = "With test and validate: score cases that the model was trained on, too."
        parser.add_argument("--force", action="store_true", help=force)
        parser.link_arguments("data.task", "model.init_args.task")

    def _parse_ckpt_path(self) -> None:
        # Lightning lets the checkpoint's hyper-parameters beat the flags; here flags win, and
        # with_checkpoint_defaults has already put the checkpoint's before them.
        return

    def instantiate_classes(self) -> None:
        """Make the objects; nothing that a checkpoint names may fetch anything meanwhile."""
        checkpoint = None if self.subcommand == "fit" else self._get(self.config, "ckpt_path")
        with nullcontext() if self.modules or not checkpoint else offline(checkpoint):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Put terms first in the list of callbacks, and all that the run writes into one folder."""
        run = self.run_folder()
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        bare = bool(config.get("barebones"))
        trains = self.subcommand == "fit" and not bare
        if bare:  # Lightning refuses what it would leave out
            config["num_sanity_val_steps"] = 0
        several = config.get("callbacks") or []
        callbacks: list[Callback] = [several] if isinstance(several, Callback) else list(several)
        config["default_root_dir"] = str(run)
        if config.get("benchmark") is None and not config.get("deterministic"):
            # Patches of a training are of one size: cuDNN may try which kernels are the fastest.
            config["benchmark"] = self.subcommand == "fit"
        if config.get("logger") in (None, True):
            config["logger"] = RunLogger(run) if trains else False
        keeps = trains and config.get("enable_checkpointing") is not False
        if keeps and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            callbacks.append(RunCheckpoint(run))
        writes = any(isinstance(c, PredictionWriter) for c in callbacks)
        if self.subcommand == "predict" and not writes:
            callbacks.append(PredictionWriter())
        if out := self._get(self.config_init, "calibrate"):
            if self.subcommand != "validate":
                raise InputError(
                    "--calibrate fits on validation cases; use `pmixseg validate --ckpt_path … "
                    "--calibrate OUT.ckpt`."
                )
            callbacks.append(TemperatureFitting(out))
        align, distill = terms = [self._get(self.config_init, k) for k in ("align", "distill")]
        align.optional, distill.optional = True, distill.teacher is None
        config["callbacks"] = [*terms, *callbacks]
        trainer = self._instantiate_trainer(config, [])
        check_processes(trainer)
        return trainer

    def run_folder(self) -> Path:
        """Return ``--run``; else the folder of the checkpoint; else a new one under ``runs/``."""
        folder = self._get(self.config, "run")
        checkpoint = self._get(self.config, "ckpt_path")
        if folder:
            return Path(folder)
        if checkpoint:
            parent = Path(checkpoint).resolve().parent
            return parent.parent if parent.name == "checkpoints" else parent
        # Agents of a wandb sweep may start within one second; each of their runs has an id.
        parts = [time.strftime("%Y%m%d-%H%M%S"), os.environ.get("WANDB_RUN_ID", "")]
        return Path(os.environ.setdefault(RUN_VARIABLE, "runs/" + "-".join(filter(None, parts))))

    def before_instantiate_classes(self) -> None:
        """Let ``config.yaml`` state what follows from flags, before it is written.

        That is the direction in which a schedule follows its metric, and the modules of
        ``--import``, whose classes a teacher may name too.
        """
        raise_on_interrupt(trains=self.subcommand == "fit")
        config = self.config[self.subcommand]
        if self.subcommand != "fit" and not self._get(self.config, "ckpt_path"):
            raise UsageError(
                f"pmixseg {self.subcommand} needs --ckpt_path, the checkpoint of a training; give "
                "its path, or `best` together with --run."
            )
        if self._get(self.config, "init_from") and self._get(self.config, "ckpt_path"):
            raise UsageError(
                "--init_from begins a training with weights of another, and --ckpt_path goes on "
                "with one; give one of them."
            )
        config.distill.modules = [*dict.fromkeys([*config.distill.modules, *self.modules])]
        settings = self._get(self.config, "model.init_args.scheduler")
        if not isinstance(settings, Namespace) or "mode" not in settings.get("init_args", {}):
            return
        made = schedule_from(settings.as_dict())
        if isinstance(made, functools.partial):
            settings.init_args.mode = made.keywords.get("mode", settings.init_args.mode)

    def after_instantiate_classes(self) -> None:
        """Start from given weights; say what is trained, and where flags differ from its start."""
        checkpoint = self._get(self.config, "ckpt_path")
        if checkpoint:
            content = read_checkpoint(checkpoint)
            if "pytorch-lightning_version" not in content:
                raise InputError(
                    f"{checkpoint} holds weights without what Lightning writes besides them; save "
                    "them with Trainer.save_checkpoint, or start a training with --init_from."
                )
            raw = content["pmixseg"]
            description, trained = describing(raw), Payload.from_dict(raw).preparation
            with suppress(InputError):  # what a resumed training has been given, it need not name
                description = resolve(description, self.modules, checkpoint)
            stored, now = with_evaluation(description), with_evaluation(describe(self.model))
            lines = differences(stored, now, self.words, "model")
            lines += self.changed_data(trained, stored["evaluation"], now["evaluation"])
            for line in lines:
                notify(f"{line} (the flags win)")
        if part := self._get(self.config, "part"):
            if self.subcommand != "predict":
                raise InputError(f"--part is for predict, not for {self.subcommand}; leave it out.")
            self.datamodule.share = Share.parse(part)
        self.model.told = bool(checkpoint)
        self.model.force = bool(self._get(self.config, "force"))
        if self.subcommand == "fit":
            sizes = [p.numel() for p in self.model.parameters() if not is_lazy(p)]
            name = type(self.model.backbone).__name__
            rank_zero_info(f"Network: {name}, {sum(sizes):,} parameters")
        if start := self._get(self.config, "init_from"):
            restore(self.model, read_checkpoint(start))

    def after_fit(self) -> None:
        """Say which checkpoints there are; Lightning calls this after the command."""
        for kept in self.trainer.checkpoint_callbacks:
            paths = [getattr(kept, name, "") for name in ("best_model_path", "last_model_path")]
            if any(paths):
                shortest = [min(p, os.path.relpath(p), key=len) for p in filter(None, paths)]
                rank_zero_info(f"Checkpoints: {', '.join(shortest)}")

    def after_predict(self) -> None:
        """Say where the predictions lie."""
        for writer in callbacks_of(self.trainer, PredictionWriter):
            rank_zero_info(f"Written: {writer.path(self.trainer)}")

    def changed_data(
        self, trained: Preparation, stored: dict[str, Any], now: dict[str, Any]
    ) -> list[str]:
        """Say where patch, spacing and inference window are not those of the training, in words."""
        data = {"patch_size": list(self.datamodule.patch_size)}
        if (spacing := self._get(self.config, "data.spacing")) is not None:
            data["spacing"] = list(spacing)
        patch = None if trained.patch is None else list(trained.patch)
        spacing = None if trained.spacing is None else list(trained.spacing)
        had = {"patch_size": patch, "spacing": spacing}
        # A checkpoint without a patch does not tell it; one without a spacing kept each case's own.
        had = {k: had[k] for k in data if had[k] or k == "spacing"}
        if self.subcommand == "fit":  # a resumed training tells it
            had.pop("patch_size", None)
        lines = differences(had, data, where="data")
        # Without a window of its own, a model is evaluated in windows of the patch.
        windows = [now["window"] or data["patch_size"], stored["window"] or patch]
        if not (now["window"] and stored["window"]) and all(windows) and windows[0] != windows[1]:
            lines.append(f"the inference window is {windows[0]}, the checkpoint had {windows[1]}")
        return lines

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}


@rank_zero_only
def notify(sentence: str) -> None:
    """Tell the person at the terminal, once however many processes there are."""
    print(f"pmixseg: {sentence}", file=sys.stderr)  # noqa: T201  # the command line's own output
