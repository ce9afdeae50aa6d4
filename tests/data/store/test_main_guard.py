"""A script without a main guard is told what it lacks, and not that memory does."""

import subprocess
import sys

SCRIPT = """
import sys, pmixseg
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.store.prepare import prepare
from pmixseg.task import BRATS
try:
    prepare(find_cases(sys.argv[1], BRATS), sys.argv[2], BRATS, workers=1, progress=False)
except pmixseg.InputError as error:
    print("SAID", error)
"""


def test_a_script_without_a_main_guard(phantom_root, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(phantom_root), str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "under `if __name__ == '__main__':`" in done.stdout.split("SAID")[-1], done.stderr
    assert "Traceback" not in done.stderr
