"""Map module paths of earlier versions to those of this one: checkpoints, YAML and imports.

And import public names at their first use.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_INTO_FOLDERS = {
    "backbones.layers": ("blocks", "lean", "norm", "regions"),
    "data.cohorts": ("cases", "dataset_json", "inspection", "layouts"),
    "data.formats": ("nifti", "outputs"),
    "data.scans": ("canonical", "geometry", "grids", "plausibility", "sequences", "volumes"),
    "data.store": ("prepare", "store", "stored"),
    "evaluation.comparison": ("monotonicity", "paired_tests"),
    "evaluation.gap": ("latents",),
    "evaluation.prediction": ("cases", "postprocess", "segmentation", "windows"),
    "evaluation.records": (
        "curves",
        "examples",
        "grouped",
        "published",
        "records",
        "sidecar",
        "tables",
    ),
    "evaluation.report": ("figures", "pictures", "summary"),
    "evaluation.scores": (
        "calibration",
        "case_scores",
        "conventions",
        "lesions",
        "metrics",
        "regions",
        "surfaces",
    ),
    "losses.distances": ("gaussian", "joint", "samples"),
    "modules.training": ("optimization",),
}
"""Folder -> modules in it that lay beside it."""

_RENAMED = {
    "backbones.attention": "backbones.mmformer",
    "backbones.unwritten": "backbones.layers.bf16_gradients",
    "data.phantom": "data.phantom.cohort",
    "data.phantom_anatomy": "data.phantom.anatomy",
    "data.phantom_contrast": "data.phantom.contrast",
    "data.phantom_task": "data.phantom.task",
    "data.phantom_tumour": "data.phantom.tumour",
    "evaluation.comparison_text": "evaluation.comparison.comparison",
    "evaluation.directions": "evaluation.records.measures",
    "evaluation.gap_changes": "evaluation.gap.changes",
    "evaluation.gap_figure": "evaluation.report.figures",
    "evaluation.matching": "evaluation.comparison.compare",
    "evaluation.report": "evaluation.report.page",
    "evaluation.segment": "evaluation.prediction.scans",
    "evaluation.statistics": "evaluation.comparison.comparison",
    "inference.official": "inference.published_weights",
    "losses.bounds": "evaluation.gap.information",
    "losses.gap": "evaluation.gap.measure",
    "modules.results": "modules.recording",
}
"""Module -> what it is called today."""

MOVED = {f"pmixseg.{old}": f"pmixseg.{new}" for old, new in _RENAMED.items()} | {
    f"pmixseg.{folder.rpartition('.')[0]}.{name}": f"pmixseg.{folder}.{name}"
    for folder, names in _INTO_FOLDERS.items()
    for name in names
}
"""Module of version 2ddf8fe -> module of today. Nothing new belongs here: checkpoints written since
name public paths (:func:`pmixseg.describe.public_path`)."""


def current_path(class_path: str) -> str:
    """Translate the dotted path of a class in a checkpoint or YAML file, where its module moved.

    Example:
        >>> current_path("pmixseg.evaluation.conventions.Conventions")
        'pmixseg.evaluation.scores.conventions.Conventions'
        >>> current_path("pmixseg.losses.DiceCE")
        'pmixseg.losses.DiceCE'
    """
    module, _, name = class_path.rpartition(".")
    return f"{MOVED[module]}.{name}" if module in MOVED else class_path


def current_word(word: str) -> str:
    """Translate the class path in a word of a command line: ``--flag=path``, or a path alone.

    Example:
        >>> current_word("--model.scheduler=pmixseg.modules.optimization.OneCycle")
        '--model.scheduler=pmixseg.modules.training.optimization.OneCycle'
    """
    flag, sign, value = word.rpartition("=")
    return flag + sign + current_path(value)


def current_yaml(value: Any) -> Any:
    """Translate the class paths of a configuration, at any depth.

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


def names_at_first_use(
    package: str, homes: Mapping[str, Sequence[str]], packages: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package that imports late (PEP 562).

    ``homes`` says which public names each of its modules has; ``packages`` are given whole.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def getattr_of_package(name: str) -> Any:
        if name in packages:
            return importlib.import_module(f"{package}.{name}")
        if name not in home:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    def dir_of_package() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home, *packages})

    return getattr_of_package, dir_of_package, sorted(home)


def names_of(module: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a folder with the name of an earlier module, now ``module``."""

    def getattr_of_folder(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(module), name)

    return getattr_of_folder
