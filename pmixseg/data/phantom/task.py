"""Plan a phantom cohort for any task: its contrasts, and the layout to read it with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from pmixseg.data.phantom.cohort import LABEL_CODES
from pmixseg.data.phantom.contrast import CONTRASTS, Contrast
from pmixseg.errors import InputError, explained
from pmixseg.files import write_text
from pmixseg.task import Task

LAYOUT_FILE = "layout.yaml"
"""Written beside the cases; ``pmixseg prepare --layout`` takes it."""


def read_contrasts(path: Path | None) -> dict[str, Contrast]:
    """Read contrasts (name -> :class:`~pmixseg.data.phantom.contrast.Contrast`) of a YAML file."""
    if path is None:
        return {}
    form = f"give name: {{wm: …, gm: …, csf: …}}, as the built-in {sorted(CONTRASTS)} have them"
    with explained(f"{path} does not hold contrasts", form):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {str(name): Contrast(**fields) for name, fields in raw.items()}


def label_codes(task: Task, labels: Mapping[str, str]) -> dict[str, int]:
    """Return the number in the phantom's label files of each label of a task.

    ``labels`` maps labels to tissues (NCR, ED or ET); one that bears a tissue's name needs no
    entry.
    """
    tissue = {label: labels.get(label, label) for label in task.labels}
    wrong = [label for label, name in tissue.items() if name not in LABEL_CODES]
    wrong += [label for label in labels if label not in task.labels]
    if wrong or len(set(tissue.values())) < len(tissue):
        raise InputError(
            f"phantom: the labels {list(task.labels)} of task '{task.name}' must each be one of "
            f"the tissues {list(LABEL_CODES)}; say which with --labels LABEL=TISSUE "
            f"({', '.join(wrong) or 'one tissue is named twice'})."
        )
    return {label: LABEL_CODES[name] for label, name in tissue.items()}


def write_layout(out: Path, task: Task, codes: Mapping[str, int]) -> Path:
    """Write the layout file of a phantom cohort; numbers of other tissues become background."""
    stem = "{grade}/{case}/{case}_"
    layout = {
        "name": "phantom",
        "images": {m: f"{stem}{m}.nii.gz" for m in task.modalities},
        "label": f"{stem}seg.nii.gz",
        "codes": dict(codes),
        "ignored": [code for code in LABEL_CODES.values() if code not in codes.values()],
    }
    return write_text(out / LAYOUT_FILE, yaml.safe_dump(layout, sort_keys=False))
