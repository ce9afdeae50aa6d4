"""Private names of other libraries that the package leans on: an upgrade that loses one fails here.

Where a library has a public way, the package takes it; what is left is listed with its reason.
"""

import argparse
import ast
import inspect
from multiprocessing import forkserver
from pathlib import Path

import jsonargparse
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import launchers
from lightning.pytorch.utilities import model_helpers

import pmixseg

HOME = Path(pmixseg.__file__).parent

SEAMS = {
    "_AppendAction": (argparse, "flags that may stand more than once on a command line"),
    "_MultiProcessingLauncher": (
        launchers,
        "whether a training runs in processes that its caller does not see",
    ),
    "_actions": (
        argparse.ArgumentParser(),
        "options of a parser, to propose the one that was meant",
    ),
    "_compiler_ctx": (LightningModule(), "whether torch.compile was put around a whole module"),
    "_conv_forward": (torch.nn.Conv3d, "torch's own convolution, to repair its bf16 gradient"),
    "_disable_current_modes": (
        torch.utils._python_dispatch,
        "computing constants outside the mode that traces an export",
    ),
    "_dynamo": (torch, "DDP's cutting of graphs is switched off where a step is one graph"),
    "_foreach_mul_": (torch, "gradients are clipped in a few operations"),
    "_foreach_norm": (torch, "gradients are clipped in a few operations"),
    "_forkserver": (forkserver, "the process that forks workers ends with a command"),
    "_forkserver_address": (forkserver._forkserver, "its socket, which a killed process leaves"),
    "_forkserver_pid": (forkserver._forkserver, "which process it is"),
    "_get": (LightningCLI, "a value of the configuration, under a subcommand or not"),
    "_instantiate_trainer": (LightningCLI, "a trainer with callbacks that depend on the flags"),
    "_parse_ckpt_path": (LightningCLI, "flags beat what a checkpoint stores"),
    "_parser": (LightningCLI, "the parser of a subcommand, for its options"),
    "_prepare_subcommand_kwargs": (LightningCLI, "checkpoints are read as weights only"),
    "_python_dispatch": (torch.utils, "where modes of dispatch live"),
    "_pytree": (torch.utils, "tensors in nested arguments, while an export is traced"),
    "_restarting": (
        Trainer(logger=False, accelerator="cpu").fit_loop,
        "resuming at an epoch's end",
    ),
    "_restricted_classmethod": (
        model_helpers,
        "a class method that no instance has, as Lightning's own loading is one",
    ),
    "_trainer": (LightningModule(), "whether there is a trainer, without an error if not"),
    "_typehint": (
        jsonargparse.ArgumentParser().add_argument("--number", type=int | float),
        "the type of an argument, to try whole numbers first",
    ),
    "_triton": (torch.utils, "whether a compiler for GPUs is there"),
}
OVERRIDDEN = ("_forkserver", "_parse_ckpt_path", "_prepare_subcommand_kwargs")
"""Seams that the package overrides or looks up by name, so the search does not find them."""


def foreign():
    """Private attributes and modules that the package uses and nowhere defines."""
    used, own = set(), set()
    for path in HOME.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute):
                stored = isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name)
                (own if stored and node.value.id in ("self", "cls") else used).add(node.attr)
            elif isinstance(node, ast.ImportFrom):
                used |= {*(node.module or "").split("."), *(a.name for a in node.names)}
    used -= own | {"_asdict", "_fields", "_make", "_replace"}  # public ones of a NamedTuple
    return {name for name in used if name.startswith("_") and not name.endswith("__")}


def test_every_seam_is_listed():
    assert foreign() | set(OVERRIDDEN) == set(SEAMS)


@pytest.mark.parametrize("name", SEAMS)
def test_the_library_still_has_it(name):
    owner, reason = SEAMS[name]
    assert hasattr(owner, name), f"needed for: {reason}"


def test_seams_take_the_arguments_that_they_are_given():
    assert list(inspect.signature(LightningCLI._parser).parameters) == ["self", "subcommand"]
    assert list(inspect.signature(LightningCLI._get).parameters)[1:3] == ["config", "key"]
    assert isinstance(jsonargparse.ArgumentParser()._actions, list)


def test_the_settings_that_are_changed_exist():
    assert hasattr(torch._dynamo.config, "optimize_ddp")
    assert callable(torch.utils._triton.has_triton)
    loop = Trainer(logger=False, accelerator="cpu").fit_loop
    for name in ("restarted_on_epoch_end", "epoch_progress", "reset_restart_stage"):
        assert hasattr(loop, name)
