"""Datasets of a store: patches for training, whole cases for evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int64
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pmixseg.data.keys import make_key, number_of, uniform
from pmixseg.data.masks import Flags
from pmixseg.data.store.arrays import copy_box
from pmixseg.data.store.store import Store, StoredCase
from pmixseg.describe import Described

Size = tuple[int, int, int]

MOSTLY_PADDING = 4
"""Times as large as every case: a patch of that size gets a warning, for it wastes memory."""

_FOREGROUND_KEPT = 2048
"""Tumour voxels remembered per case and class: enough to centre patches on, few enough to keep."""


class Sample(TypedDict):
    """One row of a :class:`~pmixseg.types.Batch`."""

    image: Float[Tensor, "m d h w"]
    label: Int64[Tensor, "d h w"]
    case_id: str
    acquired: Bool[Tensor, " m"]
    key: Int64[Tensor, ""]


class CaseItem(TypedDict):
    """Hold a whole case for evaluation."""

    image: Float[Tensor, "m d h w"]
    """float32, in ``stored.geometry.box()``; modalities outside ``acquired`` are 0."""
    label: NotRequired[Int64[Tensor, "d h w"]]
    """Class indices in the same box; left out where the case has no label."""
    case_id: str
    acquired: Bool[Tensor, " m"]
    key: Int64[Tensor, ""]
    """Hash of (seed, no epoch, name of the case): a case keeps its draws in any company."""
    stored: StoredCase
    """Where it came from, with the way back to the source's grid."""


class PatchTransform(Described, ABC):
    """Augment single patches where they are read, in the workers."""

    @abstractmethod
    def __call__(
        self, image: Float[Tensor, "m d h w"], label: Int64[Tensor, "d h w"], key: int
    ) -> tuple[Float[Tensor, "m d h w"], Int64[Tensor, "d h w"]]:
        """Augment one patch; a pure function of its arguments that keeps the shapes."""


