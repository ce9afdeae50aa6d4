"""A backbone with its fill: the part of a module that a checkpoint holds and that predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from pmixseg.argument_checks import checked
from pmixseg.backbones.base import Backbone
from pmixseg.backbones.unet import MultiEncoderUNet
from pmixseg.borrowed import evaluating
from pmixseg.data.formats.nifti import Source
from pmixseg.data.missing import MissingnessSampler, UniformCombinations
from pmixseg.data.patches import CaseItem
from pmixseg.describe import Described, build, describe
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import (
    CasePrediction,
    EvaluationSettings,
    predict_case,
)
from pmixseg.evaluation.prediction.postprocess import check_steps
from pmixseg.evaluation.prediction.scans import SegmentSettings, segment_scans
from pmixseg.evaluation.prediction.segmentation import Segmentation
from pmixseg.evaluation.records.sidecar import checkpoint_identity
from pmixseg.losses.anchors import Anchor
from pmixseg.losses.term import Term
from pmixseg.modules.fill import Fill, default_fill, fill_with_anchor, fitting_anchor, known_levels
from pmixseg.modules.payload import ENTRY, TOLD, Payload, weights_for, weights_of
from pmixseg.modules.preparation import Preparation
from pmixseg.modules.training.compilation import Compile, compiled
from pmixseg.modules.training.trainer_checks import check_dtype, check_item, check_stage, check_task
from pmixseg.task import Combination, Task
from pmixseg.types import Image, Latents, Presence, SegOutput


class SegmentationNetwork(LightningModule, Described):
    """Predict every combination of modalities, and say in a checkpoint how it was made.

    What :func:`pmixseg.load` needs. :class:`~pmixseg.modules.scoring.ScoredNetwork` adds validation
    and test, :class:`~pmixseg.modules.base.SegmentationModule` training; the arguments are its.
    """

    terms: MutableMapping[str, Term]
    """Terms of the training's loss, by name, in a ``ModuleDict``: a checkpoint names them."""

    def __init__(
        self,
        task: Task,
        backbone: Backbone | None,
        fill: Fill | None,
        anchor: Anchor | None,
        fill_levels: Sequence[int] | None,
        sampler: MissingnessSampler | None,
        evaluation: EvaluationSettings | None,
        compile: Compile,
    ) -> None:
        super().__init__()
        self.task = Task.from_dict(task) if isinstance(task, Mapping) else task
        if not isinstance(self.task, Task):
            raise InputError(f"task is {task!r}; give a pmixseg.Task, such as pmixseg.BRATS.")
        describe(self.init_args, type(self).__name__)  # refuse now what no checkpoint could hold
        self.modalities: tuple[str, ...] = self.select_modalities()
        self.backbone = self._fit_backbone(build(backbone))
        self.fill = fill or default_fill(self.backbone, self.shows_subsets)
        self.fill_levels = None if fill_levels is None else known_levels(fill_levels, self.backbone)
        self._levels_follow = fill_levels is None
        self.anchor = fitting_anchor(build(anchor), self.fill, self.backbone)
        self.sampler: MissingnessSampler = build(sampler) or UniformCombinations()
        self.evaluation = EvaluationSettings.of(evaluation)
        check_steps(self.evaluation.postprocess, self.task)  # not after a training, in its test
        self.preparation = Preparation()
        self.loaded_from: str | None = None
        self.identity: Mapping[str, str] | None = None  # of the checkpoint that the weights are of
        self.compile_setting = compile
        self._compiles = compile is True

    # ---------------------------------------------------------------- construction

    def select_modalities(self) -> tuple[str, ...]:
        """Return modalities that the network has inputs for; all of the task by default."""
        return self.task.modalities

    def build_backbone(self) -> Backbone:
        """Build the network; override to plug in one of your own."""
        return MultiEncoderUNet(modalities=self.modalities, num_classes=self.task.num_classes)

    def _fit_backbone(self, backbone: Backbone | None) -> Backbone:
        needs = {"modalities": list(self.modalities), "num_classes": self.task.num_classes}
        net = self.build_backbone() if backbone is None else backbone
        if not isinstance(net, Backbone):
            raise InputError(
                f"the network of this {type(self).__name__} is a {type(net).__name__}, and no "
                "pmixseg.backbones.Backbone; derive it from that, or put a network of MONAI into "
                "an EarlyFusion."
            )
        if (net.modalities, net.num_classes) == (self.modalities, self.task.num_classes):
            return net
        if backbone is None:
            raise InputError(
                f"{type(self).__name__}.build_backbone made a network for {list(net.modalities)} "
                f"and {net.num_classes} classes, but the task needs {needs}; use self.modalities "
                "and self.task.num_classes there."
            )
        # One for other modalities or classes is made anew from its description.
        description = describe(backbone, "backbone")
        description["init_args"].update(needs)
        fitted: Backbone = build(description)
        return fitted

    def follow_levels(self, levels: Sequence[int] | None) -> None:
        """Fill these levels where the user has named none; the checkpoint then names them.

        Args:
            levels: numbers from 0, the finest; ``None`` fills all.
        """
        if self._levels_follow:
            self.fill_levels = None if levels is None else list(levels)
            self.settle("fill_levels")  # which a checkpoint says apart

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
        """Encode the modalities that are present; columns are :attr:`modalities`."""
        return cast(Latents, self._run("encode", image, present))

    def _decode(self, latents: Latents) -> SegOutput:
        return cast(SegOutput, self._run("decode", latents))

    def _run(self, method: str, *inputs: Any) -> Any:
        """Call a method of the backbone, compiled where that was asked for."""
        # The plain one where a compiler already traces what calls it.
        if not self._compiles or torch.compiler.is_compiling():
            return getattr(self.backbone, method)(*inputs)
        # Compiled for the class, not for this object: a copy must use its own weights.
        return compiled(getattr(type(self.backbone), method))(self.backbone, *inputs)

    def decode(self, latents: Latents) -> SegOutput:
        """Fill the slots of missing modalities as in training, and segment.

        The output carries the latents as they were before the fill.
        """
        ready = latents
        if self.fill == "anchor" and self.anchor is not None:
            ready = fill_with_anchor(latents, self.anchor, self.fill_levels)
        return replace(self._decode(ready), latents=latents)

    def forward(self, image: Image, present: Presence) -> SegOutput:
        """Return ``decode(encode(image, present))``."""
        if torch.compiler.is_exporting():
            self.to_onnx()
        return self.decode(self.encode(image, present))

    def to_onnx(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to trace what depends on the modalities shown; ``pmixseg export`` does it."""
        raise InputError(
            f"an exported {type(self).__name__} is of one combination of modalities; use `pmixseg "
            "export CKPT --combination NAMES`, with --format onnx for ONNX, or in Python "
            "pmixseg.inference.export.export."
        )

    to_torchscript = to_tensorrt = to_onnx

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

    # ---------------------------------------------------------------- prediction

    def setup(self, stage: str) -> None:
        """Take spacing, normalisation and patch from the data; compare them with a checkpoint's.

        Raises:
            InputError: a precision or strategy of the trainer that would change the model, a
                compiler put around it, or data of another task.
        """
        check_stage(self, stage)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            check_task(data, self.task)
            self.preparation = self.preparation.merge(data, self.evaluation, fitting=stage == "fit")

    def train_dataloader(self) -> Any:
        """Refuse to run without data: Lightning asks here where none were given."""
        raise InputError(
            "no data were given to the trainer; give them as in trainer.fit(module, "
            "datamodule=pmixseg.BraTSDataModule(store='store'))."
        )

    test_dataloader = predict_dataloader = train_dataloader

    def acquired_names(self, item: CaseItem) -> Combination:
        """Return what the case has of the module's modalities.

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

    def predict_step(
        self, item: CaseItem, batch_idx: int, dataloader_idx: int = 0
    ) -> CasePrediction:
        """Segment a case from everything that was acquired."""
        check_item(self._trainer, item)
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
        """Take windows one by one where each other number of them would be compiled anew."""
        if not self._compiles or settings.batch_size != "auto":
            return settings
        return replace(settings, batch_size=1)

    @checked
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
        check_dtype(self)
        settings = settings or SegmentSettings()
        evaluation = self._of_one_shape(settings.over(self.evaluation))
        recipe = self.preparation.recipe(
            self.task, evaluation, self.strides, self.device, self.identity
        )
        with evaluating(self):
            return segment_scans(
                self, recipe, images, settings, codes=codes, name=name, progress=progress
            )

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write what :func:`pmixseg.load` needs, primitives only."""
        checkpoint[ENTRY] = self.payload().to_dict()
        # Said once, and not where Lightning's command line would let it beat the flags.
        own = checkpoint.pop("hyper_parameters", {})
        if further := {key: own[key] for key in own if key not in self.init_args}:
            checkpoint["hyper_parameters"] = describe(further, "hyper_parameters")

    def payload(self) -> Payload:
        """Say what a checkpoint must say about this module."""
        description = describe(self, type(self).__name__)
        description["init_args"].pop("task", None)
        return Payload(
            **description,
            task=self.task,
            preparation=self.preparation,
            overlap=self.evaluation.overlap,
            terms=tuple(sorted(self.terms)),
            fill_levels=None if self.fill_levels is None else tuple(self.fill_levels),
        )

    def take_over(self, checkpoint: Mapping[str, Any], *, fitting: bool) -> dict[str, Tensor]:
        """Take over the preparation of a checkpoint, and return its weights for this module.

        Resuming needs exactly the same terms. Anything else (test, predict, plain loading) needs
        none.

        Args:
            checkpoint: what its file holds; it is not changed.
            fitting: whether a training is resumed.

        Raises:
            InputError: the file is not ours, or damaged; it is of another task or network, or its
                data had another spacing or normalisation; its weights are not finite; or a
                training is resumed with other terms.
        """
        payload = Payload.from_dict(checkpoint.get(ENTRY))
        payload.refuse_other_task(self.task)
        if fitting:
            payload.refuse_other_terms(self.terms)
        else:
            # The default is what the weights were trained with, not what it is without their terms.
            self.follow_levels(payload.fill_levels)
        trained = payload.preparation
        trained.refuse_other(self.preparation)
        saved = weights_of(checkpoint)
        own, name = self.state_dict(), type(self).__name__
        state = weights_for(own, saved, self.terms, name, fitting=fitting)
        data = self.preparation
        self.preparation = data.after(trained) if fitting else trained.on(data)
        return state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume with the same terms; test, validate and predict without any."""
        checkpoint["state_dict"] = self.take_over(checkpoint, fitting=self.is_fitting)
        if self._trainer is not None and self.trainer.ckpt_path and not self.is_fitting:
            self.identity = checkpoint_identity(Path(self.trainer.ckpt_path))

    def teardown(self, stage: str) -> None:
        """Let a training in processes of its own (as in a notebook) tell all that it found.

        Lightning brings its weights to the process that asked for it, and nothing else.
        """
        if stage == "fit" and isinstance(self.trainer.strategy.launcher, _MultiProcessingLauncher):
            told = {TOLD: self.payload().to_dict()}
            self.register_state_dict_post_hook(lambda _, state, *further: state.update(told))  # type: ignore[no-untyped-call]  # untyped in torch

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **named: Any) -> Any:
        """Load weights, and what a training in processes of its own has told with them."""
        if TOLD in state_dict:
            payload = Payload.from_dict(state_dict[TOLD])
            self.loaded_from = self.identity = None
            self.preparation = payload.preparation
            self.follow_levels(payload.fill_levels)
            self.evaluation = EvaluationSettings.of(payload.init_args.get("evaluation"))
            self.remember(**payload.init_args)
            state_dict = {key: value for key, value in state_dict.items() if key != TOLD}
        return super().load_state_dict(state_dict, *args, **named)

    def begin_anew(self) -> None:
        """Forget, before a training, what was true of the weights that it begins with."""
        self.loaded_from = self.identity = None
        if not any(part.training for part in self.modules()):  # as `load` leaves a model
            self.train()
        if self.evaluation.temperatures is not None:
            rank_zero_warn(
                "the temperatures of this model were fitted to other weights than this training "
                "will make, and are left out; fit them again (pmixseg validate --calibrate)."
            )
            self.evaluation = replace(self.evaluation, temperatures=None)

    @property
    def is_fitting(self) -> bool:
        """Whether a trainer trains this module."""
        return self._trainer is not None and self.trainer.state.fn == "fit"
