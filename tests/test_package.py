"""``import pmixseg`` is quick, and every public name can be had from it."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pmixseg
import pmixseg.data
import pmixseg.evaluation
from pmixseg.evaluation.records import sidecar
from tests.processes import Copy


def test_every_public_name_can_be_imported():
    for name in pmixseg.__all__:
        public = getattr(pmixseg, name)
        assert getattr(pmixseg, name) is public
        assert name in dir(pmixseg)
    assert pmixseg.__version__ == importlib.metadata.version("pmixseg")


def test_a_source_tree_that_is_not_installed_has_its_version(monkeypatch):
    """Every result names the version: of this tree, not of what is installed."""

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    written = importlib.metadata.version
    monkeypatch.setattr(
        sidecar, "version", lambda name: (absent if name == "pmixseg" else written)(name)
    )
    assert sidecar._versions()["pmixseg"] == pmixseg.__version__


@pytest.mark.parametrize("package", [pmixseg, pmixseg.data, pmixseg.evaluation])
def test_names_for_type_checkers_are_the_same(package):
    tree = ast.parse(Path(package.__file__).read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    # Written as "X as X": by that alone a type checker knows that the package exports X.
    names = [(node.module, a.name, a.asname) for node in typed.body for a in node.names]
    homes = package._HOMES.items()
    assert names == [(f"{package.__name__}.{m}", n, n) for m, several in homes for n in several]
    assert package.__all__ == sorted(name for _, name, _ in names)


NAMES = ("testing.check_backbone", "callbacks.PmixAlignment", "losses.DiceCE", "data.Fractions")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", NAMES)
def test_rooms_need_no_second_import(name):
    """In a copy of this process that has forgotten the package: the libraries stay imported."""

    def use():
        for module in [m for m in sys.modules if m.partition(".")[0] == "pmixseg"]:
            del sys.modules[module]
        import pmixseg

        parts = [m for m in sys.modules if m.startswith("pmixseg.")]
        assert parts == ["pmixseg.old_paths", "pmixseg.version"]
        assert callable(eval(f"pmixseg.{name}"))
        assert name.partition(".")[0] in dir(pmixseg)

    code, said = Copy(use).join()
    assert code == 0, said


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        _ = pmixseg.magic


def test_import_takes_no_heavy_library():
    code = "import sys, pmixseg; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_answers_at_once():
    """Help, version and a mistyped word need none of the libraries that take seconds to import."""
    code = """
import sys
from contextlib import suppress

from pmixseg.cli import main

for words in (["--help"], ["--version"], ["fi"], ["prepare", "a", "b", "--spcing=1"], ["segment"]):
    with suppress(SystemExit):
        main(words)
print([m for m in ("torch", "numpy", "lightning") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_package_says_that_it_is_typed():
    assert (Path(pmixseg.__file__).parent / "py.typed").exists()


def test_every_export_is_found():
    for name in pmixseg.data.__all__:
        assert getattr(pmixseg.data, name) is not None
    with pytest.raises(AttributeError, match="Nothing"):
        _ = pmixseg.data.Nothing


def test_the_store_needs_no_lightning():
    code = (
        "import sys; from pmixseg.data import Split; import pmixseg.data.keys; "
        "print([m for m in ('lightning', 'torchio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
