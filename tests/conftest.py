"""Fixtures that every folder may use: a small phantom cohort and its store, made once."""

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

# Processes that tests start read the compiled package instead of compiling it anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# On a machine that others use a call may take any time.
settings.register_profile("any time", deadline=None)
settings.load_profile("any time")

SPACING = 6.0

# Folders have a conftest each; as modules for doctests they would get into each other's way where
# several folders are named in one call.
collect_ignore_glob = ["*/conftest.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """What was imported stays; the garbage collector need not walk through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_process():
    """Give back what a training changes in its process.

    Lightning ignores Ctrl-C after a training that was stopped, and leaves variables that tell the
    next one which rank it is.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    variables = dict(os.environ)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if dict(os.environ) != variables:
        os.environ.clear()
        os.environ.update(variables)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Two test processes on two cores must not fight, and sums must not depend on the machine."""
    import numpy  # noqa: F401  # its BLAS and SciPy's are to be loaded
    import scipy.linalg  # noqa: F401
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture(scope="session", autouse=True)
def one_sanity_step():
    """A Trainer that is not told otherwise validates one case before a training, not two."""
    os.environ.setdefault("PL_TRAINER_NUM_SANITY_VAL_STEPS", "1")


@pytest.fixture(scope="session")
def real_root() -> Path:
    """Seven BraTS 2021 cases, which are never copied into the project."""
    root = Path(__file__).parents[1] / "../shared/data/brats2021"
    if not root.is_dir():
        pytest.skip("needs the real scans in ../shared/data/brats2021")
    return root


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that whichever test process comes first has made; nobody changes it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            part = folder.with_suffix(".part")
            make(part)
            part.rename(folder)
    return folder


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory) -> Path:
    """Eight synthetic cases, as coarse as they can be."""
    from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort

    def make(root: Path) -> None:
        write_cohort(root, 8, seed=3, settings=PhantomSettings(spacing=SPACING))

    return made_once(tmp_path_factory, "phantom", make)


@pytest.fixture(scope="session")
def phantom_store(phantom_root, tmp_path_factory) -> Path:
    """Their store."""
    from pmixseg.data.cohorts.layouts import find_cases
    from pmixseg.data.store.prepare import prepare
    from pmixseg.task import BRATS

    def make(out: Path) -> None:
        cases = find_cases(phantom_root, BRATS)
        assert not prepare(cases, out, BRATS, progress=False).failed

    return made_once(tmp_path_factory, "store", make)
