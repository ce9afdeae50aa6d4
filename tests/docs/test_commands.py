"""Commands that pages, batch files and images show: the program takes them; their files exist."""

import itertools
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from pmixseg.cli import TRAINING, import_modules, parse_plain, segment
from pmixseg.cli.training import TrainingCLI
from pmixseg.data.cohorts.shares import Share
from pmixseg.task import BRATS
from tests.docs.pages import DOCS, ROOT
from tests.inference.tiny_models import save, tiny_student

TEXTS = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("experiments/*/*.md"))]
FENCE = re.compile(r"^ *```(?P<tag>[^\n]*)\n(?P<body>.*?)^ *```", re.MULTILINE | re.DOTALL)
SHELL = ("bash", "sh", "shell", "console", "")


def commands(path):
    """The arguments of every ``pmixseg`` in a page; shell variables stand as VARIABLE."""
    for fence in FENCE.finditer(path.read_text()):
        if (fence["tag"].split() or [""])[0] not in SHELL:
            continue
        lines = fence["body"].replace("\\\n", " ").splitlines()
        for line in lines:
            text = re.sub(r"\$\(.*?\)|\$\{?\w+\}?", "VARIABLE", line.strip().removeprefix("$ "))
            words = shlex.shlex(text, posix=True, punctuation_chars="|&;>")
            words.whitespace_split = True
            try:
                tokens = list(words)
            except ValueError:  # a quotation over several lines: no command of ours
                continue
            ends = [i for i, token in enumerate(tokens) if set(token) <= set("|&;>")]
            for first, last in itertools.pairwise([-1, *ends, len(tokens)]):
                part = tokens[first + 1 : last]
                if "pmixseg" in part[:8] and not {"install", "docker", "apptainer"} & set(part):
                    yield part[part.index("pmixseg") + 1 :]


SHOWN = [
    pytest.param(words, id=f"{path.relative_to(ROOT)}: {' '.join(words)[:60]}")
    for path in TEXTS
    for words in commands(path)
]


class OnlyParsed(TrainingCLI):
    """Reads the command line and files, and stops there."""

    def instantiate_classes(self):
        pass

    def after_instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tiny_student(), tmp_path_factory.mktemp("docs") / "tiny.ckpt")


def test_commands_are_found():
    assert len(SHOWN) > 20


@pytest.mark.parametrize("words", SHOWN)
def test_a_command_is_taken(words, checkpoint, monkeypatch):
    monkeypatch.chdir(ROOT)
    if "..." in words or "…" in words or not words or words[0].isupper():
        pytest.skip("a sketch of a command, not one to copy")
    if any(word.startswith("VARIABLE") or word == "--data.task" for word in words):
        pytest.skip("flags or files of the page's own shell")
    if "--import" in words:
        pytest.skip("needs the module that the page's text writes; pages that are run try it")
    words, modules = import_modules(words)
    if words[0] in TRAINING:
        written = [w for w in words if w.endswith((".yaml", ".yml")) and not Path(w).is_file()]
        if written:
            pytest.skip(f"{written[0]} is written by the page's text; pages that are run try it")
        if words[0] != "fit":
            index = next(i for i, w in enumerate(words) if w.startswith("--ckpt_path"))
            gap = words[index] == "--ckpt_path"
            words = [*words[:index], f"--ckpt_path={checkpoint}", *words[index + 1 + gap :]]
        OnlyParsed(words, modules)
    elif words[0] == segment.NAME:
        _, rest = segment.parser_for(BRATS).parse_known_args(words[1:])
        assert not rest
    elif words[-1] not in ("--help", "--version"):
        parse_plain(words)


def test_the_laptop_configuration_is_taken():
    files = [
        f"--config={ROOT}/experiments/brats2018/{n}.yaml" for n in ("data", "laptop", "student")
    ]
    OnlyParsed(["fit", *files, "--data.store=store", "--data.split=Fractions"])


BATCH_FILES = sorted((ROOT / "experiments" / "cluster").glob("*.sbatch"))
OPTIONS = {  # of `man sbatch`
    *("job-name", "array", "nodes", "ntasks", "ntasks-per-node", "gres", "cpus-per-task", "mem"),
    *("time", "signal", "requeue", "open-mode", "output"),
}
SUBMITTED = {
    "prepare": ["/data/BraTS2018", "store"],
    "segment": ["model.ckpt", "/data/cohort", "-o", "results"],
    "test": ["runs/student/checkpoints/best.ckpt", "--data.store", "store"],
    "train": [
        *("-c", "experiments/brats2018/data.yaml", "-c", "experiments/brats2018/teacher.yaml"),
        *("--data.store", "store", "--run", "runs/teacher"),
    ],
}


