"""Every docstring says something by itself."""

import ast
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
