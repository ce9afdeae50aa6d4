"""Commands that are killed or stopped while they write: nothing half-written counts.

A copy of this process dies at a chosen file, before or after that file gets its name, or at a
random moment, as at a SIGKILL: nothing is cleaned up. What it left is then looked at, and the
command run once more. At Ctrl-C a command ends with 130 and one line, and leaves nothing hidden.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pmixseg.cli import main
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.store.store import Store
from pmixseg.files import file_hash
from pmixseg.task import BRATS
from tests.inference.tiny_models import Glance, save, tiny_student

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]

IMPORT = f"--import={Glance.__module__}"


def files(folder):
    """Hashes of what has a name of its own; what a killed process left is hidden."""
    return {
        str(path.relative_to(folder)): file_hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix != ".json"  # they hold the time or the place of their making
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def state(folder):
    """What a training keeps, without the paths of its own that stand in it."""
    kept = {}
    for name in ("last", "best"):
        checkpoint = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        parts = {k: checkpoint[k] for k in ("state_dict", "optimizer_states", "global_step")}
        kept |= {f"{name} {where}": value for where, value in leaves(parts)}
    return {**kept, "log": (folder / "metrics.csv").read_text()}


def leaves(tree, where=""):
    """Every number of nested primitives and tensors, with its place."""
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, inner in pairs:
            yield from leaves(inner, f"{where}/{key}")
    else:
        yield where, tree.tolist() if isinstance(tree, torch.Tensor) else tree


def ended(words, at, after, end, said=os.devnull):
    """Run a command in a copy of this process, which calls ``end`` at its ``at``-th renaming.

    Returns:
        The exit code.
    """
    count = 0

    def deadly(rename):
        def call(self, target):
            nonlocal count
            count += 1
            if count == at and not after:
                end()
            made = rename(self, target)
            if count == at and after:
                end()
            return made

        return call

    def begin():
        Path.replace, Path.rename = deadly(Path.replace), deadly(Path.rename)

    return copied(words, begin, said)


def killed(words, seconds):
    """Run a command in a copy of this process, which dies after so long; return the exit code."""

    def begin():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    return copied(words, begin)


def copied(words, begin, said=os.devnull):
    """Run a command in a copy of this process that calls ``begin`` first; return the exit code."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            # Pytest's own goes elsewhere, and the process ends by os._exit.
            sys.stderr = Path(said).open("w", encoding="utf-8")  # noqa: SIM115  # see above
            signal.signal(signal.SIGINT, signal.default_int_handler)
            begin()
            code = main(words)
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die():
    os._exit(9)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = save(tiny_student(backbone=Glance()), tmp_path_factory.mktemp("weights") / "a.ckpt")
    lightning = {"pytorch-lightning_version": "2.6.6", "epoch": 0, "global_step": 0}
    torch.save({**torch.load(path, weights_only=True), **lightning}, path)
    return path


@pytest.fixture(scope="module")
def cohort(phantom_root, tmp_path_factory):
    """Two of the phantom's cases."""
    root = tmp_path_factory.mktemp("two") / "cohort"
    root.mkdir()
    for case in find_cases(phantom_root, BRATS)[:2]:
        folder = case.label.parent
        (root / folder.name).symlink_to(folder)
    return root


def phantom(out, **_):
    return ["phantom", out, "--cases=2", "--spacing=6", "--workers=0"]


def prepare(out, cohort, **_):
    return ["prepare", cohort, out, "--workers=0"]


def segment(out, cohort, checkpoint, **_):
    return ["segment", checkpoint, cohort, "-o", out, IMPORT]


def predict(out, phantom_store, checkpoint, **_):
    return ["predict", f"--ckpt_path={checkpoint}", f"--data.store={phantom_store}", IMPORT,
            "--data.split=WholeCohort", f"--run={out}", "--trainer.limit_predict_batches=2",
            "--data.num_workers=0", "--trainer.accelerator=cpu"]  # fmt: skip


def score(out, phantom_store, **places):
    words = predict(out, phantom_store, **places)
    masks = out.parents[1] / "masks.json"  # one combination, scored quickly
    masks.write_text(json.dumps({case: ["t1"] for case in Store.open(phantom_store).cases}))
    batches = [f"--data.mask_file={masks}", "--trainer.limit_test_batches=1"]
    return ["test", *words[1:-3], *batches, *words[-2:]]


def fit(out, phantom_store, **_):
    last = ["--ckpt_path=last"] if (out / "checkpoints" / "last.ckpt").is_file() else []
    return ["fit", f"--data.store={phantom_store}", f"--run={out}", *last, "--data.val_cases=1",
            "--data.split=Fractions", "--data.patch_size=16", "--data.num_workers=0",
            "--model.backbone=MultiEncoderUNet", "--model.backbone.width=2",
            "--model.backbone.levels=2", "--model.scheduler=OneCycle",
            "--model.evaluation.window=[32,40,32]", "--trainer.max_epochs=3",
            "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]  # fmt: skip


@pytest.mark.parametrize("command", [phantom, prepare, segment, predict, score])
def test_a_command_that_is_stopped_or_killed(command, cohort, checkpoint, phantom_store, tmp_path):
    places = {"cohort": cohort, "checkpoint": checkpoint, "phantom_store": phantom_store}
    words = lambda out: [str(w) for w in command(out, **places)]  # noqa: E731
    whole = tmp_path / "whole" / "out"  # the name of a run stands in its records
    assert main(words(whole)) == 0
    expected = files(whole)
    deaths = 0
    first = tmp_path / "first" / "out"
    said = tmp_path / "said"
    assert ended(words(first), 2, False, interrupt, said) == 130
    assert said.read_text(encoding="utf-8").splitlines()[-1] == "pmixseg: stopped."
    assert "Traceback" not in said.read_text(encoding="utf-8")
    assert not [*first.rglob(".*")]  # cleared up
    assert files(first).items() <= expected.items()
    for at in (1, 2, 4):
        for after in (False, True):
            out = tmp_path / f"{at}-{after}" / "out"
            deaths += ended(words(out), at, after, die) == 9
            left = files(out)
            assert left.items() <= expected.items(), f"half-written at {at}"
            if command is phantom and left:
                assert all(len(c.images) == 4 and c.label for c in find_cases(out, BRATS))
            if command is prepare and (out / "cases").is_dir():
                store = Store.open(out)
                assert all(store.read(case).image.shape[0] == 4 for case in store.cases)
    assert deaths >= 2
    assert main(words(out)) == 0
    assert files(out) == expected


@pytest.mark.slow
@pytest.mark.parametrize("command", [phantom, prepare, segment, predict, score, fit])
def test_a_command_that_is_killed_at_random(command, cohort, checkpoint, phantom_store, tmp_path):
    """It is run again, a training from its last checkpoint, and ends as an undisturbed one."""
    places = {"cohort": cohort, "checkpoint": checkpoint, "phantom_store": phantom_store}
    words = lambda out: [str(w) for w in command(out, **places)]  # noqa: E731
    result = state if command is fit else files
    whole = tmp_path / "whole" / "out"
    begun = time.monotonic()
    assert main(words(whole)) == 0
    moments = np.random.default_rng(0).uniform(0, time.monotonic() - begun, 6)
    deaths = 0
    for number, moment in enumerate(moments):
        out = tmp_path / f"{number}" / "out"
        deaths += killed(words(out), moment) == -signal.SIGALRM
        assert main(words(out)) == 0
        assert result(out) == result(whole), f"killed after {moment:.2f} s"
    assert deaths
