"""What README and the experiments' READMEs show is run as it stands, on small data laid out so.

A real shell reads the blocks, so variables, loops and line ends are its own; the commands are then
called in this process, one after the other. Only trainings and phantoms are made small. Commands
that stand in a sentence run in processes of their own.
"""

import functools
import re
import runpy
import subprocess
import sys

import lightning.pytorch as lightning
import pytest

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.cli import main
from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
from tests.docs.pages import ROOT, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FENCE = re.compile(r"^```(?P<tag>[^\n]*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)
"""Blocks of README that install or test have a second word in their tag."""

TRAINING = (
    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.precision=32-true"),
    *("--trainer.check_val_every_n_epoch=1", "--trainer.logger=false", "--data.num_workers=0"),
    *("--data.patch_size=16", "--data.batch_size=2"),
)
NETWORK = ("--model.backbone.width=2",)
PHANTOM = {"--cases": "10", "--spacing": "6"}

RECORDER = """
set -euo pipefail
for program in pmixseg python wandb; do
  eval "$program() { printf '%s\\\\0' $program \\"\\$@\\" >&3; printf '\\\\n' >&3; }"
done
"""


def blocks(page, tag):
    return [f["body"] for f in FENCE.finditer((ROOT / page).read_text()) if f["tag"] == tag]


def commands(page, folder):
    """The words of every command of a page's shell blocks, as a shell hands them over."""
    said = folder / "said"
    script = RECORDER + "\n".join(blocks(page, "bash"))
    subprocess.run(["bash", "-c", f"exec 3>{said}\n{script}"], cwd=folder, check=True)
    return [line.rstrip("\0").split("\0") for line in said.read_text().splitlines()]


def small(words):
    if words[0] == "fit":
        flags = [*TRAINING, *(() if "official-2025-04" in " ".join(words) else NETWORK)]
        own = {word.partition("=")[0] for word in words}  # a flag may stand only once
        return [*words, *(flag for flag in flags if flag.partition("=")[0] not in own)]
    return small_phantom(words) if words[0] == "phantom" else words


def small_phantom(words):
    """A flag may stand only once, so a small number takes the place of the one that is there."""
    for flag, value in PHANTOM.items():
        at = words.index(flag) if flag in words else len(words)
        words = [*words[:at], flag, value, *words[at + 2 :]]
    return words


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("readmes")
    write_cohort(root, 10, 1, PhantomSettings(spacing=6.0))
    return root


@pytest.fixture
def folder(cohort, tmp_path, monkeypatch):
    """A folder beside which everything lies where the pages say."""
    work = tmp_path / "work"
    brats = work / "BraTS2018" / "MICCAI_BraTS_2018_Data_Training"
    brats.parent.mkdir(parents=True)
    brats.symlink_to(cohort)
    (work / "experiments").symlink_to(ROOT / "experiments")
    cases = sorted(p.parent for p in cohort.rglob("*_flair.nii.gz"))
    for name, modality in {"f": "flair", "c": "t1ce"}.items():
        (work / f"{name}.nii.gz").symlink_to(next(cases[0].glob(f"*_{modality}.nii.gz")))
    monkeypatch.chdir(work)
    for variable in ("PMIXSEG_RUN", "PMIXSEG_STORE"):
        monkeypatch.delenv(variable, raising=False)
    return work


def done(words, capsys):
    code = main(small(words[1:]))
    assert code == 0, f"{' '.join(words)}: {capsys.readouterr().err[-2000:]}"


def test_the_readme_runs_as_written(folder, capsys, monkeypatch):
    shown = commands("README.md", folder)
    assert len(shown) == 6
    for words in shown:
        done(words, capsys)
    assert (folder / "report.html").is_file()
    assert (folder / "out" / "Brats18_PHANTOM_000_1_seg.nii.gz").is_file()


def test_the_python_block_of_the_readme(folder, monkeypatch, capsys):
    """Networks, patches and training are made small by the defaults that the block leaves alone."""
    assert main(["prepare", "BraTS2018/MICCAI_BraTS_2018_Data_Training", "store"]) == 0
    # Two trainings of one step, each with a validation.
    few = {"max_steps": 1, "limit_train_batches": 1, "limit_val_batches": 1}
    short = functools.partialmethod(lightning.Trainer.__init__, **few)
    monkeypatch.setattr(lightning.Trainer, "__init__", short)
    narrow = functools.partialmethod(MultiEncoderUNet.__init__, width=2, levels=2)
    monkeypatch.setattr(MultiEncoderUNet, "__init__", narrow)
    (block,) = blocks("README.md", "python")
    made: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), made)
    assert made["student"].trainer.global_step == 1
    assert made["result"].labels.shape == (40, 40, 26)


EXPERIMENTS = {
    "distillation": 3,
    "missingness": 2,
    "official": 3,
    "other_tasks": 5,
    "sweeps": 16,
}


def test_every_readme_with_commands_is_run():
    pages = ROOT.glob("experiments/*/README.md")
    shown = {page.parent.name for page in pages if "pmixseg " in "".join(blocks(page, "bash"))}
    assert shown == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_readme_of_an_experiment(name, folder, capsys):
    shown = commands(f"experiments/{name}/README.md", folder)
    assert len(shown) == EXPERIMENTS[name]
    if not any("prepare" in words for words in shown):
        assert main(["prepare", "BraTS2018/MICCAI_BraTS_2018_Data_Training", "store"]) == 0
    weights = set()
    for words in shown:
        if words[0] != "pmixseg":  # tests/experiments has the programs; wandb has its own
            continue
        if "--align.weight=" in " ".join(words):  # a loop: one turn of each file
            if words[3] in weights:
                continue
            weights.add(words[3])
        done(words, capsys)
    assert any("fit" in words for words in shown)


