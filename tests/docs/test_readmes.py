"""What README, how-to pages and experiments' READMEs show is run as it stands, on small data.

A real shell reads the blocks, so variables, loops and line ends are its own; the commands are then
called in this process, one after the other. Only trainings and phantoms are made small. Those for
several GPUs run in processes of their own.
"""

import functools
import itertools
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import lightning.pytorch as lightning
import nibabel as nib
import numpy as np
import pytest

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.cli import main
from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
from pmixseg.task import BRATS
from tests.docs.pages import ROOT, run
from tests.docs.test_commands import job
from tests.inference.test_nnunet import raw as raw
from tests.inference.tiny_models import save, tiny_student

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FENCE = re.compile(r"^ *```(?P<tag>[^\n]*)\n(?P<body>.*?)^ *```", re.MULTILINE | re.DOTALL)
"""Blocks of README that install or test have a second word in their tag."""

TRAINING = (
    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.precision=32-true"),
    *("--trainer.check_val_every_n_epoch=1", "--trainer.logger=false", "--data.num_workers=0"),
    *("--data.patch_size=16", "--data.batch_size=2"),
)
NETWORK = ("--model.backbone.width=2",)
PHANTOM = {"--cases": "10", "--spacing": "6"}
PLACES = dict.fromkeys(("/data", "/data/BraTS2018", "/data/cohort"), "BraTS2018")
PLACES |= {"gpu": "cpu", "ddp": "auto"}
"""Where the pages name what this machine has not."""

RECORDER = """
set -euo pipefail
for program in pmixseg python wandb sbatch torchrun docker apptainer \\
    nnUNetv2_evaluate_folder; do
  eval "$program() { printf '%s\\\\0' $program \\"\\$@\\" >&3; printf '\\\\n' >&3; }"
done
"""


def blocks(page, tag):
    """What stands in a page under a tag; a file that is shown is no block of its own."""
    found = [f["body"] for f in FENCE.finditer((ROOT / page).read_text()) if f["tag"] == tag]
    return [body for body in found if not body.startswith("--8<--")]


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
        words = [*words, *(flag for flag in flags if flag.partition("=")[0] not in own)]
    words = small_phantom(words) if words[0] == "phantom" else words
    for flag in ("--trainer.devices", "--trainer.num_nodes"):
        if flag in words:
            words[words.index(flag) + 1] = "1"
    return [PLACES.get(word, word) for word in words]


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


def lay_out(work, cohort):
    """Put everything where the pages say."""
    brats = work / "BraTS2018" / "MICCAI_BraTS_2018_Data_Training"
    brats.parent.mkdir(parents=True)
    brats.symlink_to(cohort)
    (work / "experiments").symlink_to(ROOT / "experiments")
    cases = sorted(p.parent for p in cohort.rglob("*_flair.nii.gz"))
    for name, modality in {"f": "flair", "c": "t1ce", "t1": "t1"}.items():
        (work / f"{name}.nii.gz").symlink_to(next(cases[0].glob(f"*_{modality}.nii.gz")))
    return work


