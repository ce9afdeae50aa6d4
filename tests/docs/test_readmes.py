"""What README and the experiments' READMEs show is run as it stands, on small data laid out so.

A real shell reads the blocks, so variables, loops and line ends are its own; the commands are then
called in this process, one after the other. Only trainings and phantoms are made small.
"""

import re
import subprocess

import pytest

from pmixseg.cli import main
from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
from tests.docs.pages import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FENCE = re.compile(r"^```(?P<tag>[^\n]*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)
"""Blocks of README that install or test have a second word in their tag."""

TRAINING = (
    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.precision=32-true"),
    *("--trainer.check_val_every_n_epoch=1", "--trainer.logger=false", "--data.num_workers=0"),
    *("--data.patch_size=16", "--data.batch_size=2"),
)
NETWORK = ("--model.backbone.width=2",)
PHANTOM = ("--cases=6", "--spacing=6")

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
        return [*words, *TRAINING, *(() if "official-2025-04" in " ".join(words) else NETWORK)]
    return [*words, *PHANTOM] if words[0] == "phantom" else words


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
    for case, number in zip(cases, ("00", "02", "06", "14", "19", "24", "31"), strict=False):
        made = tmp_path / "shared" / "data" / "brats2021" / f"BraTS2021_000{number}"
        made.mkdir(parents=True)
        for path in case.iterdir():
            (made / f"{made.name}{path.name.removeprefix(case.name)}").symlink_to(path)
    monkeypatch.chdir(work)
    for variable in ("PMIXSEG_RUN", "PMIXSEG_STORE"):
        monkeypatch.delenv(variable, raising=False)
    return work


def done(words, capsys):
    code = main(small(words[1:]))
    assert code == 0, f"{' '.join(words)}: {capsys.readouterr().err[-2000:]}"


def test_the_readme(folder, capsys, monkeypatch):
    shown = commands("README.md", folder)
    assert len(shown) == 6
    for words in shown:
        done(words, capsys)
    assert (folder / "report.html").is_file()
    assert (folder / "out" / "Brats18_PHANTOM_000_1_seg.nii.gz").is_file()
