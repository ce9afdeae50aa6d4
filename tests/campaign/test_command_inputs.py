"""The campaign on the command line itself: flags, configuration files and the environment."""

import contextlib
import os
import shutil
import subprocess
import sys

import pytest

from pmixseg.cli.commands import console
from tests.campaign.judging import (
    Answer,
    Generator,
    Tally,
    campaign,
    command,
    damage_text,
    run,
    verdict,
)
from tests.campaign.test_data_inputs import NAME, check, write_case
from tests.inference.tiny_models import save, tiny_student

VALUES = ("0", "-1", "1", "2", "1e9", "nan", "inf", "", "x", "null", "true", "[]", "{}", "[1,2]",
          "flair", "flair+t1", "../x", "=1", "ü", "a b", "0.5", "[16,16,16]", "KFold")  # fmt: skip

TRAINING = (
    "data.patch_size", "data.batch_size", "data.num_workers", "data.split", "data.split.train",
    "data.split.fold", "data.spacing", "data.val_cases", "data.seed", "data.patches_per_case",
    "data.foreground", "data.masks", "data.augment", "data.stor", "data.task", "data.layout",
    "model", "model.combination", "model.fill", "model.fill_levels", "model.optimizer",
    "model.optimizer.lr", "model.optimizer.weight_decay", "model.scheduler", "model.sampler",
    "model.criterion", "model.backbone.width", "model.backbone.levels", "model.backbone.wdith",
    "model.evaluation.window", "model.evaluation.overlap", "align.weight", "align.distance",
    "align.levels", "align.anchor", "align.warmup_epochs", "distill.weight", "distill.teacher",
    "distill.terms.logit.temperature", "seed_everything", "trainer.max_epochs", "trainer.precision",
    "trainer.callbacks", "trainer.logger", "trainer.devices", "trainer.accelerator", "init_from",
    "ckpt_path", "calibrate", "force", "trainer.gradient_clip_val", "trainer.limit_val_batches",
)  # fmt: skip

PLAIN = {
    "inspect": ("--layout", "--task", "--labels", "--root"),
    "prepare": ("--layout", "--task", "--labels", "--spacing", "--dtype", "--workers", "--prune"),
    "report": ("-o", "--no-images", "--out", "--runs"),
    "compare": ("--a", "--b", "--measure", "-o"),
    "phantom": ("--cases", "--spacing", "--private-signal", "--dependence", "--labels", "--task"),
    "segment": ("--flair", "--t1", "--channels", "--overlap", "--precision", "--device", "--codes",
                "--postprocess", "--reference", "--name", "--layout", "--series"),
}  # fmt: skip

CONFIG = """seed_everything: 0
trainer: {max_epochs: 1, precision: 32-true}
data:
  patch_size: [16, 16, 16]
  split: {class_path: pmixseg.data.splits.Fractions, init_args: {train: 0.6, val: 0.2, test: 0.2}}
model:
  class_path: pmixseg.StudentModule
  init_args:
    fill: anchor
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 2.0e-4}}
    scheduler: {class_path: pmixseg.modules.Polynomial, init_args: {power: 0.9}}
align: {weight: 0.1, distance: case_nce}
distill: {weight: 0.0}
"""

SMALL = (
    *("--model.backbone=MultiEncoderUNet", "--model.backbone.width=2", "--model.backbone.levels=2"),
    *("--data.num_workers=0", "--data.patch_size=16", "--trainer.fast_dev_run=true"),
    *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
)


def anywhere(folder, words):
    """Run a command in a folder of its own, so that nothing it writes stays."""
    with contextlib.chdir(folder), console.capture() as printed:
        answer = command(*words)
    return Answer(answer.code, answer.text + printed.get(), answer.traceback)


class Given(Generator):
    """Words of a command line, which are kept in the folder."""

    def __init__(self, store, checkpoint):
        self.store, self.checkpoint = store, checkpoint

    def use(self, folder):
        return anywhere(folder, (folder / "words").read_text(encoding="utf-8").split("\0"))

    def is_right(self, folder):
        return True  # it was taken, and nothing says what else it should do

    def shrink(self, folder):
        """Leave out one word after the other while it stays a fault."""
        words = (folder / "words").read_text(encoding="utf-8").split("\0")
        trial = folder / "smaller" / folder.name
        for word in list(words):
            trial.mkdir(parents=True)
            for file in folder.glob("*.yaml"):
                shutil.copy(file, trial)
            fewer = [w for w in words if w is not word]
            self.keep(trial, fewer)
            if verdict(self, trial, self.use(trial)) == "fault":
                words = fewer
            shutil.rmtree(trial.parent)
        self.keep(folder, words)

    def keep(self, folder, words):
        (folder / "words").write_text("\0".join(map(str, words)), encoding="utf-8")
        return " ".join(map(str, words))


class Flags(Given):
    name = "flags"

    def damage(self, folder, random):
        one = lambda values: values[int(random.integers(len(values)))]  # noqa: E731
        odd = [f"--{one(TRAINING)}={one(VALUES)}" for _ in range(int(random.integers(1, 3)))]
        first = one(("fit", "fit", "fit", "test", "validate"))
        start = () if first == "fit" else (f"--ckpt_path={self.checkpoint}", "--data.split=KFold")
        return self.keep(
            folder, (first, f"--data.store={self.store}", "--run=run", *start, *SMALL, *odd)
        )


