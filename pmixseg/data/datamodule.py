"""Patches for training and cases for evaluation, from one store and one split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from pmixseg.data.augment import Augmentation
from pmixseg.data.cohorts.problems import listed
from pmixseg.data.cohorts.shares import Share
from pmixseg.data.keys import make_key, number_of
from pmixseg.data.masks import CaseMasks, Flags, MaskFile
from pmixseg.data.parts import Split
from pmixseg.data.patches import (
    CaseDataset,
    CaseItem,
    CaseLoader,
    PatchDataset,
    PatchTransform,
    Size,
    collate_case,
    warn_of_padding,
)
from pmixseg.data.sampling import CaseSampler, EpochLoader, EpochSampler, SameOrder
from pmixseg.data.scans.geometry import spacing_of
from pmixseg.data.source import CohortSource
from pmixseg.data.splits import Fractions, SplitPlan, divided_patients
from pmixseg.data.store.store import Store, StoredCase
from pmixseg.data.training_cases import shared_scans
from pmixseg.describe import COUNT, FRACTION, NOT_NEGATIVE, Described, Ranges, build
from pmixseg.errors import InputError, count_of
from pmixseg.task import BRATS, Task
from pmixseg.types import Batch

Part = Literal["train", "val", "test"]


class BraTSDataModule(LightningDataModule, Described):
    """Load a prepared cohort: split it, read patches, augment them on the device.

    Nothing here is particular to BraTS but the default task. Batches hold what
    :class:`~pmixseg.types.Batch` names, without ``present``: which modalities the network sees is
    the module's draw. Validation, test and prediction yield one
    :class:`~pmixseg.data.patches.CaseItem` at a time.

    Args:
        store: prepared cohort (``pmixseg prepare``). With ``root``: where to prepare it, by
            default beside ``root``.
        root: the cohort as it lies; it is prepared, or the store brought up to date, before use.
            Cases of the store that are not under ``root`` are left out.
        task: modalities, labels and regions; the store must have been made for it.
        spacing: voxel size in mm to prepare at; ``None`` keeps each case's own.
        layout: preset or YAML file if the layout of ``root`` is not to be recognised.
        labels: the task's label -> its number(s) in the label files of ``root``, or its name in
            ``dataset.json``, where the layout does not tell.
        prepare_workers: processes that prepare.
        split: rule that splits the cohort, or its ``{class_path, init_args}``; default
            :class:`~pmixseg.data.splits.Fractions` (70 / 10 / 20 %).
        patch_size: voxels, one number or three.
        patches_per_case: patches of each case per epoch.
        foreground: share of patches centred on the tumour.
        batch_size: patches per step and process.
        num_workers: processes that read patches; evaluation reads one case ahead in a thread.
        augmentation: ``True`` for :class:`~pmixseg.data.augment.Augmentation` with its defaults,
            ``False`` or ``None`` for none, an object or its ``{class_path, init_args}``. A
            :class:`~pmixseg.data.patches.PatchTransform` runs in the workers, on the CPU.
        mask_file: per-case masks, see :class:`~pmixseg.data.masks.MaskFile`.
        masks: another rule for what may be used of each case.
        seed: of patches, augmentation and missingness. The split has its own.
        val_cases: validate on at most this many cases, always the same.
        predict_part: which part ``predict`` goes through, or the whole cohort.

    Raises:
        InputError: neither ``store`` nor ``root``, both ``mask_file`` and ``masks``, or a number
            out of range.
    """

    ranges = Ranges(
        **dict.fromkeys(("patch_size", "patches_per_case", "batch_size", "val_cases"), COUNT),
        num_workers=NOT_NEGATIVE,
        foreground=FRACTION,
    )

    def __init__(
        self,
        store: str | Path | None = None,
        root: str | Path | None = None,
        task: Task = BRATS,
        spacing: tuple[float, float, float] | None = None,
        layout: str | Path | None = None,
        labels: dict[str, str | int | list[str | int]] | None = None,
        prepare_workers: int = 0,
        split: SplitPlan | None = None,
        patch_size: int | tuple[int, int, int] = (80, 80, 80),
        patches_per_case: int = 1,
        foreground: float = 0.33,
        batch_size: int = 2,
        num_workers: int = 0,
        augmentation: Augmentation | PatchTransform | bool | None = True,
        mask_file: str | Path | None = None,
        masks: CaseMasks | None = None,
        seed: int = 0,
        val_cases: int | None = None,
        predict_part: Literal["train", "val", "test", "all"] = "test",
    ) -> None:
        super().__init__()
        if not isinstance(task, Task):
            raise InputError(f"task is {task!r}; give a pmixseg.Task, such as pmixseg.BRATS.")
        if mask_file is not None and masks is not None:
            raise InputError("both mask_file and masks are given; name one of them.")
        self.task = task
        self.source = CohortSource(store, root, task, spacing, layout, labels, prepare_workers)
        self.split_plan: SplitPlan = build(split) or Fractions()
        self.split_is_chosen = split is not None
        self.patch_size = _size(patch_size)
        self.patches_per_case, self.foreground = patches_per_case, foreground
        self.batch_size, self.num_workers = batch_size, num_workers
        self.augmentation: Augmentation | PatchTransform | None = (
            Augmentation() if augmentation is True else build(augmentation) or None
        )
        self.masks: CaseMasks | None = MaskFile(mask_file) if mask_file else build(masks)
        self.seed, self.val_cases, self.predict_part = seed, val_cases, predict_part
        self.share: Share | None = None
        self._parts: Split | None = None
        self._allowed: dict[str, Flags] = {}
        self._voxel = (1.0, 1.0, 1.0)

    # ---------------------------------------------------------------- what others ask

    @property
    def store_path(self) -> Path:
        """Where the store lies."""
        return self.source.path

    @property
    def store(self) -> Store:
        """The opened store.

        Raises:
            InputError: it is missing, or was made for another task or spacing.
        """
        return self.source.store

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Voxel size of the store in mm; ``None`` where every case keeps its own."""
        return self.store.spacing

    @property
    def normalisation(self) -> str:
        """How the store's intensities were normalised."""
        return self.store.normalisation

    @property
    def dtype(self) -> str:
        """How the store's intensities were rounded: ``float16`` or ``float32``."""
        return self.store.dtype

    @property
    def cases(self) -> tuple[str, ...]:
        """The cases that are used: those of the store, of which a file lies under ``root``.

        Raises:
            InputError: there is no store, or no case under ``root``.
        """
        return self.source.cases

    @property
    def parts(self) -> Split:
        """The cases of each part.

        Raises:
            InputError: the split does not fit the cohort.
        """
        if self._parts is None:
            self._parts = self.split_plan.split([self.store.read(c) for c in self.cases])
        return self._parts

    @property
    def training_cases(self) -> tuple[str, ...]:
        """Cases that an epoch of training goes through; one named twice gives twice the patches."""
        return self.parts.train

    @property
    def split_name(self) -> str:
        """Name of the published split that this is, or else its hash."""
        return self.parts.name

    # ---------------------------------------------------------------- Lightning's hooks

    def prepare_data(self) -> None:
        """Bring the store up to date with ``root``; one process per machine does this.

        Raises:
            InputError: no case is found, or some cannot be prepared.
        """
        self.source.prepare()
        self._parts = None  # the cohort may have changed

    def setup(self, stage: str) -> None:
        """Open the store, split it, apply the masks.

        Raises:
            InputError: the store, the split or the masks do not fit, or a case to train or
                validate on has no label.
        """
        cases = {name: self.store.read(name) for name in self.cases}
        if stage == "predict" and self.predict_part == "all":
            self._apply_masks(cases)
            return  # no split is needed to go through everything
        parts = self.parts
        published = f"published split {parts.published}, " if parts.published else ""
        rank_zero_info(
            f"Split: {published}{len(parts.train)} train, {len(parts.val)} val, "
            f"{len(parts.test)} test, hash {parts.hash}"
        )
        self._remark(parts, cases)
        self._apply_masks(cases)
        if stage in ("fit", "validate"):
            if stage == "validate":
                self._whole(self._validated())  # which is refused where the split has none
            used = (*(parts.train if stage == "fit" else ()), *self._validated())
            unlabelled = sorted(name for name in used if not cases[name].labelled)
            if unlabelled:
                has = count_of(len(unlabelled), "case has", "cases have")
                raise InputError(
                    f"{has} no label to train or validate on: "
                    f"{', '.join(unlabelled)}; take them out of the split or give them one."
                )
        if stage == "fit" and parts.train:
            voxels = [cases[name].geometry.grid_spacing for name in parts.train]
            self._voxel = spacing_of(np.median(voxels, axis=0).tolist())
            shapes = [cases[name].geometry.box().shape for name in parts.train]
            volumes = self.batch_size * self.task.num_modalities
            warn_of_padding(self.patch_size, shapes, self.batch_size, volumes)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of patches, in an order that (seed, epoch) fix.

        Raises:
            InputError: the split has no training case.
        """
        cases = self.training_cases
        if not cases:
            raise InputError("the split has no training case; use another split to fit.")
        on_cpu = self.augmentation if isinstance(self.augmentation, PatchTransform) else None
        dataset = PatchDataset(
            self.store, cases, self.patch_size, self.seed, self.foreground, self._allowed, on_cpu
        )
        order = EpochSampler(len(dataset.cases), self.patches_per_case, self.batch_size, self.seed)
        return EpochLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=SameOrder(order) if self._overfits else order,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the validation cases; nothing where the split has none."""
        cases = self._validated()
        return self._whole(cases) if cases else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test cases.

        Raises:
            InputError: the split has none.
        """
        return self._whole(self.parts.test, "test")

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the cases of ``predict_part``; with :attr:`share` set, only that share of them.

        Raises:
            InputError: there are none.
        """
        part = self.predict_part
        cases = self.cases if part == "all" else getattr(self.parts, part)
        if cases and self.share is not None:
            cases = self.share.of(cases)
            if not cases:
                rank_zero_info(f"part {self.share} has no case")
                return []
        return self._whole(cases, part)

    def items(self, part: Part) -> Iterator[CaseItem]:
        """Load whole cases of a part, one after the other, all of them on every process.

        ``val`` are the cases that are validated on. Nothing random is drawn.
        """
        cases = self._validated() if part == "val" else getattr(self.parts, part)
        dataset = CaseDataset(self.store, cases, self.seed, self._allowed)
        return (dataset[index] for index in range(len(dataset)))

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move tensors, but keys: a CPU draws from them, and reading off a GPU would wait for it.

        Training batches are moved with what the module has drawn to be shown.
        """
        draw = getattr(self.trainer and self.trainer.lightning_module, "with_present", None)
        if draw is not None and self._trains:
            batch = draw(batch)
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return {**moved, "key": batch["key"]} if "key" in batch else moved

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment training batches, and only those."""
        if not self._trains or not isinstance(self.augmentation, Augmentation):
            return batch
        return self.augmentation(cast(Batch, batch), spacing=self._voxel)

    # ---------------------------------------------------------------- inside

    @property
    def _trains(self) -> bool:
        """Say whether batches are those of a training, not of its validation."""
        return self.trainer is not None and bool(self.trainer.training)

    @property
    def _overfits(self) -> bool:
        """Say whether Lightning is to train on the same few batches in every epoch."""
        return bool(getattr(self.trainer, "overfit_batches", 0))

    def _remark(self, parts: Split, cases: Mapping[str, StoredCase]) -> None:
        if parts.lacking:
            they = count_of(len(parts.lacking), "case of the split is", "cases of the split are")
            rank_zero_info(f"{they} not in the store, and left out: {listed(parts.lacking)}")
        if divided := divided_patients(parts, cases.values()):
            has = count_of(len(divided), "patient has", "patients have")
            rank_zero_warn(
                f"{has} cases in more than one part of the split ({listed(divided)}): scores on "
                "patients that a training has seen are too good; put all cases of a patient "
                "into one part."
            )
        if pairs := shared_scans(parts, cases.values()):
            rank_zero_warn(
                f"{count_of(len(pairs), 'pair')} of cases in different parts of the split "
                f"{'holds' if len(pairs) == 1 else 'hold'} the same scan ({listed(pairs)}): scores "
                "on scans that a training has seen are too good, and a test refuses them; leave "
                "one of a pair out, or put both into one part."
            )
        made = sorted(name for name, case in cases.items() if case.synthetic)
        if 0 < len(made) < len(cases):
            rank_zero_warn(
                f"{count_of(len(made), 'case is', 'cases are')} of a phantom ({listed(made)}), the "
                "others are not: what is trained or scored on both says nothing about patients."
            )

    def _apply_masks(self, cases: Mapping[str, StoredCase]) -> None:
        if self.masks is not None:
            self._allowed = self.masks.allowed(list(cases.values()), self.task.modalities)

    def _whole(self, cases: Sequence[str], part: str = "val") -> DataLoader[CaseItem]:
        if not cases:
            raise InputError(f"the split has no case in '{part}'; use another split or part.")
        dataset = CaseDataset(self.store, cases, self.seed, self._allowed)
        order = CaseSampler(len(cases))
        return CaseLoader(
            dataset, sampler=SameOrder(order) if self._overfits else order, collate_fn=collate_case
        )

    def _validated(self) -> tuple[str, ...]:
        cases = self.parts.val
        if self.val_cases is None or self.val_cases >= len(cases):
            return cases
        # Chosen by name, so that the choice does not favour whoever comes first in the list.
        order = sorted(cases, key=lambda name: make_key(0, None, number_of(name)))
        chosen = set(order[: self.val_cases])
        return tuple(name for name in cases if name in chosen)


def _size(size: int | Sequence[int]) -> Size:
    depth, height, width = (int(n) for n in ([size] * 3 if isinstance(size, int) else size))
    return depth, height, width
