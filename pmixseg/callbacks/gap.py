"""The gap between modalities, measured while a network trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from pmixseg.borrowed import evaluating
from pmixseg.callbacks.term import own_module, refuse_averaging_before
from pmixseg.describe import COUNT, Described, Range, Ranges
from pmixseg.errors import InputError
from pmixseg.evaluation.gap.guards import FEWEST_CASES, low_guards
from pmixseg.evaluation.gap.latents import (
    LatentSample,
    centre_window,
    named_subsets,
    sample_latents,
)
from pmixseg.evaluation.records.curves import read_log
from pmixseg.evaluation.report.figures import projection_figure, save_png
from pmixseg.losses.alignment import resolve_levels
from pmixseg.modules.base import SegmentationModule
from pmixseg.modules.recording import results_folder
from pmixseg.modules.scoring import EQUAL
from pmixseg.task import Task, format_combination

GUARDED = ("rank_within", "decodability")
"""What must not collapse."""


class GapMonitor(Callback, Described):
    """Measure how far apart the latents of the modalities are, before, during and after training.

    What the numbers mean: docs/method/theory.md.

    Logged for every level l under ``gap/level<l>/``: the numbers of
    :class:`~pmixseg.evaluation.gap.measure.Gap` (``ratio``, the gap; ``whitened``; ``rank_within``;
    ``numerator`` and ``variance`` apart); ``decodability/<region>``, the cross-validated linear R²
    of a region from one sequence's latent, and their mean ``decodability``; ``collapsed`` (0 or 1);
    and the ratio among every smaller combination, ``ratio/flair+t1``. ``gap/ratio`` is the mean
    over levels.
    The row of ``metrics.csv`` from before the first step has epoch -1. Scatter plots of the
    latents, before and after, go to wandb and TensorBoard, and as files into ``<run>/gap`` with any
    other logger.

    It changes nothing: no gradient, no random number, no weight. Process 0 measures the same
    validation cases however many processes there are, and tells the others.

    Args:
        levels: which levels; all if not given.
        cases: at most so many validation cases, those with every modality; with fewer than five
            the decodability is logged and not judged.
        points: voxels per level.
        every: measure after every n-th validation.
        reference: run folder of the same network trained *without* alignment: collapse is a rank
            within a modality under half, or a decodability under 0.8, of its last. By default of
            this run's own last measurement before anything was aligned.
        pictures: draw the latents.

    Raises:
        InputError: ``every`` or ``cases`` below 1, or ``points`` below 2; when training starts: a
            backbone without a latent per modality, no complete validation case, or a reference run
            that has no gap.
    """

    ranges = Ranges(every=COUNT, cases=COUNT, points=Range(2))

    def __init__(
        self,
        levels: Sequence[int] | None = None,
        cases: int = FEWEST_CASES,
        points: int = 1024,
        every: int = 1,
        reference: str | Path | None = None,
        pictures: bool = True,
    ) -> None:
        self.levels = levels
        self.cases, self.points, self.every = cases, points, every
        self.reference, self.pictures = reference, pictures
        self._guard: dict[str, float] = {}
        self._warned: set[str] = set()
        self._samples: dict[int, LatentSample] = {}
        self._images: list[torch.Tensor] = []
        self._regions: list[torch.Tensor] | None = None
        self._validations = 0
        self._last_step = -1

    # ---------------------------------------------------------------- Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier training; what a resumed one had measured is read after this.

        Raises:
            InputError: a callback that would take averaged weights out before they are measured.
        """
        if stage != "fit":
            return
        refuse_averaging_before(
            self, trainer, "take averaged weights out of the model", "measures them"
        )
        if not trainer.global_step:
            self._guard, self._warned = {}, set()
            self._validations, self._last_step = 0, -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what cannot be measured, and read the reference."""
        module = own_module(self, pl_module)
        refuse_single_latents(module)
        self._levels_of(module)
        if self.reference is not None:
            self._guard = read_reference(Path(self.reference))
        self._images, self._regions = complete_cases(trainer, module, self.cases)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure before the first step; a resumed training has done so."""
        if trainer.global_step:
            return
        module = own_module(self, pl_module)
        _log(trainer, {**self._measure(trainer, module), "epoch": -1.0}, step=0)
        self._draw(trainer, module, "before")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure beside the validation's Dice."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        if self._validations % self.every:
            return
        values = self._measure(trainer, own_module(self, pl_module))
        self._last_step = trainer.global_step
        pl_module.log_dict(values, **EQUAL)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the latents, and measure them if the last validation did not."""
        module, step = own_module(self, pl_module), trainer.global_step
        if self._last_step != step:
            values = self._measure(trainer, module)
            _log(trainer, {**values, "epoch": float(trainer.current_epoch - 1)}, step=step)
        self._draw(trainer, module, "after")
        self._samples = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what the collapse guard compares with."""
        return {"guard": dict(self._guard), "validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what an earlier part of the training measured; a reference given now wins."""
        self._guard = self._guard or dict(state_dict["guard"])
        self._validations = state_dict["validations"]

    # ---------------------------------------------------------------- measuring

    def _levels_of(self, module: SegmentationModule) -> tuple[int, ...]:
        count = len(module.backbone.channels)
        return resolve_levels(range(count) if self.levels is None else self.levels, count)

    def _measure(self, trainer: Trainer, module: SegmentationModule) -> dict[str, float]:
        """Return all values on every process, measured by the first."""
        values: dict[str, float] = {}
        if trainer.is_global_zero:
            self._samples = self._sample(module)
            values = gap_values(self._samples, module.backbone.slots, list(module.task.regions))
            if self.reference is None and not (self._guard and is_aligned(module)):
                guarded = [n for n in values if n.rsplit("/", 1)[-1] in GUARDED]
                self._guard = {name: values[name] for name in guarded}
            values |= self._collapses(values)
        shared: dict[str, float] = trainer.strategy.broadcast(values)
        return shared

    def _sample(self, module: SegmentationModule) -> dict[int, LatentSample]:
        devices = [module.device] if module.device.type == "cuda" else []
        weight = next(module.backbone.parameters())
        images = (image.to(module.device, weight.dtype) for image in self._images)
        window = module.preparation.window(module.evaluation, module.strides)
        with evaluating(module), torch.random.fork_rng(devices):
            return sample_latents(
                module,
                images,
                window,
                module.anchor,
                self._levels_of(module),
                self.points,
                None if self._regions is None else [r.to(module.device) for r in self._regions],
            )

    def _collapses(self, values: dict[str, float]) -> dict[str, float]:
        collapsed = {}
        for level in self._samples:
            prefix = f"gap/level{level}/"
            now, before = _of_level(values, prefix), _of_level(self._guard, prefix)
            low = low_guards(now, before, len(self._images))
            collapsed[f"{prefix}collapsed"] = float(bool(low))
            for name in (prefix + what for what in low if prefix + what not in self._warned):
                self._warned.add(name)
                than = "the reference run" if self.reference else "this one before alignment"
                rank_zero_warn(
                    f"{name} is {values[name]:.3g}, {self._guard[name]:.3g} in {than}: the latents "
                    "collapse, so a small gap means nothing; lower the alignment's weight, or use "
                    "another distance."
                )
        return collapsed

    def _draw(self, trainer: Trainer, module: SegmentationModule, when: str) -> None:
        """Draw what was measured last, in the process that measured."""
        if not self.pictures or not self._samples:
            return
        names = [module.task.show(name) for name in module.backbone.slots]
        figure = projection_figure(self._samples, names, f"Latents {when} training")
        written = False
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(f"gap/{when}", [figure])
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(f"gap/{when}", figure, trainer.global_step)
            elif not written:
                written = True
                path = results_folder(trainer) / "gap" / f"{when}.png"
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    save_png(figure, path)
                except OSError as error:  # a picture is not worth a training
                    rank_zero_warn(f"{path} cannot be written ({error.strerror or error}).")


def _of_level(values: dict[str, float], prefix: str) -> dict[str, float]:
    return {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}


def is_aligned(module: SegmentationModule) -> bool:
    """Say whether latents have been aligned up to the present epoch."""
    return any(
        term.aligned_levels and module.term_weights[name].at(module.current_epoch) > 0
        for name, term in module.terms.items()
    )


def gap_values(
    samples: dict[int, LatentSample], names: Sequence[str], regions: Sequence[str] = ()
) -> dict[str, float]:
    """Return names of the log and their numbers; see :class:`GapMonitor`."""
    values: dict[str, float] = {}
    for level, sample in samples.items():
        measured = {**sample.gap().to_dict(), **_decodability(sample, regions)}
        for combination in named_subsets(names):
            slots = [list(names).index(name) for name in combination]
            measured[f"ratio/{format_combination(combination)}"] = sample.ratio(slots)
        values |= {f"gap/level{level}/{name}": value for name, value in measured.items()}
    ratios = [values[f"gap/level{level}/ratio"] for level in samples]
    values["gap/ratio"] = sum(ratios) / len(ratios)
    return values


def _decodability(sample: LatentSample, regions: Sequence[str]) -> dict[str, float]:
    """Return each occurring region's decodability, and their mean; nothing without labels."""
    shares = sample.decodability()
    if shares is None:
        return {}
    by_region = {r: float(v) for r, v in zip(regions, shares, strict=True) if v.isfinite()}
    mean = {"decodability": sum(by_region.values()) / len(by_region)} if by_region else {}
    return mean | {f"decodability/{region}": value for region, value in by_region.items()}


def complete_cases(
    trainer: Trainer, module: SegmentationModule, count: int
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """Cut windows, and regions, of validation cases with all modalities of the module, by name.

    The regions in these windows are ``None`` if a case has no label.
    """
    data = getattr(trainer, "datamodule", None)
    items = data.items("val") if data is not None and hasattr(data, "items") else ()
    window = module.preparation.window(module.evaluation, module.strides)
    cuts: list[torch.Tensor] = []
    regions: list[torch.Tensor] = []
    for item in items:
        if bool(module.columns(item["acquired"][None]).all()):
            whole = module.columns(item["image"][None])[0]
            cuts.append(centre_window(whole, window).clone())  # not a view: the case is let go
            if item.get("label") is not None:
                marked = region_maps(item["label"], module.task)
                regions.append(centre_window(marked, window, around=whole).clone())
        if len(cuts) == count:
            break
    if not cuts:
        raise InputError(
            "GapMonitor compares the modalities of one case, but no validation case has all of "
            f"{list(module.modalities)}; give the split validation cases, or leave it out."
        )
    return cuts, regions if len(regions) == len(cuts) else None


def region_maps(label: torch.Tensor, task: Task) -> torch.Tensor:
    """Return 1 inside each region and 0 outside, ``[R, D, H, W]``."""
    maps = [torch.isin(label, torch.tensor(task.region_classes(r))) for r in task.regions]
    return torch.stack(maps).float()


def read_reference(run: Path) -> dict[str, float]:
    """Read the last rank and decodability of every level from a run's ``metrics.csv``."""
    if not (run / "metrics.csv").is_file():
        raise InputError(f"GapMonitor.reference: {run / 'metrics.csv'} cannot be read; correct it.")
    table = read_log(run).dropna(axis="columns", how="all")
    names = [n for n in table.columns if n.startswith("gap/") and n.rsplit("/", 1)[-1] in GUARDED]
    if not names:
        raise InputError(
            f"GapMonitor.reference: {run / 'metrics.csv'} holds no gap; train that run with "
            "GapMonitor as well."
        )
    return {name: float(table[name].dropna().iloc[-1]) for name in names}


def refuse_single_latents(module: SegmentationModule) -> None:
    """Refuse a network that has no gap."""
    if module.backbone.slots != module.backbone.modalities or len(module.modalities) < 2:
        raise InputError(
            f"{type(module.backbone).__name__} has the latents {list(module.backbone.slots)}, and "
            "a gap lies between the latents of two modalities or more; leave GapMonitor out."
        )


def _log(trainer: Trainer, values: dict[str, float], step: int) -> None:
    if trainer.is_global_zero:
        logger: Logger
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