FEW = {
    "run": (
        *("--groups", "short", "--seeds", "1", "--set", "groups={short: {steps: 1}}"),
        *("--set", "cohort.train=4", "--set", "cohort.val=2", "--set", "cohort.test=2"),
        *("--set", "training.gap.cases=2", "--results", "results"),
    ),
    "experiments/phantom/validate.py": (
        *("--spacing", "6", "--train-cases", "2", "--test-cases", "1", "--steps", "1"),
    ),
    "experiments/official/compare.py": ("--steps", "1"),
}
"""What makes a program small, by its file or command."""

ENDS = {"status": 3, "experiments/phantom/validate.py": 1}
"""Exit codes: not all has ended, and a network of one step has learnt nothing."""


@pytest.mark.parametrize(("name", "count"), [("official", 1), ("phantom", 1), ("study", 3)])
def test_python_lines_of_an_experiment(name, count, folder, monkeypatch, capsys):
    """Each program runs its line as it stands, on little."""
    lines = commands(f"experiments/{name}/README.md", folder)
    lines = [words[1:] for words in lines if words[0] == "python"]
    assert len(lines) == count
    for words in lines:
        module = words[0] == "-m"
        key = words[2] if module else words[0]
        words = [word.replace("experiments/phantom/validation", "validation") for word in words]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [*words[module:], *FEW.get(key, ())])
            try:
                if module:
                    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(words[0], run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code or 0
        assert code == ENDS.get(key, 0), (words, capsys.readouterr().err)


BENCHMARK = "experiments/benchmarks/"
SMALLER = {
    "alignment.py": "--rounds 1 --size 16 --batch 1 --arms student",
    "backbones.py child": "--side 16",
    "backbones.py layers": "--side 16 --repeats 1 --precisions fp32",
    "backbones.py test": "",
    "backbones.py train": "--side 16 --repeats 1",
    "gpu.py": "--rehearse --rows ceilings",
    "grouping.py": "",
    "metrics.py": "--data ../coarse",
    "models.py": "--only UHVED",
    "open_maps.py": "--cases 2 --rounds 1 --spacing 6",
    "operations.py": "--only MultiEncoderUNet --side 16",
    "patches.py": "--data ../shared/data/brats2021 --rounds 1 --cases 1",
    "segment_memory.py": "--shape 48 48 32 --window 16",
    "store.py": "--repeats 1",
}
"""What makes a benchmark small: flags after those of the page, whose place they take."""
SMALLEST = {BENCHMARK + name: flags for name, flags in SMALLER.items()}
SMALLEST["experiments/phantom/montage.py"] = "--cases 3"

ENDS_AT = {
    "backbones.py test": "--official PATH: give a checkout of github.com/dyh127/RFNet",
    "backbones.py train": "--official PATH: give a checkout of github.com/dyh127/RFNet",
}
"""The only exceptions: where a command ends that compares with code that is not ours to keep."""

PAGES = sorted([*ROOT.glob("experiments/*/*.md"), *ROOT.glob("docs/results/*.md")])
SPAN = re.compile(r"`([^`]+)`")
PROGRAM = re.compile(r"python (?P<key>experiments/\S+\.py(?: [a-z]+\b)?)")


def spans(page):
    """What stands between single backticks, without brackets and the one thread that all have."""
    for span in SPAN.findall(FENCE.sub("", page.read_text())):
        yield " ".join(re.sub(r"[][]", "", span).split()).removeprefix("OMP_NUM_THREADS=1 ")


INLINE = sorted({span for page in PAGES for span in spans(page) if "python experiments/" in span})


def test_every_program_of_an_experiment_is_shown_and_its_commands_are_whole():
    programs = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("experiments/*/*.py")
        if '__name__ == "__main__"' in path.read_text() and path.name != "__main__.py"
    }
    fenced = {name for name in FEW if name.endswith(".py")}
    assert programs == fenced | {PROGRAM.search(span)["key"].split()[0] for span in INLINE}
    names = tuple(program.rpartition("/")[2] + " " for program in programs)
    assert [span for page in PAGES for span in spans(page) if span.startswith(names)] == []


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two invented cases in the place of real ones, and a coarse one."""
    root = tmp_path_factory.mktemp("scans")
    for spacing, place in {1.5: root / "shared/data/brats2021", 3.0: root / "coarse"}.items():
        cohort = root / str(spacing)
        write_cohort(cohort, 1, 1, PhantomSettings(spacing=spacing))
        for case in ("BraTS2021_00000", "BraTS2021_00031"):
            (place / case).mkdir(parents=True)
            for file in cohort.rglob("*.nii.gz"):
                (place / case / f"{case}_{file.name.split('_')[-1]}").symlink_to(file)
    return root


@pytest.mark.parametrize("command", INLINE, ids=lambda command: command[:60])
def test_a_command_in_a_sentence(command, scans, tmp_path):
    work = tmp_path / "work"
    (work / "docs" / "assets").mkdir(parents=True)
    for name in ("shared", "coarse"):
        (tmp_path / name).symlink_to(scans / name)
    key = PROGRAM.search(command)["key"]
    ends = ENDS_AT.get(key.removeprefix(BENCHMARK), "")
    done = run(f"{command} {SMALLEST[key]}", work)
    assert done.returncode == bool(ends), done.stderr[-2000:]
    assert done.stderr.rstrip().endswith(ends)
    assert done.stdout or ends
