"""The recipes of the images: they copy what is there, and install extras that exist, both alike."""

import re
import tomllib

from tests.docs.pages import ROOT

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
