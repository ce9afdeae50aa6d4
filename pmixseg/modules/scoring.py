"""A network that is scored on whole cases: validation and test."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod

from pmixseg.data.patches import CaseItem
from pmixseg.data.training_cases import SeenCase, refusal_of_seen, scans_of, warn_of_seen
from pmixseg.describe import describe, find_class
from pmixseg.errors import InputError, count_of
from pmixseg.evaluation.prediction.cases import CasePrediction, Each, Rows, score_case
from pmixseg.evaluation.prediction.scoring import CaseRows, scorers
from pmixseg.evaluation.records.records import gather_rows
from pmixseg.evaluation.scores.case_scores import CaseMeans
from pmixseg.evaluation.scores.metrics import region_dice
from pmixseg.execution import static_on
from pmixseg.modules.network import SegmentationNetwork
from pmixseg.modules.payload import ENTRY
from pmixseg.modules.preparation import seen_cases
from pmixseg.modules.recording import Recording, results_folder
from pmixseg.modules.training.resuming import differences
from pmixseg.modules.training.trainer_checks import check_item, check_loaders
from pmixseg.old_paths import current_yaml
from pmixseg.task import Combination

EQUAL: Mapping[str, Any] = {"sync_dist": True, "reduce_fx": "max"}
"""How a number is logged that every process has alike: it stays the same, to the last bit."""


class ScoredNetwork(SegmentationNetwork):
    """Validate and test a network on whole cases, but never on cases that it was trained with.

    The arguments are those of :class:`~pmixseg.modules.base.SegmentationModule`.
    """

    force: bool = False
    """Whether cases that the model knows are scored all the same."""

    told: bool = False
    """Whether it was said in what the module is another than a checkpoint's, as by a command."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scores = CaseRows()
        self.seen: list[SeenCase] = []
        self._counted: tuple[str, tuple[str, ...]] = ("", ())
        self.validation_dice = CaseMeans([len(self.task.regions)])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in what this module is another than the one whose weights it takes."""
        super().on_load_checkpoint(checkpoint)
        if self.told or self._trainer is None:
            return
        stored, now = current_yaml(checkpoint[ENTRY]["init_args"]), describe(self.init_args)
        settings = type(self.evaluation).of(stored.get("evaluation"))
        stored["evaluation"], now["evaluation"] = describe(settings), describe(self.evaluation)
        if lines := differences(stored, now, where=type(self).__name__):
            (rank_zero_info if self.is_fitting else rank_zero_warn)(
                f"{'; '.join(lines)}: the module's own settings hold; pmixseg.load gives a module "
                "with those of the checkpoint."
            )

    @abstractmethod
    def validation_combinations(self, item: CaseItem) -> list[Combination]:
        """Return the combinations that a validation case is scored on, the same in every epoch."""

    def validation_step(self, item: CaseItem, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a whole case: Dice per region, the mean over several combinations."""
        self._check_case(item)
        scores = []
        for prediction in self.predict_item(item, self.validation_combinations(item)):
            classes = prediction.on_grid()
            dice = region_dice(classes, item["label"].to(classes.device), self.task)
            scores.append([dice[region] for region in self.task.regions])
        self.validation_dice.update(torch.tensor(scores).mean(0), item["case_id"])

    def on_validation_epoch_end(self) -> None:
        """Log ``val/dice`` and ``val/dice/<region>``, averaged over cases of all ranks."""
        if not self.validation_dice.update_called:
            return  # a subclass validates in its own way
        # torchmetrics hands the mean of one region back as a tensor without a dimension.
        means = self.validation_dice.compute().reshape(-1)
        self.validation_dice.reset()
        named = zip(self.task.regions, means, strict=True)
        self.log_dict({f"val/dice/{region}": dice for region, dice in named}, **EQUAL)
        self.log("val/dice", means.mean(), prog_bar=True, **EQUAL)

    @property
    def recording(self) -> Recording:
        """What a test leaves in the run's folder."""
        return Recording(results_folder(self.trainer), self.task, self.evaluation)

    def on_fit_start(self) -> None:
        """Say now, and not after the training, that its test part is known already."""
        data, cases = getattr(self.trainer, "datamodule", None), self.preparation.cases
        if cases is not None and cases.earlier:
            known = seen_cases(data, "test", self.preparation, ())
            warn_of_seen(known, "test", "no test will score them without --force")

    def on_validation_start(self) -> None:
        """Refuse cases that the model was trained on, unless :attr:`force` is set."""
        check_loaders(self.trainer, self.trainer.val_dataloaders)
        if self.trainer.state.fn == "validate":
            self._refuse_seen("val", ("training",))

    def on_test_start(self) -> None:
        """Refuse cases that the model was trained or selected with, unless :attr:`force` is set."""
        check_loaders(self.trainer, self.trainer.test_dataloaders)
        self._refuse_seen("test", ("training", "validation"))

    def on_predict_start(self) -> None:
        """Refuse loaders without their data module."""
        check_loaders(self.trainer, self.trainer.predict_dataloaders)

    def _refuse_seen(self, part: Literal["val", "test"], counted: tuple[str, ...]) -> None:
        data = getattr(self.trainer, "datamodule", None)
        self.seen, self._counted = [], (part, counted)
        if part == "test" and self.preparation.cases is None and self.identity is not None:
            rank_zero_warn(
                "this model does not say which cases it was trained on, so a test cannot refuse "
                "them; see that none of these are among them."
            )
        self._judge(seen_cases(data, part, self.preparation, counted))

    def _check_case(self, item: CaseItem) -> None:
        """Refuse what a loader of the user's own brings: no whole case, or one that is known."""
        check_item(self._trainer, item)
        cases = self.preparation.cases
        if self._trainer is None or self.trainer.state.fn == "fit" or cases is None:
            return
        if item["case_id"] not in [case.name for case in self.seen]:
            self._judge(cases.seen(scans_of([item["stored"]]), self._counted[1]))

    def _judge(self, seen: list[SeenCase]) -> None:
        self.seen += seen
        if seen and self.force:
            names = ", ".join(str(case) for case in seen[:5])
            scored = count_of(len(seen), "case is", "cases are")
            rank_zero_warn(f"{scored} scored that the model knows: {names}.")
        elif seen:
            raise InputError(refusal_of_seen(seen, self._counted[0]))

    def on_test_epoch_start(self) -> None:
        """Start with no records and no pictures of an earlier test."""
        self._scores = CaseRows(scorers(self.trainer.num_devices))
        self.recording.check_place()
        self.recording.forget_examples()

    def test_step(self, item: CaseItem, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a case on every combination of what was acquired, in its native grid."""
        self._check_case(item)
        if "label" not in item:
            rank_zero_warn(f"case '{item['case_id']}' has no label and is not scored.")
            return
        recording, settings = self.recording, self.evaluation

        def score(predictions: Iterable[CasePrediction], each: Each) -> Rows:
            if batch_idx < settings.examples:
                predictions = recording.keep_example(predictions, item)
            return score_case(predictions, item, self.task, settings, each)

        predictions = self.predict_item(item, self.test_combinations(item))
        device = item["image"].device
        self._scores.add(score, predictions, apart=static_on(device), device=device)

    @property
    def records(self) -> Rows:
        """Rows of the cases that were tested; see :func:`score_case`."""
        return self._scores.rows

    def on_test_epoch_end(self) -> None:
        """Write the records of all ranks and log ``test/dice`` and ``test/dice/<region>``."""
        rows = gather_rows(self.records)
        if not rows and type(self).test_step is not ScoredNetwork.test_step:
            return  # a subclass tests in its own way
        scores = self.recording.write(
            rows,
            self.identity,
            getattr(self.trainer, "datamodule", None),
            self.preparation,
            [case.name for case in self.seen],
        )
        self.log_dict(scores, **EQUAL)

    @_restricted_classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load as :func:`pmixseg.load` does, with its further arguments, what is of this class.

        Raises:
            InputError: see there; a model of another class; or an option of Lightning that would
                lose a part of the model, or let the file run code.
        """
        if hparams_file is not None or False in (strict, weights_only):
            raise InputError(
                "load_from_checkpoint takes no hparams_file, strict=False or weights_only=False: a "
                "checkpoint says how its model is made, is loaded whole, and runs no code; give "
                "arguments that are to change by name, and modules that you trust as modules=[...]."
            )
        if not cls.__module__.startswith("pmixseg."):  # whoever calls it here trusts it
            kwargs.setdefault("modules", [cls.__module__])
        load = find_class("pmixseg.load")  # which builds on this class, and is known only now
        module = load(checkpoint_path, map_location=map_location or "cpu", **kwargs)
        if not isinstance(module, cls):
            holds = f"{checkpoint_path} holds a {type(module).__name__}"
            raise InputError(f"{holds}, which is no {cls.__name__}; use pmixseg.load.")
        return module

    def test_combinations(self, item: CaseItem) -> list[Combination]:
        """Return every non-empty subset of the module's modalities that the case has."""
        acquired = self.acquired_names(item)
        return [c for c in self.task.combinations() if set(c) <= set(acquired)]
