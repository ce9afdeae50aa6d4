"""Workers end with this process, and one that is killed is told in a sentence."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import pmixseg
from pmixseg.errors import InputError
from pmixseg.workers import _interrupted_later, results


def square(folder, number):
    """The square; 0 takes until it is interrupted, and a negative number kills the process."""
    if number < 0:
        os._exit(9)
    begun = folder / f"begun-{number}"
    try:
        begun.touch()  # whoever sees it may stop this process at once
        if number == 0:
            time.sleep(250)
    finally:
        begun.rename(folder / f"cleared-{number}")
    return number**2


@pytest.mark.parametrize("workers", [-1, 0, 2])
def test_results_do_not_depend_on_who_works(tmp_path, workers):
    done = dict(results(partial(square, tmp_path), [1, 2, 3], workers, where="s"))
    assert done == {1: 1, 2: 4, 3: 9}


def test_workers_of_a_call_that_is_left_clear_up_and_begin_nothing(tmp_path):
    made = results(partial(square, tmp_path), [0, 1, 2, 0, 3, 4], 2, where="s")
    first, _ = next(made)
    assert first in (1, 2)
    while len(list(tmp_path.glob("*-0"))) < 1:
        time.sleep(0.01)
    made.close()  # as an error or Ctrl-C in its caller does
    assert not list(tmp_path.glob("begun-*"))
    assert not (tmp_path / "cleared-4").exists()


@pytest.mark.parametrize(("items", "told"), [([-1], "before the first case"), ([5, 6, -1], None)])
def test_a_killed_worker_is_told(tmp_path, items, told):
    with pytest.raises(InputError, match=r"^here: .*fewer workers") as error:
        list(results(partial(square, tmp_path), items, 1, where="here"))
    assert (told or "a worker process was killed") in str(error.value)


def test_nobody_makes_processes_of_another_kind():
    users = [
        path.name
        for path in Path(pmixseg.__file__).parent.rglob("*.py")
        if "ProcessPoolExecutor" in path.read_text(encoding="utf-8")
    ]
    assert users == ["workers.py"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_pool_is_made(number):
    heard = []
    before = signal.signal(number, lambda *_: heard.append(number))
    try:
        with _interrupted_later():
            signal.raise_signal(number)
            assert not heard
        assert heard == [number]
        signal.raise_signal(number)
        assert heard == [number] * 2
    finally:
        signal.signal(number, before)


def threads_of_blas(matrix):
    matrix @ matrix
    return [part["num_threads"] for part in threadpool_info() if part["user_api"] == "blas"]


@pytest.mark.parametrize("workers", [0, 1])
def test_whoever_works_has_one_thread(monkeypatch, workers):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with threadpool_limits(2):
        ((_, threads),) = results(threads_of_blas, [np.eye(2)], workers, where="here")
        assert set(threads) == {1}
        assert 2 in threads_of_blas(np.eye(2))  # this process as it was


@pytest.mark.parametrize(
    "error",
    [RuntimeError("can't start new thread"), BlockingIOError(11, "unavailable"), EOFError()],
)
def test_a_system_that_starts_no_more_processes_is_told(monkeypatch, tmp_path, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(ProcessPoolExecutor, "submit", refuse)
    with pytest.raises(InputError, match=r"starts no more processes .*ulimit -u"):
        list(results(partial(square, tmp_path), [1], 2, where="here"))


def test_a_process_of_a_script_is_joined_before_its_server_ends(tmp_path):
    (tmp_path / "script.py").write_text(
        "import pathlib, time\nfrom pmixseg.workers import start_server\n\n"
        "def child():\n    time.sleep(0.5)\n    pathlib.Path('done').touch()\n\n"
        "if __name__ == '__main__':\n    start_server([]).Process(target=child).start()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(pmixseg.__file__).parents[1])}
    command = [sys.executable, "script.py"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "done").exists()