@pytest.fixture(autouse=True)
def no_folders_of_an_environment(monkeypatch):
    for variable in ("PMIXSEG_RUN", "PMIXSEG_STORE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def folder(cohort, tmp_path, monkeypatch):
    """A folder of its own for a page."""
    monkeypatch.chdir(lay_out(tmp_path / "work", cohort))
    return tmp_path / "work"


def done(words):
    assert main(small(words[1:])) == 0, words


@pytest.fixture(scope="module")
def settled(cohort, tmp_path_factory):
    """A folder in which someone has run what the README shows."""
    work = lay_out(tmp_path_factory.mktemp("settled") / "work", cohort)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        shown = commands("README.md", work)
        assert len(shown) == 6
        for words in shown:
            done(words)
    return work


def test_the_readme_runs_as_written(settled):
    assert (settled / "report.html").is_file()
    assert (settled / "out" / "Brats18_PHANTOM_000_1_seg.nii.gz").is_file()


ONE = ("backbone", "distance", "distillation-term", "missingness", "resume")
HOW_TO = dict.fromkeys(ONE, 1) | {"calibrate": 4, "compare": 6, "container": 3, "dicom": 3}
HOW_TO |= {"export": 3, "gpus": 3, "nnunet": 2, "slurm": 7}
"""Commands of ``pmixseg`` on each page, in files and containers too; of eight seeds one."""

MORE = {"resume": ("--trainer.max_epochs=2",)}

ELSEWHERE = {
    "CONTRIBUTING.md": ".ci/run installs so",
    "docs/results/benchmarks.md": "a command that stands in a sentence, too",
    "docs/results/studies.md": "experiments/study/README.md, and tests/experiments",
    "docs/start/install.md": "README's first block, which CI runs; the other waits for a release",
    "docs/start/quickstart.md": "the job 'quickstart'",
    "docs/tutorials/brats.md": "the name of a folder of the reader's",
    "docs/tutorials/sweep.md": "wandb: tests/cli/test_sweeps.py",
    "experiments/study/HISTORY.md": "experiments/study/README.md",
}
"""Where a block without ``run`` is run, if not here. Programs of others that a how-to page calls:
nnU-Net in tests/inference/test_nnunet.py, containers in the jobs 'image' and 'apptainer'."""


def test_every_block_is_run_or_it_is_known_where():
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    pages += [*ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/**/*.md")]
    shown = {str(page.relative_to(ROOT)) for page in pages}
    shown = {page for page in shown if blocks(page, "bash") or blocks(page, "python")}
    own = {f"docs/howto/{name}.md" for name in HOW_TO}
    own |= {f"experiments/{name}/README.md" for name in [*EXPERIMENTS, *PYTHON_LINES]}
    assert shown == {"README.md", *own, *ELSEWHERE}
    assert not own & set(ELSEWHERE)


@pytest.fixture(scope="module")
def equipped(settled, phantom_root, raw):
    """What else the how-to pages name."""
    # Raw scans have 1 mm: a network and windows that are quick there.
    net = MultiEncoderUNet(BRATS.modalities, 4, width=2, levels=2, stem=2)
    save(tiny_student(window=96, backbone=net), settled / "model.ckpt")
    (settled / "nnUNet_raw").symlink_to(raw.parent)
    brain = nib.load(settled / "c.nii.gz")
    mask = nib.Nifti1Image(np.uint8(brain.get_fdata() > 0), brain.affine)
    nib.save(mask, settled / "mask.nii.gz")
    (settled / "joined").mkdir()
    for name in ("a-1", "b-1"):
        (settled / "joined" / name).symlink_to(Path("..", "runs", name))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(settled)
        phantom = ["phantom", "one", "--cases", "1", "--spacing", "6", "--dicom", "studies"]
        assert main(phantom) == 0
        (settled / "study").symlink_to(next((settled / "studies").iterdir()))
    return settled


def program(words):
    """The command of ours that another program runs; none where something else runs it."""
    if words[0] == "sbatch":
        return ["pmixseg", *job(ROOT / words[1], Path().absolute(), submitted=words[2:])[0]]
    starts = [i for i, word in enumerate(words) if word in ("pmixseg", "pmixseg:cuda")]
    ours = starts and "build" not in words and words[-1] != "quickstart" and "hd-bet" not in words
    return ["pmixseg", *words[starts[-1] + 1 :]] if ours else []


@pytest.mark.parametrize("page", HOW_TO)
def test_the_commands_of_a_how_to_page(page, equipped, monkeypatch):
    monkeypatch.chdir(equipped)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    path = f"docs/howto/{page}.md"
    for fence in FENCE.finditer((ROOT / path).read_text()):
        name = fence["tag"].partition(" file=")[2]
        if name:
            Path(name).write_text(fence["body"])
    shown = [ours for words in commands(path, equipped) if (ours := program(words))]
    shown = [words for words in shown if not re.search(r"runs/[ab]-[2-8]\b", " ".join(words))]
    assert len(shown) == HOW_TO[page]
    for words in shown:
        if "onnx" in words and not find_spec("onnxruntime"):
            continue  # the job 'extras' has it
        files = (sorted(map(str, Path().glob(w))) if "*" in w else [w] for w in words)
        done([*itertools.chain(*files), *MORE.get(page, ())])


def test_several_processes_as_the_page_starts_them(settled, tmp_path):
    """By torchrun on one machine and on two, at the same time; tests/cli has Lightning's start."""
    (tmp_path / "store").symlink_to(settled / "store")
    text = "\n".join(blocks("docs/howto/gpus.md", "bash")[1:])
    small = {"store store": f"store store {' '.join([*TRAINING, *NETWORK])}", "gpu": "cpu"}
    small |= {"first.example.org": "localhost", " 29500": " 29561"}
    for shown, here in small.items():
        assert shown in text
        text = text.replace(shown, here)
    one, two = (f"PMIXSEG_RUN{block}" for block in text.split("PMIXSEG_RUN")[1:])
    one = re.sub("(node|devices) 4", r"\1 2", one)
    two = re.sub("(per_node|devices) 4", r"\1 1", two)
    both = [one, two, two.replace("rank 0", "rank 1")]
    ends = "for job in $(jobs -p); do wait $job; done"
    done = run("set -e\n" + "".join(f"({block}) &\n" for block in both) + ends, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("MEMBER: 2/2") + done.stderr.count("MEMBER: 2/2") == 2
    for run_of in ("teacher-4", "teacher-8"):
        assert (tmp_path / "runs" / run_of / "checkpoints" / "best.ckpt").is_file()


def test_the_python_block_of_the_readme(folder, monkeypatch):
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
def test_the_readme_of_an_experiment(name, folder):
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
        done(words)
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


PYTHON_LINES = {"official": 1, "phantom": 1, "study": 3}


@pytest.mark.parametrize(("name", "count"), PYTHON_LINES.items())
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
