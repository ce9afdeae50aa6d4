"""The description inside a checkpoint: all that is needed to rebuild the module and use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pmixseg.argument_checks import check_fields
from pmixseg.describe import NOT_NEGATIVE, Ranges, describe
from pmixseg.errors import InputError, count_of
from pmixseg.modules.preparation import Preparation
from pmixseg.task import Task
from pmixseg.types import kind_of

ENTRY = "pmixseg"
"""Where a checkpoint holds the description."""

TOLD = "told"
"""Entry beside weights from another process: what its checkpoint would say of them."""

FORMAT = 1
"""Version of the description."""

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Payload:
    """Describe a trained model in primitives: the ``pmixseg`` entry of its checkpoint.

    Args:
        class_path: public path of the module's class.
        init_args: its arguments, without the task.
        task: modalities, labels and regions.
        preparation: of the training data.
        overlap: of inference windows.
        terms: names of the loss terms that the training had.
        fill_levels: levels that are filled; ``None``: all.
    """

    ranges = Ranges(fill_levels=NOT_NEGATIVE)

    class_path: str
    init_args: Mapping[str, Any]
    task: Task
    preparation: Preparation
    overlap: float
    terms: tuple[str, ...] = ()
    fill_levels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """Return primitives only."""
        fields = describe(vars(self), "checkpoint")
        return {"format": FORMAT, **fields.pop("preparation"), **fields}

    @classmethod
    def from_dict(cls, raw: Any, where: str = "the checkpoint") -> Payload:
        """Read what :meth:`to_dict` wrote; what older versions did not write is not known."""
        if raw is None:
            raise InputError(
                f"{where} was not written by pmixseg (it has no 'pmixseg' entry); import "
                "published weights with `pmixseg import`."
            )
        if not isinstance(raw, Mapping):
            raise InputError(f"{where} does not describe a model and its task; it is damaged.")
        version = raw.get("format")
        if version != FORMAT:
            raise InputError(
                f"{where} has checkpoint format {version}, this version of pmixseg reads {FORMAT}; "
                "update pmixseg."
            )
        try:
            task = Task.from_dict(raw["task"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{where} has no task that can be read; it is damaged.") from error
        preparation = Preparation.from_dict(raw, where)
        # Older versions wrote neither of the lists.
        names = ("class_path", "init_args", "overlap", "terms", "fill_levels")
        known: dict[str, Any] = {"terms": ()} | {n: raw[n] for n in names if n in raw}
        try:
            return cls(task=task, preparation=preparation, **known)
        except (InputError, TypeError) as error:
            raise InputError(
                f"{where} does not describe a model and its task; it is damaged."
            ) from error

    def refuse_other_task(self, task: Task) -> None:
        """Refuse a task that the model was not trained for."""
        if self.task.to_dict() != task.to_dict():
            raise InputError(
                f"the checkpoint belongs to the task '{self.task.name}' with modalities "
                f"{list(self.task.modalities)}, not to this one ('{task.name}', "
                f"{list(task.modalities)}); use a checkpoint of this task."
            )

    def refuse_other_terms(self, terms: Iterable[str]) -> None:
        """Refuse to resume a training with other terms than it had."""
        if set(self.terms) != set(terms):
            raise InputError(
                f"the checkpoint was trained with the terms {sorted(self.terms)}, this training "
                f"has {sorted(terms)}; resume with the same terms, or start anew with its weights "
                "alone (--init_from; in Python fit what pmixseg.load returns)."
            )


def weights_of(checkpoint: Mapping[str, Any], where: str = "the checkpoint") -> Weights:
    """Return the weights that a checkpoint holds."""
    state = checkpoint.get("state_dict")
    tensors = isinstance(state, Mapping) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    )
    if not tensors:
        raise InputError(f"{where} holds no weights; it is damaged.")
    assert isinstance(state, Mapping)
    return state


def weights_for(
    own: Weights, saved: Weights, terms: Iterable[str], name: str, *, fitting: bool
) -> dict[str, Tensor]:
    """Return the weights of a checkpoint that belong into a network.

    Weights of terms that the network does not have are left out. Its own terms keep what the
    checkpoint does not have of them, unless a training is resumed.

    Raises:
        InputError: it is the state of another network, or not finite.
    """
    kept = set(terms)
    state = {
        key: value
        for key, value in saved.items()
        if not key.startswith("terms.") or key.split(".")[1] in kept
    }
    if not fitting:
        state |= {k: v for k, v in own.items() if k.startswith("terms.") and k not in state}
    refuse_other_weights(own, state, name)
    refuse_infinite(state)
    return state


def refuse_other_weights(own: Weights, state: Weights, name: str) -> None:
    """Refuse weights whose names, shapes or kinds of numbers are those of another network."""
    faults = [f"it lacks {key}" for key in own if key not in state]
    faults += [f"it has {key}, which is unknown here" for key in state if key not in own]
    both = [(key, state[key], own[key]) for key in own if key in state]
    faults += [
        f"{key} is {kind_of(there)} there and {kind_of(here)} here"
        for key, there, here in both
        if there.shape != here.shape or here.is_floating_point() > there.is_floating_point()
    ]
    if faults:
        raise InputError(
            f"the checkpoint's weights do not fit this {name}: {faults[0]} (and {len(faults) - 1} "
            "more); use the backbone that it was trained with."
        )


def refuse_infinite(state: Weights) -> None:
    """Refuse weights that hold NaN or infinity."""
    broken = [k for k, v in state.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if broken:
        raise InputError(
            "the checkpoint holds weights that are not finite, in "
            f"{count_of(len(broken), 'tensor')} ({', '.join(broken[:3])}): the training diverged, "
            "or the file was damaged; use a checkpoint of an earlier epoch."
        )
