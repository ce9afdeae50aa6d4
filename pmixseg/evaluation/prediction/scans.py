"""Segment a patient's scans: one grid, normalisation, windows, and back to their grid."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations as subsets_of_size
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pmixseg.argument_checks import check_fields
from pmixseg.data.formats.nifti import Source
from pmixseg.data.formats.outputs import code_table
from pmixseg.data.scans.canonical import canonicalise
from pmixseg.data.scans.geometry import Geometry, Spacing
from pmixseg.data.scans.grids import CommonGrid, on_one_grid
from pmixseg.data.scans.normalisation import computed_dtype, normalised
from pmixseg.data.scans.plausibility import judge
from pmixseg.data.training_cases import other_voxels
from pmixseg.describe import COUNT, SHARE, Ranges
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import CasePrediction, EvaluationSettings, predict_case
from pmixseg.evaluation.prediction.postprocess import check_names, check_steps
from pmixseg.evaluation.prediction.segmentation import Segmentation, doubts
from pmixseg.evaluation.prediction.windows import Predictor
from pmixseg.task import Combination, Task

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


@dataclass(frozen=True)
class SegmentSettings:
    """Set how a patient's scans are segmented; the result's JSON file records it.

    Args:
        tta: average over the eight mirrorings of the volume; eight times the work.
        overlap: share of a window that its neighbour covers; ``None``: as the model is evaluated.
        window: inference window in voxels; ``None``: as the model is evaluated.
        precision: ``fp32``, or ``bf16`` autocast.
        postprocess: names of post-processing steps; ``None``: as the model is evaluated.
        reference: modality whose grid the result has, if the scans' grids differ; by default the
            one with the smallest voxels.
        strict: refuse scans on different grids instead of resampling them.
        force: segment scans that look implausible, with a warning.
        dtype: rounding of normalised intensities; ``None``: that of the store the model was
            trained on.

    Raises:
        InputError: a window, overlap, post-processing, precision or rounding that does not exist.
    """

    ranges = Ranges(window=COUNT, overlap=SHARE)

    tta: bool = False
    overlap: float | None = None
    window: tuple[int, int, int] | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    postprocess: Sequence[str] | None = None
    reference: str | None = None
    strict: bool = False
    force: bool = False
    dtype: Literal["float16", "float32"] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_names(self.postprocess or ())

    def over(self, evaluation: EvaluationSettings) -> EvaluationSettings:
        """Return a model's evaluation settings with what is set here instead."""
        steps = evaluation.postprocess if self.postprocess is None else tuple(self.postprocess)
        return replace(
            evaluation,
            overlap=evaluation.overlap if self.overlap is None else self.overlap,
            window=self.window or evaluation.window,
            postprocess=steps,
        )


@dataclass(frozen=True)
class Recipe:
    """What a trained model asks of new scans.

    Args:
        task: modalities, labels and regions.
        window: inference window in voxels.
        evaluation: overlap, blending, post-processing.
        spacing: voxel size in mm to bring scans to; ``None`` keeps theirs.
        dtype: rounding of normalised intensities in training.
        normalisation: name of the one that the model was trained on.
        device: where the network is.
        checkpoint: identity of the file that the weights came from.
        voxels: least and largest side in mm of the voxels it was trained on; ``None``: not known.
        synthetic: whether every case that it was trained on was a phantom's.
    """

    task: Task
    window: tuple[int, int, int]
    evaluation: EvaluationSettings
    spacing: Spacing | None
    dtype: str
    normalisation: str
    device: torch.device
    checkpoint: Mapping[str, str] | None = None
    voxels: tuple[float, float] | None = None
    synthetic: bool = False


