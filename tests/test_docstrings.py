"""Every docstring says something by itself."""

import ast
import importlib
import inspect
from pathlib import Path

ROOT = Path(__file__).parents[1]


def docstrings():
    """Where each docstring stands, and its first line."""
    for path in sorted((ROOT / "pmixseg").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text:
                    name = getattr(node, "name", path.stem)
                    yield f"{path.relative_to(ROOT)}: {name}", text.splitlines()[0]


def test_there_are_docstrings():
    assert len(list(docstrings())) > 1000


def test_none_only_points_elsewhere():
    assert [where for where, first in docstrings() if first.lower().startswith("see ")] == []


PUBLIC = (
    *("pmixseg", "pmixseg.backbones", "pmixseg.callbacks", "pmixseg.data", "pmixseg.evaluation"),
    *("pmixseg.losses", "pmixseg.modules", "pmixseg.testing"),
)
NO_VERB = {
    *("a", "an", "the", "all", "any", "each", "every", "how", "in", "one", "several", "some"),
    *("this", "two", "what", "when", "where", "whether", "which", "whose"),
}


def test_public_classes_and_functions_begin_with_a_verb():
    """As far as a word list can tell: no article, no question word, no third person, no noun."""
    firsts = {}
    for module in map(importlib.import_module, PUBLIC):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                firsts[name] = inspect.getdoc(thing).split()[0]
    assert len(firsts) > 90
    odd = {n: w for n, w in firsts.items() if w.lower() in NO_VERB or not w.isalpha()}
    assert odd == {}
    third_person = {n: w for n, w in firsts.items() if w.endswith("s") and not w.endswith("ss")}
    assert third_person == {}
