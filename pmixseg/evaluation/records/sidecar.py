"""The JSON file beside a table of results: task, conventions, checkpoint, versions."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pmixseg.argument_checks import check_fields
from pmixseg.describe import describe
from pmixseg.errors import InputError, explained
from pmixseg.files import file_hash
from pmixseg.task import Task
from pmixseg.version import __version__

FORMAT = 1
"""Version of the sidecar. 0 is a bare table without one, from any code."""

RECORDED_PACKAGES = ("torch", "lightning", "monai", "torchio", "numpy", "scipy")


@dataclass(frozen=True)
class Sidecar:
    """Everything a reader needs to know which results may be compared.

    Args:
        task: modalities, labels and regions.
        conventions: name -> value of every rule of the metrics (empty masks, percentile, ...).
        postprocess: names of what was done to predictions before scoring, in order.
        checkpoint: ``{"file": name, "sha256": hash}`` of the weights, if from a file.
        split: name of a published split, or hash of the lists of cases.
        part: which part of the split was scored, e.g. ``test``.
        part_size: number of cases of that part, scored or not; ``None``: not known.
        phantom: synthetic cases (True), patients (False), or not known.
        seen: cases that the model was trained or selected with, and that were scored by force.
        config: how the run was configured; primitives.
        versions: package -> version.
        git: ``{"commit": hash, "dirty": bool}`` of the working folder, if it is a checkout.
        created: ISO 8601, UTC.
        format: version of this schema.
    """

    task: Task
    conventions: Mapping[str, str | float | None] = field(default_factory=dict)
    postprocess: Sequence[str] = ()
    checkpoint: Mapping[str, str] | None = None
    split: str | None = None
    part: str | None = None
    part_size: int | None = None
    phantom: bool | None = None
    seen: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    git: Mapping[str, Any] | None = None
    created: str = ""
    format: int = FORMAT

    def __post_init__(self) -> None:
        check_fields(self)

    def stamped(self) -> Sidecar:
        """Return the same with versions, git state and time of now."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return replace(self, versions=_versions(), git=git_state(Path.cwd()), created=now)

    def differences(self, other: Sidecar) -> list[str]:
        """Name fields in which two sidecars differ although rows of one file must share them."""
        shared = ("task", "conventions", "postprocess", "checkpoint")
        mine, theirs = self.to_dict(), other.to_dict()
        return [name for name in shared if mine[name] != theirs[name]]

    def to_dict(self) -> dict[str, Any]:
        """Return primitives only, as written to JSON."""
        fields = describe(vars(self), "sidecar")
        return {"format": fields.pop("format"), **fields}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "sidecar") -> Sidecar:
        """Read what :meth:`to_dict` wrote, in this and every older format."""
        number = raw.get("format")
        if not isinstance(number, int) or not 0 <= number <= FORMAT:
            raise InputError(
                f"{where}: format {number!r} is not known to this version of pmixseg, which reads "
                f"0 to {FORMAT}; upgrade pmixseg."
            )
        # Older formats are brought up to date one by one; null means the default.
        content = dict(raw)
        for step in range(number, FORMAT):
            content = UPGRADES[step](content)
        filled = {n: content[n] for n in cls.__dataclass_fields__ if content.get(n) is not None}
        wrong = [n for n, k in _INSIDE.items() if any(not isinstance(v, k) for v in _at(filled, n))]
        if wrong:
            raise InputError(
                f"{where}: {', '.join(wrong)} cannot be read; restore the file or test again."
            )
        try:
            return cls(**{**filled, "task": Task.from_dict(content.get("task", {}))})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = str(error).rstrip(".")
            raise InputError(
                f"{where} cannot be read ({reason}); restore the file or test again."
            ) from error


_INSIDE: dict[str, Any] = {
    "checkpoint.file": str,
    "checkpoint.sha256": str,
    "config.evaluation": Mapping | None,
    "config.evaluation.temperatures": Mapping | None,
    "config.evaluation.temperatures.*": float | int,
    "git.commit": str,
}
"""What stands inside a field in JSON, beyond its annotation; an empty field has nothing inside."""


def _at(content: Mapping[str, Any], name: str) -> list[Any]:
    """Return the values at a dotted name, ``*`` being every key; none without such an entry."""
    outer, _, last = name.rpartition(".")
    holders = _at(content, outer) if outer else [content]
    inside = [holder for holder in holders if isinstance(holder, Mapping)]
    return [v for h in inside for k, v in h.items() if last in ("*", k)]


def _no_sidecar(raw: dict[str, Any]) -> dict[str, Any]:
    return {"conventions": {"source": "not stated"}, **raw, "format": 1}


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {0: _no_sidecar}
"""Format n -> function to format n + 1."""


def read_sidecar(path: Path) -> dict[str, Any]:
    """Return the raw JSON of one sidecar."""
    with explained(f"{path}: cannot be read as JSON", "test again"):
        raw = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise InputError(f"{path}: holds no JSON object; test again.")
    return raw


def checkpoint_identity(path: Path) -> dict[str, str]:
    """Return what :class:`Sidecar` keeps of a checkpoint: its name and hash."""
    return {"file": path.name, "sha256": file_hash(path)}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the checkout around ``folder``, and whether tracked files differ."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": dirty}


def _versions() -> dict[str, str]:
    versions = {name: version(name) for name in RECORDED_PACKAGES}
    return {"python": platform.python_version(), "pmixseg": __version__, **versions}
