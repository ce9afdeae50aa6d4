"""Fixtures that every room may use: a small phantom cohort and its store, made once."""

import os
from pathlib import Path

import pytest
import torch

from pmixseg.task import BRATS

SPACING = 5.0

# Rooms have a conftest each; as modules for doctests they would get into each other's way where
# several rooms are named in one call.
collect_ignore_glob = ["*/conftest.py"]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Two test processes on two cores must not fight, and sums must not depend on the machine."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture(scope="session")
def real_root() -> Path:
    """Seven BraTS 2021 cases, which are never copied into the project."""
    root = Path(__file__).parents[1] / "../shared/data/brats2021"
    if not root.is_dir():
        pytest.skip("needs the real scans in ../shared/data/brats2021")
    return root


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory) -> Path:
    """Eight synthetic cases at 5 mm."""
    from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort

    root = tmp_path_factory.mktemp("phantom")
    write_cohort(root, 8, seed=3, settings=PhantomSettings(spacing=SPACING))
    return root


@pytest.fixture(scope="session")
def phantom_store(phantom_root, tmp_path_factory) -> Path:
    """Their store."""
    from pmixseg.data.cohorts.layouts import find_cases
    from pmixseg.data.store.prepare import prepare

    out = tmp_path_factory.mktemp("store")
    report = prepare(find_cases(phantom_root, BRATS), out, BRATS, progress=False)
    assert not report.failed
    return out
