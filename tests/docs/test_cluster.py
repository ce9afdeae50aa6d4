"""Clusters and images: options, commands and files that their recipes name are there."""

import os
import re
import subprocess
import tomllib

import pytest

from pmixseg.data.cohorts.shares import Share
from tests.docs import test_commands
from tests.docs.pages import ROOT

FILES = sorted((ROOT / "experiments" / "cluster").glob("*.sbatch"))
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


def job(file, folder, task=1):
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
        ["bash", str(file), *SUBMITTED[file.stem]], env=slurm, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return said.read_text().splitlines(), count


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_batch_file(file, tmp_path, checkpoint, monkeypatch):
    assert set(options(file)) <= OPTIONS
    words, _ = job(file, tmp_path)
    test_commands.test_a_command_is_taken(words, checkpoint, monkeypatch)
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
    assert {file.stem for file in FILES} == set(SUBMITTED)


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
