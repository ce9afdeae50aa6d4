"""What a checkpoint says about itself, in primitives: enough to build the module and use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pmixseg.describe import describe
from pmixseg.errors import InputError
from pmixseg.modules.preparation import Preparation

if TYPE_CHECKING:
    from pmixseg.modules.base import SegmentationModule

FORMAT = 1
"""Version of the ``pmixseg`` entry of a checkpoint."""


def payload_of(module: SegmentationModule) -> dict[str, Any]:
    """The ``pmixseg`` entry of a checkpoint."""
    description = describe(module, type(module).__name__)
    description["init_args"].pop("task", None)
    ready = module.preparation
    return {
        "format": FORMAT,
        **description,
        "task": module.task.to_dict(),
        "spacing": None if ready.spacing is None else list(ready.spacing),
        "normalisation": ready.normalisation,
        "dtype": ready.dtype,
        "patch": None if ready.patch is None else list(ready.patch),
        "overlap": module.evaluation.overlap,
        "split": ready.split,
        "seed": None if ready.seed is None else dict(ready.seed),
        "fill_levels": module.fill_levels,
        "terms": sorted(module.terms),
    }


def preparation_of(payload: dict[str, Any]) -> Preparation:
    """Read the preparation back from a payload."""
    spacing, patch = payload["spacing"], payload["patch"]
    return Preparation(
        spacing=None if spacing is None else tuple(spacing),
        normalisation=payload["normalisation"],
        dtype=payload.get("dtype"),
        patch=None if patch is None else tuple(patch),
        split=payload.get("split"),
        seed=payload.get("seed"),
    )


def check_terms(module: SegmentationModule, checkpoint: dict[str, Any], *, fitting: bool) -> None:
    """Make the checkpoint's terms those of the module, and refuse one that does not fit it.

    Resuming needs exactly the same terms. Anything else (test, predict, plain loading) needs
    none: weights of terms that the module does not have are dropped from ``checkpoint``.

    Raises:
        InputError: the file is not ours; it is of another task or network, or its data had another
            spacing or normalisation; or a training is resumed with other terms.
    """
    payload = checkpoint.get("pmixseg")
    if payload is None:
        raise InputError(
            "this checkpoint was not written by pmixseg (it has no 'pmixseg' entry); "
            "import published weights with `pmixseg import`."
        )
    if payload["task"] != module.task.to_dict():
        raise InputError(
            f"the checkpoint belongs to the task '{payload['task']['name']}' with modalities "
            f"{payload['task']['modalities']}, not to this one ('{module.task.name}', "
            f"{list(module.task.modalities)}); use a checkpoint of this task."
        )
    stored, present = set(payload["terms"]), set(module.terms)
    if fitting and stored != present:
        raise InputError(
            f"the checkpoint was trained with the terms {sorted(stored)}, this training has "
            f"{sorted(present)}; resume with the same terms, or start anew with --init_from."
        )
    trained = preparation_of(payload)
    trained.refuse_other(module.preparation)
    state = checkpoint["state_dict"]
    foreign = [k for k in state if k.startswith("terms.") and k.split(".")[1] not in present]
    for key in foreign:
        del state[key]
    if not fitting:
        own = module.state_dict()
        state.update({k: v for k, v in own.items() if k.startswith("terms.") and k not in state})
        if module.preparation.normalisation is None:
            module.preparation = trained
        else:  # taken from the data to be tested on, which cannot know these
            module.preparation = replace(module.preparation, split=trained.split, seed=trained.seed)
    _check_weights(module, state)


def _check_weights(module: SegmentationModule, state: Mapping[str, Tensor]) -> None:
    own = module.state_dict()
    lost = [name for name in own if name not in state]
    foreign = [name for name in state if name not in own]
    other = [name for name in own if name in state and own[name].shape != state[name].shape]
    found = [f"it lacks {name}" for name in lost]
    found += [f"it has {name}, which is unknown here" for name in foreign]
    found += [
        f"{name} is {list(state[name].shape)} there and {list(own[name].shape)} here"
        for name in other
    ]
    if found:
        raise InputError(
            f"the checkpoint's weights do not fit this {type(module).__name__}: {found[0]} (and "
            f"{len(found) - 1} more); use the backbone that it was trained with."
        )