def segment_scans(
    predictor: Predictor,
    recipe: Recipe,
    images: Mapping[str, Source],
    settings: SegmentSettings,
    *,
    codes: Mapping[str, int] | None = None,
    name: str = "scan",
    progress: Progress | None = None,
) -> Segmentation:
    """Segment one patient from whatever scans there are.

    The same canonicalisation as ``pmixseg prepare`` and the same prediction as ``pmixseg test``:
    the result for the scans of a combination is the tested one of that combination.

    An image is a file, a (4-D file, channel) or a nibabel image; ``codes`` maps a label to its
    number in the result, by default the class index. ``progress`` gets the windows done and in all.

    Raises:
        InputError: no scan, an unknown modality or one that the network has no input for, damaged
            scans, or scans that look implausible and ``force`` is not set.
    """
    task, where = recipe.task, f"case '{name}'"
    check_steps(recipe.evaluation.postprocess, task)
    chosen = _choose(images, task, predictor.modalities, where)
    codes = _codes(codes, task, where)
    grid = on_one_grid(
        {m: images[m] for m in chosen},
        reference=settings.reference,
        strict=settings.strict,
        where=where,
    )
    dtype = settings.dtype or recipe.dtype
    case = canonicalise(
        grid.images,
        None,
        task,
        spacing=recipe.spacing,
        dtype=computed_dtype(recipe.normalisation, dtype),
        where=where,
    )
    plausibility = judge(case, task)
    if plausibility.findings and not settings.force:
        raise InputError(plausibility.refusal(where))
    notes = [f"{where}: {note}." for note in grid.notes] + plausibility.notes(where)
    sides = case.geometry.grid_spacing
    if other := other_voxels(recipe.voxels, (min(sides), max(sides))):
        notes.append(f"{where}: {other}.")
    if recipe.synthetic and not case.synthetic:
        notes.append(
            f"{where}: the model was trained on synthetic patients alone, so what it makes of a "
            "real one means nothing; use a model that was trained on patients."
        )
    for note in notes:
        warnings.warn(note, stacklevel=4)
    inside = (case.image != 0).any(0)
    case = normalised(case, recipe.normalisation, dtype)
    columns = [task.modalities.index(m) for m in predictor.modalities]
    image = torch.from_numpy(case.image[columns]).to(recipe.device, torch.float32)
    geometry = _in_reference(case.geometry, grid, recipe.spacing)
    facts = _facts(recipe, settings, len(chosen))
    inputs = _inputs(images, chosen, {**grid.digests, **case.digests})
    del case  # its arrays are as large as all windows' sums
    prediction = _predict(predictor, recipe, image, geometry, chosen, settings, progress)
    made = Segmentation(name, prediction, codes, inputs, facts, recipe.checkpoint, tuple(notes))
    doubtful = doubts(made, inside, math.prod(sides) / 1000, where)
    for note in doubtful:
        warnings.warn(note, stacklevel=4)
    return replace(made, warnings=(*made.warnings, *doubtful))


def check_scans(images: object, where: str) -> None:
    """Refuse scans that are not named by their modality."""
    if not isinstance(images, Mapping):
        raise InputError(
            f"{where}: a {type(images).__name__} was given; give a scan for each modality, as in "
            '{"flair": "f.nii.gz"} (`pmixseg segment` takes a folder).'
        )


def _choose(
    images: Mapping[str, Source], task: Task, inputs: Sequence[str], where: str
) -> Combination:
    check_scans(images, where)
    unknown = [m for m in images if m not in task.modalities]
    if unknown or not images:
        raise InputError(
            f"{where}: {' and '.join(map(str, unknown)) or 'no scan'} given, but the model's task "
            f"'{task.name}' knows {', '.join(task.modalities)}; give one or more of these."
        )
    useless = [m for m in images if m not in inputs]
    if useless:
        raise InputError(
            f"{where}: this model has no input for {' and '.join(useless)}, it reads "
            f"{', '.join(inputs)}; leave the others out."
        )
    for modality, image in images.items():
        of_file = isinstance(image, str | Path | tuple)
        if not of_file and getattr(image, "affine", None) is None:
            raise InputError(
                f"{where}: {modality} is a {type(image).__name__}, which does not say how it lies; "
                "give a file, or an image of nibabel: nibabel.Nifti1Image(array, affine)."
            )
    return tuple(m for m in task.modalities if m in images)


