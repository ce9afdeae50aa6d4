"""Sphinx roles in docstrings as Markdown: a class is a link, a formula an equation."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

# A section of code in the parser's dialect; "Example:" would be an admonition of prose.
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_MATH = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc|obj):`(?P<tilde>~?)(?P<path>[^`]+)`")
_PAGE = re.compile(r"(?<![\w/(])docs/([\w-]+/[\w-]+)\.md")


def _link(match: re.Match[str]) -> str:
    path = match["path"].removeprefix("!")
    text = path.rsplit(".", 1)[-1] if match["tilde"] else path
    # An optional reference stays plain code where the name is not in the reference.
    return f'<autoref identifier="{path}" optional><code>{text}</code></autoref>'


def markdown(text: str) -> str:
    """Return a docstring with its roles and mentions of pages as Markdown."""
    text = _EXAMPLE.sub("Examples:", text)
    text = _MATH.sub(r"$\1$", text)
    text = _ROLE.sub(_link, text)
    return _PAGE.sub(r"[\1](../\1.md)", text)


class Roles(Extension):
    """Rewrite every docstring when griffe has read it."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
