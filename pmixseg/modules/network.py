"""A backbone with its fill policy: predicts any combination, validates, tests."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from pmixseg.backbones.base import Backbone
from pmixseg.backbones.unet import MultiEncoderUNet
from pmixseg.data.missing import MissingnessSampler, UniformCombinations
from pmixseg.data.patches import CaseItem
from pmixseg.data.scans.canonical import NORMALISATION, STORE_DTYPE
from pmixseg.data.scans.nifti import Source
from pmixseg.data.training_cases import SeenCase, say_seen
from pmixseg.describe import Described, build, describe
from pmixseg.errors import InputError
from pmixseg.eval_mode import evaluating
from pmixseg.evaluation.prediction.cases import (
    CasePrediction,
    EvaluationSettings,
    predict_case,
    score_case,
)
from pmixseg.evaluation.prediction.postprocess import check_steps
from pmixseg.evaluation.prediction.scans import Recipe, SegmentSettings, segment_scans
from pmixseg.evaluation.prediction.scoring import CaseRows
from pmixseg.evaluation.prediction.segmentation import Segmentation
from pmixseg.evaluation.scores.case_scores import CaseMeans
from pmixseg.evaluation.scores.metrics import region_dice
from pmixseg.execution import static_on
from pmixseg.losses.anchors import Anchor, MixtureAnchor
from pmixseg.modules.fill import fill_with_anchor
from pmixseg.modules.preparation import Preparation, seen_cases
from pmixseg.modules.recording import Recording, warn_without_label
from pmixseg.modules.training.compilation import Compile
from pmixseg.modules.training.trainer_checks import check_machine
from pmixseg.plurals import count_of
from pmixseg.task import Combination, Task
from pmixseg.types import Image, Latents, Presence, SegOutput


class SegmentationNetwork(LightningModule, Described):
    """Everything of a module but its training.

    Args:
        task: see :class:`~pmixseg.modules.base.SegmentationModule`, as for all arguments.
        backbone: see there.
        fill: see there.
        anchor: see there.
        fill_levels: see there.
        sampler: see there.
        evaluation: see there.
        compile: see there.
    """

    def __init__(
        self,
        task: Task,
        backbone: Backbone | None,
        fill: Literal["zero", "anchor"] | None,
        anchor: Anchor | None,
        fill_levels: Sequence[int] | None,
        sampler: MissingnessSampler | None,
        evaluation: EvaluationSettings | None,
        compile: Compile,
    ) -> None:
        super().__init__()
        self.task = Task.from_dict(task) if isinstance(task, Mapping) else task
        describe(self.init_args, type(self).__name__)  # refuse now what no checkpoint could hold
        self.modalities: tuple[str, ...] = self.select_modalities()
        self.backbone = self._fit_backbone(build(backbone))
        self.fill = fill or self._default_fill()
        self.fill_levels = None if fill_levels is None else list(fill_levels)
        self._levels_follow = fill_levels is None
        self.anchor = self._make_anchor(build(anchor))
        self.sampler: MissingnessSampler = build(sampler) or UniformCombinations()
        self.evaluation = EvaluationSettings.of(evaluation)
        check_steps(self.evaluation.postprocess, self.task)  # not after a training, in its test
        self.preparation = Preparation()
        self.loaded_from: str | None = None
        self._scores = CaseRows()
        self.force = False
        self.seen: list[SeenCase] = []
        self.validation_dice = CaseMeans([len(self.task.regions)])
        self.compile_setting: Compile = compile
        self._compiled: tuple[Callable[..., Latents], Callable[..., SegOutput]] | None = None
        if compile is True:
            # A compiled backbone would be bypassed: encode and decode are called, not forward.
            # Patches and windows have one size each: symbolic ones only let inductor fail.
            self._compiled = (
                torch.compile(self.backbone.encode, dynamic=False),
                torch.compile(self.backbone.decode, dynamic=False),
            )

    # ---------------------------------------------------------------- construction

    def select_modalities(self) -> tuple[str, ...]:
        """Modalities that the network has inputs for; all of the task by default."""
        return self.task.modalities

    def build_backbone(self) -> Backbone:
        """The network; override to plug in one of your own."""
        return MultiEncoderUNet(modalities=self.modalities, num_classes=self.task.num_classes)

    def _fit_backbone(self, given: Backbone | None) -> Backbone:
        wanted = {"modalities": list(self.modalities), "num_classes": self.task.num_classes}
        net = self.build_backbone() if given is None else given
        if (net.modalities, net.num_classes) == (self.modalities, self.task.num_classes):
            return net
        if given is None:
            raise InputError(
                f"{type(self).__name__}.build_backbone made a network for {list(net.modalities)} "
                f"and {net.num_classes} classes, but the task needs {wanted}; use self.modalities "
                "and self.task.num_classes there."
            )
        description = describe(given, "backbone")
        description["init_args"].update(wanted)
        fitted: Backbone = build(description)
        return fitted

    def _default_fill(self) -> Literal["zero", "anchor"]:
        several = len(self.backbone.slots) > 1 and self.shows_subsets
        return "anchor" if several and self.backbone.fillable else "zero"

    def _make_anchor(self, given: Anchor | None) -> Anchor | None:
        if given is None and self.fill == "zero":
            return None
        anchor = given if given is not None else MixtureAnchor()
        if self.fill == "anchor" and not anchor.can_fill:
            raise InputError(
                f"{type(anchor).__name__} has no features to fill a slot with; use fill: zero or "
                "a mixture or single-modality anchor."
            )
        anchor.bind(self.backbone.slots, len(self.backbone.channels))
        return anchor

    def follow_levels(self, levels: Sequence[int] | None) -> None:
        """Fill these levels where the user has named none; the checkpoint then names them.

        Args:
            levels: numbers from 0, the finest; ``None`` fills all.
        """
        if self._levels_follow:
            self.fill_levels = None if levels is None else list(levels)

    # ---------------------------------------------------------------- predictor protocol

    @property
    def num_classes(self) -> int:
        """Softmax classes, background included."""
        return self.task.num_classes

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the backbone's levels, finest first."""
        return self.backbone.strides

    @property
    def shares_encoding(self) -> bool:
        """Whether one encoding serves every combination."""
        return self.backbone.shares_encoding

    @property
    def shows_subsets(self) -> bool:
        """Whether training shows the network less than it has inputs for."""
        return True

    def encode(self, image: Image, present: Presence) -> Latents:
        """Raw latents of the present modalities; columns are ``self.modalities``."""
        return self._encode(image, present)

    # The plain functions where a compiler already traces what calls them.
    def _encode(self, image: Image, present: Presence) -> Latents:
        if self._compiled is None or torch.compiler.is_compiling():
            return self.backbone.encode(image, present)
        return self._compiled[0](image, present)

    def _decode(self, latents: Latents) -> SegOutput:
        if self._compiled is None or torch.compiler.is_compiling():
            return self.backbone.decode(latents)
        return self._compiled[1](latents)

    def decode(self, latents: Latents) -> SegOutput:
        """Fill absent slots as trained, decode; the output carries the latents before the fill."""
        ready = latents
        if self.fill == "anchor" and self.anchor is not None:
            ready = fill_with_anchor(latents, self.anchor, self.fill_levels)
        return replace(self._decode(ready), latents=latents)

    def forward(self, image: Image, present: Presence) -> SegOutput:
        """``decode(encode(image, present))``."""
        return self.decode(self.encode(image, present))

    def columns(self, of_task: Tensor) -> Tensor:
        """Return the columns of this module's modalities, in the order of its slots.

        Args:
            of_task: ``[B, M, ...]``, one column per modality of the task.
        """
        if self.modalities == self.task.modalities:
            return of_task
        # Not by a list of numbers: a GPU would wait for them.
        own = [of_task[:, self.task.modalities.index(m)] for m in self.modalities]
        return torch.stack(own, 1)

    # ---------------------------------------------------------------- validation, test, predict

    def setup(self, stage: str) -> None:
        """Take spacing, normalisation and patch from the data; compare them with a checkpoint's.

        Raises:
            InputError: a precision or strategy of the trainer that would change the model.
        """
        check_machine(self.trainer)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            self.preparation = self.preparation.merge(data, self.evaluation, fitting=stage == "fit")

    @abstractmethod
    def validation_combinations(self, item: CaseItem) -> list[Combination]:
        """Return the combinations that a validation case is scored on, the same in every epoch."""

    def validation_step(self, item: CaseItem, batch_idx: int) -> None:
        """Score a whole case: Dice per region, the mean over several combinations."""
        scores = []
        for prediction in self.predict_item(item, self.validation_combinations(item)):
            classes = prediction.on_grid()
            dice = region_dice(classes, item["label"].to(classes.device), self.task)
            scores.append([dice[region] for region in self.task.regions])
        self.validation_dice.update(torch.tensor(scores).mean(0), item["case_id"])

    def on_validation_epoch_end(self) -> None:
        """Log ``val/dice`` and ``val/dice/<region>``, averaged over cases of all ranks."""
        # torchmetrics hands the mean of one region back as a tensor without a dimension.
        means = self.validation_dice.compute().reshape(-1)
        self.validation_dice.reset()
        named = zip(self.task.regions, means, strict=True)
        self.log_dict({f"val/dice/{region}": dice for region, dice in named})
        self.log("val/dice", means.mean(), prog_bar=True)

    @property
    def recording(self) -> Recording:
        """What a test leaves in the trainer's folder."""
        return Recording(Path(self.trainer.default_root_dir), self.task, self.evaluation)

    def on_validation_start(self) -> None:
        """Refuse to validate on cases that the model was trained on.

        Raises:
            InputError: there are such cases, and :attr:`force` is not set.
        """
        if self.trainer.state.fn == "validate":
            self._refuse_seen("val", ("training",))

    def on_test_start(self) -> None:
        """Refuse to test on cases that the model was trained or selected with.

        Raises:
            InputError: there are such cases, and :attr:`force` is not set.
        """
        self._refuse_seen("test", ("training", "validation"))

    def _refuse_seen(self, part: Literal["val", "test"], counted: tuple[str, ...]) -> None:
        data = getattr(self.trainer, "datamodule", None)
        self.seen = seen_cases(data, part, self.preparation, counted)
        if self.seen and self.force:
            names = ", ".join(str(case) for case in self.seen[:5])
            scored = count_of(len(self.seen), "case is", "cases are")
            rank_zero_warn(f"{scored} scored that the model knows: {names}.")
        elif self.seen:
            raise InputError(say_seen(self.seen, part))

    def on_test_epoch_start(self) -> None:
        """Start with no records and no pictures of an earlier test."""
        self._scores = CaseRows()
        self.recording.check_place()
        self.recording.forget_examples()

    def test_step(self, item: CaseItem, batch_idx: int) -> None:
        """Score a case on every combination of what was acquired, in its native grid."""
        if "label" not in item:
            warn_without_label(item)
            return
        recording, settings = self.recording, self.evaluation

        def score(predictions: Iterable[CasePrediction]) -> list[dict[str, Any]]:
            if batch_idx < settings.examples:
                predictions = recording.keep_example(predictions, item)
            return score_case(predictions, item, settings)

        predictions = self.predict_item(item, self.test_combinations(item))
        self._scores.add(score, predictions, apart=static_on(item["image"].device))

    @property
    def records(self) -> list[dict[str, Any]]:
        """Rows of the cases that were tested; see :func:`score_case`."""
        return self._scores.rows

    def on_test_epoch_end(self) -> None:
        """Write the records of all ranks and log ``test/dice`` and ``test/dice/<region>``."""
        source = self.trainer.ckpt_path or self.loaded_from
        split = getattr(getattr(self.trainer, "datamodule", None), "split_name", None)
        scores = self.recording.write(
            self.records, source, split, self.preparation, [case.name for case in self.seen]
        )
        self.log_dict(scores)

    def test_combinations(self, item: CaseItem) -> list[Combination]:
        """Every non-empty subset of the module's modalities that the case has."""
        acquired = self.acquired_names(item)
        return [c for c in self.task.combinations() if set(c) <= set(acquired)]

    def acquired_names(self, item: CaseItem) -> Combination:
        """What the case has of the module's modalities.

        Raises:
            InputError: none of them.
        """
        flags = dict(zip(self.task.modalities, item["acquired"].tolist(), strict=True))
        names = tuple(m for m in self.modalities if flags[m])
        if not names:
            raise InputError(
                f"case '{item['case_id']}' has none of {list(self.modalities)}, which this model "
                "needs; leave it out of the split."
            )
        return names

    def predict_step(self, item: CaseItem, batch_idx: int) -> CasePrediction:
        """Segment a case from everything that was acquired."""
        return next(iter(self.predict_item(item, [self.acquired_names(item)])))

    def predict_item(
        self, item: CaseItem, combinations: Sequence[Combination]
    ) -> Iterator[CasePrediction]:
        """Iterate over one prediction per combination."""
        image = self.columns(item["image"].unsqueeze(0))[0]
        geometry = item["stored"].geometry
        settings = self._of_one_shape(self.evaluation)
        window = self.preparation.window(settings, self.strides)
        return predict_case(self, image, geometry, self.task, combinations, window, settings)

    def _of_one_shape(self, settings: EvaluationSettings) -> EvaluationSettings:
        """Windows one by one where each other number of them would be compiled anew."""
        if self._compiled is None or settings.batch_size != "auto":
            return settings
        return replace(settings, batch_size=1)

    def segment(
        self,
        images: Mapping[str, Source],
        settings: SegmentSettings | None = None,
        *,
        codes: Mapping[str, int] | None = None,
        name: str = "scan",
        progress: Callable[[int, int], None] | None = None,
    ) -> Segmentation:
        """Segment one patient from whatever scans there are; nothing needs preparing.

        Example: ``pmixseg.load("best.ckpt").segment({"flair": "f.nii.gz", "t1": "t1.nii.gz"})``.

        Args:
            images: modality -> NIfTI file, (4-D file, channel), or nibabel image; any subset of
                the model's modalities, in any orientation and spacing.
            settings: mirroring, overlap, precision and what to refuse.
            codes: label name -> number in the result; by default the class index.
            name: of the case, for messages and file names.
            progress: called with (windows done, windows in all).

        Raises:
            InputError: see :func:`pmixseg.evaluation.prediction.scans.segment_scans`.
        """
        settings = settings or SegmentSettings()
        evaluation = self._of_one_shape(settings.over(self.evaluation))
        recipe = Recipe(
            self.task,
            self.preparation.window(evaluation, self.strides),
            evaluation,
            self.preparation.target_spacing(),
            self.preparation.dtype or STORE_DTYPE,
            self.preparation.normalisation or NORMALISATION,
            self.device,
            self.loaded_from,
        )
        with evaluating(self):
            return segment_scans(
                self, recipe, images, settings, codes=codes, name=name, progress=progress
            )