class PatchDataset(Dataset[Sample]):
    """Read patches of labelled cases by (epoch, index).

    The first epoch proves each case by its checksums, which reads all of it once.
    With probability ``foreground`` a patch is centred on a tumour voxel (of a class chosen
    uniformly among those the case has), as far as the volume's border allows; otherwise its
    position is uniform. Where the volume is smaller than the patch it lies in the middle of zeros.

    Args:
        store: prepared cohort.
        cases: labelled cases of the store.
        patch_size: voxels.
        seed: enters every key.
        foreground: share of patches centred on the tumour.
        allowed: what may be used of each case (default: what it acquired).
        transform: applied to each patch.
    """

    def __init__(
        self,
        store: Store,
        cases: Sequence[str],
        patch_size: Size,
        seed: int = 0,
        foreground: float = 0.0,
        allowed: Mapping[str, Flags] | None = None,
        transform: PatchTransform | None = None,
    ) -> None:
        self.store, self.cases, self.patch_size = store, tuple(cases), patch_size
        self.seed, self.foreground = seed, foreground
        self.allowed, self.transform = dict(allowed or {}), transform
        self._tumour: dict[str, list[npt.NDArray[np.int64]]] = {}
        self._first: int | None = None

    def __getitem__(self, at: tuple[int, int]) -> Sample:
        epoch, index = at
        if self._first is None:
            self._first = epoch
        # In later epochs other workers would read whole cases again.
        stored = self.store.read(self.cases[index % len(self.cases)], prove=epoch == self._first)
        acquired = self.allowed.get(stored.case_id, stored.acquired)
        key = make_key(self.seed, epoch, index)
        start = self._start(stored, acquired, key)
        image, volumes = torch.zeros(len(acquired), *self.patch_size), stored.image
        for m in np.flatnonzero(acquired):
            _read(volumes[m], start, image[m])
        label, classes = torch.zeros(self.patch_size, dtype=torch.int64), stored.label
        assert classes is not None
        _read(classes, start, label)
        if self.transform is not None:
            image, label = self.transform(image, label, key)
            image[~torch.tensor(acquired)] = 0.0
        return {
            "image": image,
            "label": label,
            "case_id": stored.case_id,
            "acquired": torch.tensor(acquired),
            "key": torch.tensor(key),
        }

    def _start(self, stored: StoredCase, acquired: Flags, key: int) -> list[int]:
        """Return the first voxel of the patch in the stored array; negative where it sticks out."""
        names = [m for m, a in zip(self.store.task.modalities, acquired, strict=True) if a]
        # A withheld modality must not even widen the volume that patches are drawn from.
        region = stored.geometry.box(names).relative_to(stored.geometry.box())
        do, pick, *position = uniform(torch.tensor([key]), "patch", 5)[0].tolist()
        centre = self._tumour_voxel(stored, pick, position[0]) if do < self.foreground else None
        start = []
        for axis, (low, high, size) in enumerate(
            zip(region.lo, region.hi, self.patch_size, strict=True)
        ):
            room = high - low - size
            if room <= 0:
                start.append(low + room // 2)
            elif centre is None:
                start.append(low + int(position[axis] * (room + 1)))
            else:
                start.append(low + min(max(int(centre[axis]) - size // 2 - low, 0), room))
        return start

    def _tumour_voxel(self, stored: StoredCase, u: float, v: float) -> Sequence[int] | None:
        """Draw a labelled voxel: class by ``u``, voxel by ``v``; ``None`` without a tumour."""
        voxels = self._tumour.get(stored.case_id)
        if voxels is None:
            voxels = self._tumour[stored.case_id] = _voxels_by_class(stored)
        if not voxels:
            return None
        of_class = voxels[int(u * len(voxels))]
        flat = of_class[int(v * len(of_class))]
        return [int(i) for i in np.unravel_index(flat, stored.geometry.box().shape)]


class CaseDataset(Dataset[CaseItem]):
    """Read whole cases, for evaluation, each proved by its checksums when it is read first.

    Args:
        store: prepared cohort.
        cases: cases of the store.
        seed: enters every key.
        allowed: what may be used of each case (default: what it acquired).
    """

    def __init__(
        self,
        store: Store,
        cases: Sequence[str],
        seed: int = 0,
        allowed: Mapping[str, Flags] | None = None,
    ) -> None:
        self.store, self.cases, self.seed = store, tuple(cases), seed
        self.allowed = dict(allowed or {})

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> CaseItem:
        stored = self.store.read(self.cases[index], prove=True)
        acquired = self.allowed.get(stored.case_id, stored.acquired)
        volumes = stored.image
        image = torch.zeros(volumes.shape)
        for m in np.flatnonzero(acquired):
            _read(volumes[m], [0, 0, 0], image[m])
        number = number_of(stored.case_id)
        item: CaseItem = {
            "image": image,
            "case_id": stored.case_id,
            "acquired": torch.tensor(acquired),
            "key": torch.tensor(make_key(self.seed, None, number)),
            "stored": stored,
        }
        label = stored.label
        if label is not None:
            item["label"] = torch.from_numpy(label.astype(np.int64))
        return item


class CaseLoader(DataLoader[CaseItem]):
    """Read the next case in a thread while one is worked on."""

    def __iter__(self) -> Iterator[CaseItem]:  # type: ignore[override]  # torch names a private class
        """Yield cases in the order of the sampler."""
        cases: Iterator[CaseItem] = super().__iter__()
        with ThreadPoolExecutor(1, thread_name_prefix="cases") as pool:
            coming = pool.submit(next, cases, None)
            while (case := coming.result()) is not None:
                coming = pool.submit(next, cases, None)
                yield case


def collate_case(items: Sequence[CaseItem]) -> CaseItem:
    """Return the item itself: evaluation takes one case at a time."""
    (item,) = items
    return item


def _read(volume: npt.NDArray[np.generic], start: Sequence[int], out: Tensor) -> None:
    """Copy the box that begins at ``start`` into ``out``, which is 0 where the volume ends."""
    there, here = [], []
    for low, size, room in zip(start, out.shape, volume.shape, strict=True):
        there.append(slice(max(low, 0), max(min(low + size, room), 0)))
        here.append(slice(there[-1].start - low, there[-1].stop - low))
    # A copy of the box and torch's conversion of it are fast; NumPy's conversion of float16 is not.
    out[tuple(here)] = torch.from_numpy(copy_box(volume[tuple(there)]))


def _voxels_by_class(stored: StoredCase) -> list[npt.NDArray[np.int64]]:
    """Return flat positions of up to ``_FOREGROUND_KEPT`` voxels of each class in the case."""
    assert stored.label is not None
    flat = np.ascontiguousarray(stored.label).reshape(-1)
    tumour = np.flatnonzero(flat != 0)  # much faster than looking for non-zero bytes
    classes = flat[tumour]
    kept = []
    for value in np.unique(classes):
        voxels = tumour[classes == value]
        # Evenly spaced, so that the choice is a function of the label alone.
        chosen = np.linspace(0, len(voxels) - 1, min(len(voxels), _FOREGROUND_KEPT))
        kept.append(voxels[chosen.round().astype(np.int64)])
    return kept


def warn_of_padding(
    patch: Size, shapes: Sequence[Sequence[int]], batch_size: int, volumes: int
) -> None:
    """Warn of patches that are far larger than every case.

    ``volumes`` are the patches of a batch times the sequences of each.
    """
    largest = np.max(shapes, axis=0)
    times = np.prod(patch) / np.prod(largest)
    if times >= MOSTLY_PADDING:
        rank_zero_warn(
            f"a patch of {' × '.join(map(str, patch))} voxels is {times:,.0f} times as large as "
            f"any training case ({' × '.join(map(str, largest))}): most of it is padding, and a "
            f"batch of {batch_size} takes {4e-9 * volumes * np.prod(patch):.2g} GB; use a smaller "
            "patch_size."
        )