def options(file):
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", file.read_text(), re.MULTILINE)
    assert len(lines) == file.read_text().count("\n#SBATCH"), "a line of another form"
    return dict(lines)


def job(file, folder, task=1, submitted=None):
    """Run a batch file as SLURM would, with programs that only say what they were given."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "activate").write_text("")
    said = folder / f"said{task}"
    for name, text in {"srun": 'exec "$@"', "pmixseg": f"printf '%s\\n' \"$@\" > {said}"}.items():
        program = folder / "bin" / name
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)
    asked = options(file)
    count = int(asked.get("array", "1-1").split("-")[1])
    slurm = {
        "SLURM_NNODES": asked.get("nodes", "1"),
        "SLURM_NTASKS_PER_NODE": asked.get("ntasks-per-node", "1"),
        "SLURM_CPUS_PER_TASK": asked["cpus-per-task"],
        "SLURM_ARRAY_TASK_ID": f"{task}",
        "SLURM_ARRAY_TASK_COUNT": "1",  # as for a job that is sent again alone
        "PMIXSEG_ENV": str(folder),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", str(file), *(submitted or SUBMITTED[file.stem])],
        env=slurm,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return said.read_text().splitlines(), count


@pytest.mark.parametrize("file", BATCH_FILES, ids=lambda file: file.stem)
def test_a_batch_file_has_flags_that_exist(file, tmp_path, checkpoint, monkeypatch):
    assert set(options(file)) <= OPTIONS
    words, _ = job(file, tmp_path)
    test_a_command_is_taken(words, checkpoint, monkeypatch)
    assert f"sbatch experiments/cluster/{file.name}" in file.read_text()


@pytest.mark.parametrize("name", ["prepare", "segment"])
def test_the_jobs_of_an_array_do_the_whole_cohort(name, tmp_path):
    file = ROOT / "experiments" / "cluster" / f"{name}.sbatch"
    _, count = job(file, tmp_path)
    parts = []
    for task in (1, 2, count):
        words, _ = job(file, tmp_path, task)
        parts.append(Share.parse(words[words.index("--part") + 1]))
    assert parts == [Share(1, count), Share(2, count), Share(count, count)]


def test_every_file_is_tried():
    assert {file.stem for file in BATCH_FILES} == set(SUBMITTED)


DOCKER = (ROOT / "Dockerfile").read_text()
APPTAINER = (ROOT / "pmixseg.def").read_text()
INSTALL = re.compile(r"-c (\S+) '\.\[([\w,]+)\]'")


def test_both_install_the_same_extras_from_the_same_stack():
    (docker,), (apptainer,) = INSTALL.findall(DOCKER), INSTALL.findall(APPTAINER)
    assert docker == apptainer
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(docker[1].split(",")) <= set(known)
    assert {"dicom", "preprocess"} <= set(docker[1].split(","))


def test_what_is_copied_is_there():
    docker = [
        name for line in re.findall(r"^COPY (.+) \S+$", DOCKER, re.M) for name in line.split()
    ]
    files = APPTAINER.partition("%files\n")[2].partition("\n\n")[0]
    apptainer = [line.split()[0] for line in files.splitlines()]
    assert sorted(docker) == sorted(apptainer)
    assert all((ROOT / name).exists() for name in docker)


def test_the_check_is_the_quickstart():
    assert 'pmixseg quickstart --out "$out"' in APPTAINER.partition("%test")[2]
    page = (ROOT / "docs" / "howto" / "container.md").read_text()
    assert "pmixseg quickstart" in page
    jobs = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "docker build -t pmixseg ." in jobs and "apptainer test pmixseg.sif" in jobs


def test_every_slow_test_is_run_by_one_part_of_the_weekly_job():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    (command,) = (step["run"] for step in jobs["slow"]["steps"] if "pytest" in step.get("run", ""))
    assert "-m slow" in command
    parts = [part["paths"].split() for part in jobs["slow"]["strategy"]["matrix"]["include"]]
    ignored = [word.removeprefix("--ignore=") for word in parts[-1] if word.startswith("--")]
    assert [word for word in parts[-1] if not word.startswith("--")] == ["tests", "pmixseg"]
    assert sorted(itertools.chain(*parts[:-1])) == sorted(ignored)
    assert all((ROOT / name).is_dir() for name in ignored)
