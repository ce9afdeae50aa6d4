"""Steps of the site's build: equations as MathML, checked links into the repository, commands.

MkDocs calls the functions ``on_…``; griffe, which reads the docstrings, calls :class:`Roles`.

* Equations (``$…$``) become MathML, so that no page needs a script or a font from a network.
* ``repo:path`` is a link to a file of the repository; the build fails where there is no such file.
* The pages of the reference are made: one per public package from its docstrings, and one with
  the help of every command, printed by the program itself.
* Sphinx roles and ``.. math::`` in docstrings become Markdown: links and equations.
* Wide equations scroll, long shell lines wrap, and no flag or name in a table is cut in two.
* Tables take no more room than they need; a picture is a link to itself in full size.
* Fences such as ``bash run`` are executed by the tests; the site shows them as ``bash``.
"""

from __future__ import annotations

import contextlib
import html
import importlib
import io
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from griffe import Extension, Module, Object
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
log = logging.getLogger("mkdocs.plugins.site")

_TAG = re.compile(r"^(\s*```\w+) (?:run|quickstart|test)\b.*$", re.MULTILINE)
_REPO = re.compile(r"\(repo:([^)#\s]*)(#[^)\s]*)?\)")
_EQUATION = re.compile(
    r'<(span|div) class="arithmatex">\s*\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]\s*</\1>', re.DOTALL
)
# A section of code in the parser's dialect; "Example:" would be an admonition of prose.
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_MATH = re.compile(r":math:`([^`]+)`")
# The directive, its first line, and every line that is indented further.
_MATH_BLOCK = re.compile(r"^( *)\.\. math::[ \t]*(.*(?:\n\1[ \t]+\S.*)*)", re.MULTILINE)
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc|obj):`(?P<tilde>~?)(?P<path>[^`]+)`")
_CODE = re.compile(r"<code[ >].*?</code>", re.DOTALL)
_WHOLE = r'<span class="flag">\g<0></span>'
# In the text between tags, of which none holds two hyphens.
_FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w.]*(?:-\w[\w.]*)*")
_IMAGE = re.compile(r'<img [^>]*src="([^"]+)"[^>]*>')
_PAGE = re.compile(r"(?<![\w/(])docs/([\w-]+/[\w-]+)\.md")

STYLE = """<style>
math[display="block"] { display: block math; overflow: auto hidden; padding: 0.2em 0 }
.md-typeset .language-bash code { white-space: pre-wrap }
.md-typeset td code { word-break: normal; overflow-wrap: normal }
.md-typeset table:not([class]) :is(th, td) { min-width: 0; padding: 0.6em 0.8em }
.flag { white-space: nowrap }
math[display="block"] munder > mo:first-child { font-size: 1.4em }
math[display="block"] munder > :nth-child(2) { padding-top: 0.3em }
</style>"""
"""Rules of every page, beside those of the theme."""

PACKAGES = (
    "",
    "backbones",
    "callbacks",
    "data",
    "evaluation",
    "losses",
    "modules",
    "testing",
    "types",
)
"""Packages with public names; the first is pmixseg itself."""


def on_files(files: Any, config: Any) -> Any:
    """Add a page of the reference for each package, and one for the commands."""
    rule = ".md-typeset pre > code { white-space: pre-wrap }"
    wrapped = f"<style>@media (min-width: 45em) {{ {rule} }}</style>"
    pages = {"commands": f"# Commands\n\n{wrapped}\n\n{commands()}\n"}
    for package in PACKAGES:
        name = f"pmixseg.{package}".rstrip(".")
        pages[package or "pmixseg"] = f"# {name}\n\n::: {name}\n"
    for page, content in pages.items():
        files.append(File.generated(config, f"reference/{page}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite a page before it becomes HTML."""
    markdown = _TAG.sub(r"\1", markdown)
    where = page.file.src_uri

    def repo(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        if not (ROOT / path).exists():
            log.warning("%s points to '%s', which is not in the repository", where, path)
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"({config.repo_url}/{kind}/main/{path}{anchor})"

    return _REPO.sub(repo, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Replace equations by MathML, keep flags whole, link pictures; add the rules of style."""
    content = _EQUATION.sub(_mathml, content)
    content = _CODE.sub(lambda code: _FLAG.sub(_WHOLE, code[0]), content)
    return STYLE + _IMAGE.sub(r'<a href="\1">\g<0></a>', content)


def _mathml(match: re.Match[str]) -> str:
    display = "inline" if match["open"] == "(" else "block"
    made = convert(html.unescape(match["tex"]), display=display)
    if "\\" in made:
        log.warning("an equation holds a command that MathML has no form of: %s", match["tex"])
    return made


def commands() -> str:
    """Return a section per command with the help that the program prints."""
    sys.path.insert(0, str(ROOT))
    os.environ["COLUMNS"] = "80"
    sections = [f"## pmixseg\n\n```text\n{_help()}\n```"]
    names = re.findall(r"^    (\w+)\s", _help(), re.MULTILINE)
    for name in names:
        text, rest = _help(name), ""
        if name in ("validate", "test", "predict"):  # of more than a hundred options
            text, rest = text.partition("\n\noptions:")[0], "\n\nIts options are those of `fit`."
        sections.append(f"## {name}\n\n```text\n{text}\n```{rest}")
    return "\n\n".join(sections)


def _help(*command: str) -> str:
    from pmixseg.cli import main

    out, own = io.StringIO(), sys.argv
    sys.argv = ["pmixseg", *command, "--help"]  # the parsers take the program's name from it
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*command, "--help"])
    finally:
        sys.argv = own
    return out.getvalue().replace(" \b[", "[").strip()  # a terminal joins them, a page does not


def _link(match: re.Match[str]) -> str:
    path = match["path"].removeprefix("!")
    text = path.rsplit(".", 1)[-1] if match["tilde"] else path
    # An optional reference stays plain code where the name is not in the reference.
    return f'<autoref identifier="{path}" optional><code>{text}</code></autoref>'


def _display(match: re.Match[str]) -> str:
    indent, tex = match[1], " ".join(match[2].split())
    return f"{indent}$$\n{indent}{tex}\n{indent}$$"


def markdown(text: str) -> str:
    """Return a docstring with its roles and mentions of pages as Markdown."""
    text = _EXAMPLE.sub("Examples:", text)
    text = _MATH_BLOCK.sub(_display, text)
    text = _MATH.sub(r"$\1$", text)
    text = _ROLE.sub(_link, text)
    return _PAGE.sub(r"[\1](../\1.md)", text)


class Roles(Extension):
    """Rewrite every docstring when griffe has read it."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_module_members(self, *, mod: Module, **kwargs: Any) -> None:
        """Ask a package that imports its names at their first use what it exports."""
        if "names_at_first_use" in mod.imports:
            mod.exports = list(importlib.import_module(mod.path).__all__)
