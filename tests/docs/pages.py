"""The code blocks of a page: which are run, and how a whole page becomes one script.

A fence whose tag ends in ``run`` is run: ``bash run`` and ``python run`` are executed, and any
language with ``run file=NAME`` is written to that file. The blocks of a page share a folder and a
shell, so a variable that one block sets is known to the next.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+) run(?: file=(?P<file>\S+))? *\n"
    r"(?P<body>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)


def pages() -> list[Path]:
    """Pages with a block that is run."""
    return [page for page in sorted(DOCS.rglob("*.md")) if _FENCE.search(page.read_text())]


def script(text: str) -> str:
    """The blocks of a page as one shell script."""
    parts = ["set -euo pipefail"]
    for number, fence in enumerate(_FENCE.finditer(text), 1):
        indent = fence["indent"]
        lines = [line.removeprefix(indent) for line in fence["body"].splitlines()]
        body, end = "\n".join(lines), f"END_OF_BLOCK_{number}"
        parts.append(f'echo "+ block {number}" >&2')
        if fence["file"]:
            parts.append(f"cat > {fence['file']} <<'{end}'\n{body}\n{end}")
        elif fence["language"] == "python":
            parts.append(f"python <<'{end}'\n{body}\n{end}")
        else:
            parts.append(body)
    return "\n".join(parts) + "\n"


def run(commands: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a page's script in a folder that has the repository's ``experiments`` beside it."""
    (folder / "experiments").symlink_to(ROOT / "experiments")
    programs = folder / ".bin"
    programs.mkdir()
    for name, command in {
        "pmixseg": f'exec "{sys.executable}" -m pmixseg "$@"',
        "python": f'exec "{sys.executable}" "$@"',
        "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{command}\n")
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        ["bash", "-c", commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
