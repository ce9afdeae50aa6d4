"""The files of a published model: weights as safetensors, what they are as JSON, a model card.

``model.safetensors`` holds the tensors of the network, ``pmixseg.json`` the description that a
checkpoint holds as well, with the SHA-256 of the weights, and ``README.md`` the card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as packed
from torch import Tensor

from pmixseg.argument_checks import checked
from pmixseg.errors import InputError, explained
from pmixseg.files import file_hash, whole, write_text

DESCRIPTION = "pmixseg.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
FILES = (DESCRIPTION, WEIGHTS, CARD)

FORMAT = 1
"""Version of ``pmixseg.json``."""


@dataclass(frozen=True)
class PublishedModel:
    """Hold what ``pmixseg.json`` says of a published model.

    Args:
        description: the ``pmixseg`` entry of a checkpoint: class, arguments, task, spacing.
        sha256: of ``model.safetensors``, in hexadecimal digits.
        about: free facts: title, licence, citation, results.
    """

    description: Mapping[str, Any]
    sha256: str
    about: Mapping[str, Any]


def write_published(
    folder: Path,
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Any],
    about: Mapping[str, Any],
    card: str,
) -> Path:
    """Write the three files of a published model, each whole or not at all, ``pmixseg.json`` last.

    The folder is made if needed. ``description`` is the ``pmixseg`` entry of a checkpoint; it and
    ``about`` hold primitives only.
    """
    if not (folder / DESCRIPTION).exists():
        for there in filter(Path.exists, (folder / CARD, folder / WEIGHTS)):
            raise InputError(
                f"{there} is there already and of no published model, and would be replaced; "
                "choose another folder."
            )
    # safetensors refuses tensors that share memory or are views, so each is copied.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with whole(folder / WEIGHTS) as part:
        # Not save_file: its error of a full disk says neither which file nor what to do.
        part.write_bytes(packed(copies, metadata={"format": "pt"}))
    content = {
        "format": FORMAT,
        "sha256": file_hash(folder / WEIGHTS),
        "about": dict(about),
        "description": dict(description),
    }
    write_text(folder / CARD, card)
    write_text(folder / DESCRIPTION, json.dumps(content, indent=1) + "\n")
    return folder


def read_description(folder: Path) -> PublishedModel:
    """Read ``pmixseg.json``."""
    path = folder / DESCRIPTION
    with explained(f"{path} cannot be read", "give the folder that `pmixseg publish` wrote"):
        raw = json.loads(path.read_text(encoding="utf-8"))
    version = raw.get("format") if isinstance(raw, dict) else None
    if version != FORMAT:
        raise InputError(
            f"{path} has format {version!r}, this pmixseg reads {FORMAT}; update pmixseg."
        )
    description, sha256, about = (raw.get(key) for key in ("description", "sha256", "about"))
    fits = isinstance(description, dict) and isinstance(sha256, str) and isinstance(about, dict)
    if not fits:
        raise InputError(f"{path} does not describe a model; it is damaged.")
    return PublishedModel(description, sha256, about)


def check_weights(folder: Path) -> PublishedModel:
    """Compare the weights with the hash that the description states, and return this."""
    about, path = read_description(folder), folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{path} is missing; fetch or publish the model again.")
    if file_hash(path) != about.sha256:
        raise InputError(
            f"{path} is not the file that {DESCRIPTION} describes (its SHA-256 differs): it was "
            "changed or damaged; fetch it again."
        )
    return about


@checked
def read_published(folder: Path) -> dict[str, Any]:
    """Read a published model as the checkpoint that it was made from, less the optimizer.

    Returns:
        ``state_dict`` and ``pmixseg``, and what Lightning asks of a checkpoint.

    Raises:
        InputError: see :func:`check_weights`; or the weights are no safetensors.
    """
    about = check_weights(folder)
    with explained(f"{folder / WEIGHTS} cannot be read as safetensors", "fetch it again"):
        tensors = load_file(folder / WEIGHTS)
    return {
        "pytorch-lightning_version": "2.6.6",  # the format of what Lightning itself reads
        "epoch": 0,
        "global_step": 0,
        "state_dict": tensors,
        "pmixseg": dict(about.description),
    }