class PlainFlags(Given):
    name = "plain flags"

    def __init__(self, cohort, checkpoint):
        self.cohort, self.checkpoint = cohort, checkpoint

    def damage(self, folder, random):
        one = lambda values: values[int(random.integers(len(values)))]  # noqa: E731
        first = one(sorted(PLAIN))
        odd = []
        for _ in range(int(random.integers(1, 4))):
            odd += [one(PLAIN[first]), one(VALUES)][: int(random.integers(1, 3))]
        places = {
            "prepare": (self.cohort, "s"),
            "phantom": ("p", "--cases=0"),
            "segment": (self.checkpoint, "-o", "o"),
            "inspect": (self.cohort,),
        }
        return self.keep(folder, (first, *places.get(first, ()), *odd))


class Configs(Given):
    name = "YAML"

    def damage(self, folder, random):
        made = damage_text(CONFIG, random)
        (folder / "c.yaml").write_bytes(made)
        self.keep(folder, ("fit", "-c", "c.yaml", f"--data.store={self.store}", "--run=r", *SMALL))
        return repr(made[:300])


class Environment(Given):
    """Variables of a process of its own."""

    name = "environment"
    names = ("HOME", "TMPDIR", "COLUMNS", "LINES", "TERM", "LC_ALL", "LANG", "PYTHONIOENCODING",
             "PMIXSEG_RUN", "OMP_NUM_THREADS", "WANDB_MODE", "MPLCONFIGDIR", "XDG_CACHE_HOME",
             "MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "TORCH_HOME", "WORLD_SIZE", "RANK", "TZ",
             "CUDA_VISIBLE_DEVICES", "NO_COLOR", "FORCE_COLOR", "PYTHONUTF8", "PYTHONWARNINGS",
             "PMIXSEG_STORE", "WANDB_RUN_ID", "LOCAL_RANK", "NODE_RANK", "MASTER_PORT", "TMP",
             "MALLOC_TRIM_THRESHOLD_", "MKL_NUM_THREADS", "LD_PRELOAD")  # fmt: skip

    def damage(self, folder, random):
        chosen = [self.names[int(i)] for i in random.integers(0, len(self.names), 3)]
        odd = ("", "0", "-1", "x", "/nowhere", "C", "ascii", "dumb", "1e9", "/dev/null")
        made = {n: odd[int(random.integers(len(odd)))] for n in chosen}
        (folder / "words").write_text("\0".join(f"{k}={v}" for k, v in made.items()))
        return str(made)

    def use(self, folder):
        made = dict(w.split("=", 1) for w in (folder / "words").read_text().split("\0") if w)
        number = sum(map(ord, folder.name))  # one of a few commands, always the same for a seed
        fit = ["fit", f"--data.store={self.store}", "--run=run", *SMALL]
        segment = ["segment", str(self.checkpoint), "nowhere", "-o", "out"]
        command = [["inspect", str(self.store)], segment, ["report", "nowhere"], fit][number % 4]
        words = [sys.executable, "-m", "pmixseg", *command]

        def ask():
            done = subprocess.run(
                words,
                env=os.environ | made,
                cwd=folder,
                capture_output=True,
                check=False,
                timeout=250,
            )
            said = (done.stdout + done.stderr).decode(errors="replace")
            print(said)  # noqa: T201  # the answer
            return done.returncode

        return run(ask)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tiny_student(), tmp_path_factory.mktemp("weights") / "a.ckpt")


def sizes(few, many):
    """Seeds of the default suite, and of the whole campaign."""
    return [
        pytest.param(range(few), id="few"),
        pytest.param(
            range(few, many), id="many", marks=[pytest.mark.slow, pytest.mark.timeout(3000)]
        ),
    ]


def tried(generator, seeds, tmp_path):
    tally = Tally()
    campaign(generator, seeds, tmp_path / "work", tmp_path / "faults", tally)
    check(tally, tmp_path / "faults")


@pytest.mark.parametrize("seeds", sizes(40, 400))
def test_damaged_flags_cause_no_fault(checkpoint, tmp_path, seeds):
    write_case(tmp_path / "cohort" / NAME)
    tried(PlainFlags(tmp_path / "cohort", checkpoint), seeds, tmp_path)


@pytest.mark.parametrize("seeds", sizes(3, 200))
def test_damaged_flags_of_trainings_cause_no_fault(phantom_store, checkpoint, tmp_path, seeds):
    tried(Flags(phantom_store, checkpoint), seeds, tmp_path)


@pytest.mark.parametrize("seeds", sizes(3, 120))
def test_damaged_configurations_cause_no_fault(phantom_store, checkpoint, tmp_path, seeds):
    tried(Configs(phantom_store, checkpoint), seeds, tmp_path)


def test_of_the_words_of_a_fault_those_stay_that_cause_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.campaign.judging.TOTAL", Tally())  # no fault of the product

    class Crashing(Given):
        name = "crashing"

        def damage(self, folder, random):
            return self.keep(folder, ("fit", "--a=1", "--bad", "--b", "--b"))

        def use(self, folder):
            bad = "--bad" in (folder / "words").read_text().split("\0")
            return Answer(None, "", "KeyError: 'bad'") if bad else Answer(1, "a sentence.")

    kept = tmp_path / "faults"
    tally = Tally()
    campaign(Crashing(tmp_path, tmp_path), range(1), tmp_path / "work", kept, tally)
    assert (kept / "crashing-0" / "words").read_text() == "--bad"
    assert len(tally.faults) == 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_odd_environments_cause_no_fault(phantom_store, checkpoint, tmp_path):
    tried(Environment(phantom_store, checkpoint), range(40), tmp_path)
