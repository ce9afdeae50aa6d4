"""Map module paths of earlier versions to those of this one: checkpoints, YAML and imports."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "pmixseg.backbones.attention": "pmixseg.backbones.mmformer",
    "pmixseg.backbones.blocks": "pmixseg.backbones.layers.blocks",
    "pmixseg.backbones.lean": "pmixseg.backbones.layers.lean",
    "pmixseg.backbones.norm": "pmixseg.backbones.layers.norm",
    "pmixseg.backbones.regions": "pmixseg.backbones.layers.regions",
    "pmixseg.backbones.unwritten": "pmixseg.backbones.layers.bf16_gradients",
    "pmixseg.data.canonical": "pmixseg.data.scans.canonical",
    "pmixseg.data.cases": "pmixseg.data.cohorts.cases",
    "pmixseg.data.dataset_json": "pmixseg.data.cohorts.dataset_json",
    "pmixseg.data.geometry": "pmixseg.data.scans.geometry",
    "pmixseg.data.grids": "pmixseg.data.scans.grids",
    "pmixseg.data.inspection": "pmixseg.data.cohorts.inspection",
    "pmixseg.data.layouts": "pmixseg.data.cohorts.layouts",
    "pmixseg.data.nifti": "pmixseg.data.formats.nifti",
    "pmixseg.data.outputs": "pmixseg.data.formats.outputs",
    "pmixseg.data.phantom": "pmixseg.data.phantom.cohort",
    "pmixseg.data.phantom_anatomy": "pmixseg.data.phantom.anatomy",
    "pmixseg.data.phantom_contrast": "pmixseg.data.phantom.contrast",
    "pmixseg.data.phantom_task": "pmixseg.data.phantom.task",
    "pmixseg.data.phantom_tumour": "pmixseg.data.phantom.tumour",
    "pmixseg.data.plausibility": "pmixseg.data.scans.plausibility",
    "pmixseg.data.prepare": "pmixseg.data.store.prepare",
    "pmixseg.data.sequences": "pmixseg.data.scans.sequences",
    "pmixseg.data.store": "pmixseg.data.store.store",
    "pmixseg.data.stored": "pmixseg.data.store.stored",
    "pmixseg.data.volumes": "pmixseg.data.scans.volumes",
    "pmixseg.evaluation.calibration": "pmixseg.evaluation.scores.calibration",
    "pmixseg.evaluation.case_scores": "pmixseg.evaluation.scores.case_scores",
    "pmixseg.evaluation.cases": "pmixseg.evaluation.prediction.cases",
    "pmixseg.evaluation.comparison_text": "pmixseg.evaluation.comparison.comparison",
    "pmixseg.evaluation.conventions": "pmixseg.evaluation.scores.conventions",
    "pmixseg.evaluation.curves": "pmixseg.evaluation.records.curves",
    "pmixseg.evaluation.directions": "pmixseg.evaluation.records.measures",
    "pmixseg.evaluation.examples": "pmixseg.evaluation.records.examples",
    "pmixseg.evaluation.figures": "pmixseg.evaluation.report.figures",
    "pmixseg.evaluation.gap_changes": "pmixseg.evaluation.gap.changes",
    "pmixseg.evaluation.gap_figure": "pmixseg.evaluation.report.figures",
    "pmixseg.evaluation.grouped": "pmixseg.evaluation.records.grouped",
    "pmixseg.evaluation.latents": "pmixseg.evaluation.gap.latents",
    "pmixseg.evaluation.lesions": "pmixseg.evaluation.scores.lesions",
    "pmixseg.evaluation.matching": "pmixseg.evaluation.comparison.compare",
    "pmixseg.evaluation.metrics": "pmixseg.evaluation.scores.metrics",
    "pmixseg.evaluation.monotonicity": "pmixseg.evaluation.comparison.monotonicity",
    "pmixseg.evaluation.paired_tests": "pmixseg.evaluation.comparison.paired_tests",
    "pmixseg.evaluation.pictures": "pmixseg.evaluation.report.pictures",
    "pmixseg.evaluation.postprocess": "pmixseg.evaluation.prediction.postprocess",
    "pmixseg.evaluation.published": "pmixseg.evaluation.records.published",
    "pmixseg.evaluation.records": "pmixseg.evaluation.records.records",
    "pmixseg.evaluation.regions": "pmixseg.evaluation.scores.regions",
    "pmixseg.evaluation.report": "pmixseg.evaluation.report.page",
    "pmixseg.evaluation.segment": "pmixseg.evaluation.prediction.scans",
    "pmixseg.evaluation.segmentation": "pmixseg.evaluation.prediction.segmentation",
    "pmixseg.evaluation.sidecar": "pmixseg.evaluation.records.sidecar",
    "pmixseg.evaluation.statistics": "pmixseg.evaluation.comparison.comparison",
    "pmixseg.evaluation.summary": "pmixseg.evaluation.report.summary",
    "pmixseg.evaluation.surfaces": "pmixseg.evaluation.scores.surfaces",
    "pmixseg.evaluation.tables": "pmixseg.evaluation.records.tables",
    "pmixseg.evaluation.windows": "pmixseg.evaluation.prediction.windows",
    "pmixseg.inference.official": "pmixseg.inference.published_weights",
    "pmixseg.losses.bounds": "pmixseg.evaluation.gap.information",
    "pmixseg.losses.gap": "pmixseg.evaluation.gap.measure",
    "pmixseg.losses.gaussian": "pmixseg.losses.distances.gaussian",
    "pmixseg.losses.joint": "pmixseg.losses.distances.joint",
    "pmixseg.losses.samples": "pmixseg.losses.distances.samples",
    "pmixseg.modules.optimization": "pmixseg.modules.training.optimization",
    "pmixseg.modules.results": "pmixseg.modules.recording",
}
"""Module of version 2ddf8fe -> module of today. Nothing new belongs here: checkpoints written since
name public paths (:func:`pmixseg.describe.public_path`)."""


def current_path(class_path: str) -> str:
    """Translate the dotted path of a class, where its module has moved since.

    Args:
        class_path: as a checkpoint or a YAML file names it.

    Example:
        >>> current_path("pmixseg.evaluation.conventions.Conventions")
        'pmixseg.evaluation.scores.conventions.Conventions'
        >>> current_path("pmixseg.losses.DiceCE")
        'pmixseg.losses.DiceCE'
    """
    module, _, name = class_path.rpartition(".")
    return f"{MOVED[module]}.{name}" if module in MOVED else class_path


def current_word(word: str) -> str:
    """Translate the class path in a word of a command line.

    Args:
        word: ``--flag=path``, or a path alone.

    Example:
        >>> current_word("--model.scheduler=pmixseg.modules.optimization.OneCycle")
        '--model.scheduler=pmixseg.modules.training.optimization.OneCycle'
    """
    flag, sign, value = word.rpartition("=")
    return flag + sign + current_path(value)


def current_yaml(value: Any) -> Any:
    """Translate the class paths of a configuration, at any depth.

    Args:
        value: a parsed YAML file.

    Example:
        >>> current_yaml({"class_path": "pmixseg.evaluation.cases.EvaluationSettings"})
        {'class_path': 'pmixseg.evaluation.prediction.cases.EvaluationSettings'}
    """
    if isinstance(value, list):
        return [current_yaml(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: current_path(inner)
        if key == "class_path" and isinstance(inner, str)
        else current_yaml(inner)
        for key, inner in value.items()
    }


class MovedModules(MetaPathFinder, Loader):
    """Import a module by its earlier path, with a ``DeprecationWarning`` that names today's.

    Stands behind Python's own finders, so a module of today is never hidden.

    Example:
        >>> from pmixseg.data.layouts import find_cases
        >>> find_cases.__module__
        'pmixseg.data.cohorts.layouts'
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answer for modules that have moved, and for no others."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put today's module in the place of the one that was asked for."""
        old = module.__name__
        warnings.warn(f"{old} is {MOVED[old]} now", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(MOVED[old])


def names_of(module: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a folder that has the name of an earlier module.

    Args:
        module: where the names of the earlier module are today.
    """

    def getattr_of_folder(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(module), name)

    return getattr_of_folder