def _codes(codes: Mapping[str, int] | None, task: Task, where: str) -> dict[str, int]:
    used = dict(codes or {label: index + 1 for index, label in enumerate(task.labels)})
    if set(used) != set(task.labels) or len({0, *used.values()}) != len(used) + 1:
        raise InputError(
            f"{where}: the codes {used} must give each of {list(task.labels)} a number of its own "
            "other than 0; correct them."
        )
    code_table(used, task, where)  # before the work, not when it is written
    return used


def _in_reference(geometry: Geometry, grid: CommonGrid, spacing: Spacing | None) -> Geometry:
    """Return the way back to the reference scan's axes; the first scan's may differ."""
    reference = grid.reference
    if reference is None or (reference.source_affine, reference.unit) == (
        geometry.source_affine,
        geometry.unit,
    ):
        return geometry
    other = Geometry.of(
        reference.source_shape, reference.affine, spacing, geometry.boxes, reference.unit
    )
    return other if other.grid_shape == geometry.grid_shape else geometry


def _predict(
    predictor: Predictor,
    recipe: Recipe,
    image: Tensor,
    geometry: Geometry,
    combination: Combination,
    settings: SegmentSettings,
    progress: Progress | None,
) -> CasePrediction:
    # The volume as it is, and with tta its seven mirrorings.
    sizes = range(4 if settings.tta else 1)
    mirrorings = [axes for size in sizes for axes in subsets_of_size((1, 2, 3), size)]
    half = settings.precision == "bf16"
    prediction: CasePrediction | None = None
    total: Tensor | None = None
    for done, axes in enumerate(mirrorings):
        # Off where it is not asked for, whatever a caller has on: the labels are the model's own.
        with torch.autocast(recipe.device.type, torch.bfloat16 if half else None, enabled=half):
            prediction = next(
                predict_case(
                    predictor,
                    image.flip(axes) if axes else image,
                    geometry,
                    recipe.task,
                    [combination],
                    recipe.window,
                    recipe.evaluation,
                    progress=part_of(progress, done, len(mirrorings)),
                )
            )
        back = prediction.probabilities.flip(axes) if axes else prediction.probabilities
        total = back if total is None else total.add_(back)
    assert prediction is not None  # there is always the volume as it is
    assert total is not None
    prediction.probabilities = total.div_(len(mirrorings))
    return prediction


def part_of(progress: Progress | None, done: int, parts: int) -> Progress | None:
    """Return what a part of the work calls, as if all parts were of equal size."""
    if progress is None:
        return None
    report = progress
    return lambda windows, total: report(done * total + windows, parts * total)


def _facts(recipe: Recipe, settings: SegmentSettings, n_present: int) -> dict[str, Any]:
    used = recipe.evaluation
    return {
        **asdict(settings),
        "window": list(recipe.window),
        "overlap": used.overlap,
        "blend": used.blend,
        "postprocess": list(used.postprocess),
        "temperature": used.temperature(n_present),
        "normalisation": recipe.normalisation,
        "spacing": None if recipe.spacing is None else list(recipe.spacing),
        "device": recipe.device.type,
    }


def _inputs(
    images: Mapping[str, Source], chosen: Combination, digests: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    sources = {}
    for modality in chosen:
        source = images[modality]
        path = source[0] if isinstance(source, tuple) else source
        named = path if isinstance(path, Path | str) else path.get_filename()
        facts = {"file": Path(named).name if named else "in memory"}
        if isinstance(source, tuple):
            facts["channel"] = str(source[1])
        if modality in digests:
            facts["sha256"] = digests[modality]
        sources[modality] = facts
    return sources
