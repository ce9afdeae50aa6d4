"""How a model's data were prepared, as far as its predictions depend on it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pmixseg.data.scans.canonical import NORMALISATION
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import EvaluationSettings


@dataclass(frozen=True)
class Preparation:
    """How the training data were prepared: what a new scan must be brought to.

    Args:
        spacing: voxel size in mm that the model was trained at; ``None``: each scan's own.
        normalisation: name of the intensity normalisation.
        patch: training patch in voxels; the inference window unless settings say otherwise.
        split: name or hash of the split the model was trained on.
        seed: ``everything`` (Lightning's, for the first weights) and ``data`` (patches,
            augmentation, missingness) of that training, as far as known.
        dtype: rounding of the normalised intensities; ``None``: not known.
    """

    spacing: tuple[float, ...] | None = None
    normalisation: str | None = None
    patch: tuple[int, ...] | None = None
    split: str | None = None
    seed: Mapping[str, int] | None = None
    dtype: str | None = None

    def merge(self, data: Any, evaluation: EvaluationSettings, *, fitting: bool) -> Preparation:
        """Take over a data module's preparation, or check it against a checkpoint's.

        Raises:
            InputError: a trained model meets data at another spacing or normalisation.
        """
        theirs = Preparation(
            spacing=None if data.spacing is None else tuple(float(s) for s in data.spacing),
            normalisation=data.normalisation,
            dtype=getattr(data, "dtype", None),
            patch=tuple(data.patch_size),
            split=data.split_name if fitting else self.split,
            seed=_seeds(data) if fitting else self.seed,
        )
        if fitting or self.normalisation is None:
            return theirs
        self.refuse_other(theirs)
        return self

    def refuse_other(self, data: Preparation) -> None:
        """Refuse data that the model of this preparation was not trained for.

        Raises:
            InputError: they have another spacing or normalisation, where both are known.
        """
        if self.normalisation is None or data.normalisation is None:
            return
        for what in ("spacing", "normalisation"):
            if getattr(self, what) != getattr(data, what):
                raise InputError(
                    f"the checkpoint was trained with {what} {getattr(self, what)}, but the data "
                    f"have {getattr(data, what)}; prepare a store with the checkpoint's {what}."
                )

    def window(self, settings: EvaluationSettings, strides: Sequence[int]) -> tuple[int, int, int]:
        """Size of an inference window.

        Raises:
            InputError: neither the settings nor a training gave one, or the backbone's largest
                stride does not divide it.
        """
        size = tuple(settings.window or self.patch or ())
        if len(size) != 3:
            raise InputError("no window size is known; give evaluation.window, three voxel counts.")
        if any(s % strides[-1] for s in size):
            raise InputError(
                f"the window {size} must be divisible by the backbone's largest stride, "
                f"{strides[-1]}; change evaluation.window or data.patch_size."
            )
        return size[0], size[1], size[2]

    def target_spacing(self) -> tuple[float, float, float] | None:
        """Voxel size in mm that a new scan is brought to; ``None`` keeps the scan's own.

        Raises:
            InputError: the model was trained on intensities normalised in another way than scans
                are now.
        """
        if self.normalisation not in (None, NORMALISATION):
            raise InputError(
                f"the model was trained with normalisation '{self.normalisation}', but this "
                f"version of pmixseg makes '{NORMALISATION}'; use the version it was trained with."
            )
        if self.spacing is None:
            return None
        return self.spacing[0], self.spacing[1], self.spacing[2]


def _seeds(data: Any) -> dict[str, int]:
    """The seeds of a training that starts now."""
    given = os.environ.get("PL_GLOBAL_SEED", "")  # where seed_everything leaves it
    found = {"everything": int(given)} if given.isdigit() else {}
    return {**found, "data": int(getattr(data, "seed", 0) or 0)}
