"""Commands that are killed or stopped while they write: nothing half-written counts.

A copy of this process dies at a chosen file, before or after that file gets its name, as at a
SIGKILL: nothing is cleaned up. What it left is then looked at, and the command run once more. At
Ctrl-C a command ends with 130 and one line, and leaves nothing hidden.
"""

import json
import os
import signal
import sys
from pathlib import Path

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


def ended(words, at, after, end, said=os.devnull):
    """Run a command in a copy of this process, which calls ``end`` at its ``at``-th renaming.

    Returns:
        The exit code.
    """
    child = os.fork()
    if child == 0:
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

        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            # Pytest's own goes elsewhere, and the process ends by os._exit.
            sys.stderr = Path(said).open("w", encoding="utf-8")  # noqa: SIM115  # see above
            signal.signal(signal.SIGINT, signal.default_int_handler)
            Path.replace, Path.rename = deadly(Path.replace), deadly(Path.rename)
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
