"""The base of every callback that adds a term to the training loss."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn

from pmixseg.describe import NOT_NEGATIVE, Described, Ranges
from pmixseg.errors import InputError
from pmixseg.losses.term import Term, TermWeight
from pmixseg.modules.base import SegmentationModule
from pmixseg.modules.training.optimization import active_terms, callbacks_of


class TermCallback(Callback, Described, ABC):
    """Add a term of your own to the training loss.

    A callback cannot change the loss once it is computed (``on_before_backward`` only sees it), so
    it builds a term in ``setup``, before optimizers exist, and the module's ``training_step``
    evaluates it. Override :meth:`build_term`.

    Args:
        name: key of the term in the log (``train/<name>``) and in the checkpoint.
        weight: factor of the term; 0 switches it off: nothing is built.
        start_epoch: first epoch with a weight above 0; before it the term is multiplied by 0.
        warmup_epochs: epochs over which the weight rises linearly.
    """

    ranges = Ranges(weight=NOT_NEGATIVE, start_epoch=NOT_NEGATIVE, warmup_epochs=NOT_NEGATIVE)

    optional: bool = False
    """Whether a weight of 0 is not warned of: on the command line it is the default."""

    def __init__(
        self, name: str, weight: float, start_epoch: int = 0, warmup_epochs: int = 0
    ) -> None:
        self.name = name
        self.weight = weight
        self.start_epoch = start_epoch
        self.warmup_epochs = warmup_epochs

    @property
    def active(self) -> bool:
        """Whether the callback adds its term."""
        return self.weight > 0

    @property
    def state_key(self) -> str:
        """One key per name, so that two callbacks of one class can stand side by side."""
        return f"{type(self).__qualname__}[{self.name}]"

    @abstractmethod
    def build_term(self, module: SegmentationModule) -> Term:
        """Build the term for a module; its parameters reach optimizer and checkpoint."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the term when a training starts.

        Raises:
            InputError: the module is not one of pmixseg, the name is taken, or a callback that
                copies the model's weights was set up before.
        """
        if stage != "fit":
            return
        if not self.active:
            if not self.optional:
                rank_zero_warn(
                    f"{self.name}.weight is 0, so this {type(self).__name__} does nothing; give it "
                    "a weight above 0, or leave it out."
                )
            return
        module = own_module(self, pl_module)
        self._check_neighbours(trainer)
        term = self.build_term(module)
        if not isinstance(term, Term):
            raise InputError(
                f"{type(self).__name__}.build_term made a {type(term).__name__}; let it return a "
                "pmixseg.losses.term.Term."
            )
        self.schedule = TermWeight(self.weight, self.start_epoch, self.warmup_epochs)
        module.add_term(self.name, term, self.schedule, of_callback=True)

    def _check_neighbours(self, trainer: Trainer) -> None:
        names = [c.name for c in active_terms(trainer) if isinstance(c, TermCallback)]
        if names.count(self.name) > 1:
            raise InputError(
                f"two terms are called '{self.name}'; leave one of the callbacks out, or give it "
                "another name."
            )
        refuse_averaging_before(self, trainer, "copy the model", "adds its parameters")


def own_module(callback: Callback, module: LightningModule) -> SegmentationModule:
    """Return a module as one of pmixseg, which a callback needs."""
    if not isinstance(module, SegmentationModule):
        raise InputError(
            f"{type(callback).__name__} needs a SegmentationModule, not a {type(module).__name__}; "
            "derive yours from TeacherModule or StudentModule."
        )
    return module


def refuse_averaging_before(callback: Callback, trainer: Trainer, would: str, does: str) -> None:
    """Refuse a callback that averages weights, and whose hooks run before those of another."""
    callbacks = callbacks_of(trainer, Callback)
    for other in callbacks[: callbacks.index(callback)]:
        if isinstance(other, WeightAveraging):
            raise InputError(
                f"{type(other).__name__} would {would} before {type(callback).__name__} {does}; "
                "list it after."
            )
