"""Freed memory is kept by a command, and left alone where the user said otherwise."""

import os
import platform
import subprocess
import sys

import pytest

from pmixseg.cli.allocator import keep_freed_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

SCRIPT = r'''
import resource, sys
import torch
from pmixseg.cli.allocator import keep_freed_memory

def faults():
    """Page faults of writing one large block, median of several."""
    found = []
    for _ in range(15):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(48 << 20, dtype=torch.uint8).fill_(1)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return sorted(found)[7]

torch.set_num_threads(1)
plain = faults()
done = keep_freed_memory()
faults()
print(done, plain, faults())
'''
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_"))}


def test_the_same_pages_are_used_again():
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=CLEAN, capture_output=True, text=True, check=True)
    kept, before, after = done.stdout.split()
    assert kept == "True"
    # 48 MiB are 12288 pages of 4 KiB, or 24 huge ones of 2 MiB.
    assert int(before) >= 24
    assert int(after) < int(before) / 10


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_environment_has_the_last_word(name, monkeypatch):
    for told in set(os.environ) - set(CLEAN):
        monkeypatch.delenv(told)
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("malloc was told"))
    assert not keep_freed_memory()


def test_the_console_script_keeps_and_the_function_does_not(monkeypatch):
    from pmixseg import __main__, cli

    called = []
    monkeypatch.setattr("pmixseg.cli.allocator.keep_freed_memory", lambda: called.append("kept"))
    monkeypatch.setattr(cli, "main", lambda: called.append("run") or 0)
    assert __main__.main() == 0
    assert called == ["kept", "run"]
