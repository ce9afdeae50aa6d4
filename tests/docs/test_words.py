"""Pages and docstrings as a reader meets them: links, three screens, telling first lines."""

import ast
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import tests
from tests.docs.pages import DOCS, ROOT

LONGEST_SENTENCE = 25
MOST_WORDS = 1100
LINK = re.compile(r"(?<!!)\[[^]]*\]\(([^)\s]+)\)|!\[[^]]*\]\(([^)\s]+)\)")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "experiments").rglob("*.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
]


def prose(text):
    """A page without code, tables, headings and addresses."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    return "\n".join(line for line in text.splitlines() if not line.startswith(("|", "#")))


def sentences(text):
    plain = re.sub(r"^\s*[*-] ", "\n", prose(text), flags=re.MULTILINE)
    return [s for s in re.split(r"(?<=[.!?])\s+|\n\n", plain) if s.strip()]


def test_sentences_are_told_apart():
    text = "# Title\n\nOne two. Three\nfour!\n\n| a | b |\n\n```bash\ncode. code.\n```\n* five"
    assert [len(s.split()) for s in sentences(text)] == [2, 2, 1]


def test_no_sentence_of_the_readme_is_long():
    text = (ROOT / "README.md").read_text()
    assert [s for s in sentences(text) if len(s.split()) > LONGEST_SENTENCE] == []


def test_the_readme_fits_three_screens():
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = [a or b for a, b in LINK.findall(page.read_text())]
    inside = [link.split("#")[0] for link in links if "://" not in link and link[0] != "#"]
    assert [link for link in inside if not (page.parent / link).exists()] == []


def test_an_item_of_a_list_is_not_the_end_of_a_paragraph():
    """Without an empty line before it, where the item before ends with a paragraph of its own."""
    joined = [
        f"{page.name}: {item}"
        for page in DOCS.rglob("*.md")
        for item in re.findall(r"^    .*\n((?:\d+\.|[-*]) .*)", page.read_text(), re.MULTILINE)
    ]
    assert not joined


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs", reason="needs pmixseg[docs]")
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_flags_stay_on_one_line_and_pictures_are_links(hooks):
    page = '<p>a--b <code>x --a.b-c --d=1</code> <img alt="p" src="../p.png" /></p>'
    made = hooks.on_page_content(page, None, None, None)
    for flag in ("--a.b-c", "--d"):
        assert f'<span class="flag">{flag}</span>' in made
    assert "<p>a--b <code>" in made
    assert '<a href="../p.png"><img alt="p" src="../p.png" /></a>' in made


def test_an_equation_of_a_docstring_is_an_equation_of_its_page(hooks):
    blocks = "Add.\n\n.. math:: a\n          = b\n\nwith\n\n    .. math::\n        c\n\nand."
    made = "Add.\n\n$$\na = b\n$$\n\nwith\n\n    $$\n    c\n    $$\n\nand."
    assert hooks.markdown(blocks) == made


def test_the_table_of_layers_names_every_module():
    table = (DOCS / "design" / "index.md").read_text()
    modules = {path.stem for path in (ROOT / "pmixseg").iterdir() if path.suffix in (".py", "")}
    modules -= {"__init__", "__pycache__"}
    assert [m for m in sorted(modules) if f"`{m}`" not in table and f"`{m}.py`" not in table] == []


def test_pages_that_code_names_exist():
    """Docstrings say where the method stands, as ``docs/method/anchors.md``."""
    named = {
        (name, path)
        for folder in ("pmixseg", "tests", "experiments")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".md")
        for name in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text())
    }
    assert named
    assert {(n, str(p)) for n, p in named if not (ROOT / n).exists()} == set()


RECIPES = sorted((ROOT / "tests").rglob("golden/make_*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_golden_numbers_say_how_they_are_run(path):
    """They need packages that clash with ours, so nothing else runs them."""
    text = path.read_text()
    assert str(path.relative_to(ROOT)) in ast.get_docstring(ast.parse(text))
    for place in re.findall(r"^sys\.path\.insert\(0, str\((.+)\)\)$", text, re.MULTILINE):
        assert eval(place, {"HERE": path.parent}) == ROOT


def test_the_table_of_reported_mistakes_names_tests_that_exist():
    rows = re.findall(r"(\S+\.py)::(test_\w+)", tests.__doc__)
    assert len(rows) > 60
    for file, name in rows:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"


def test_the_distances_of_the_page_are_those_of_the_package():
    from pmixseg.losses import DISTANCES

    page = (DOCS / "method" / "alignment.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(DISTANCES) <= listed


def test_the_glossary_has_at_most_fifteen_words():
    page = Path(DOCS / "start" / "glossary.md").read_text()
    assert len([line for line in page.splitlines() if line.startswith("| ")]) - 1 <= 15


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
            public = getattr(module, name)
            if inspect.isclass(public) or inspect.isfunction(public):
                firsts[name] = inspect.getdoc(public).split()[0]
    assert len(firsts) > 90
    odd = {n: w for n, w in firsts.items() if w.lower() in NO_VERB or not w.isalpha()}
    assert odd == {}
    third_person = {n: w for n, w in firsts.items() if w.endswith("s") and not w.endswith("ss")}
    assert third_person == {}


def test_functions_begin_with_a_verb():
    """By the same words; a property may name what it is."""
    odd = []
    for path in sorted((ROOT / "pmixseg").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
            if text and not any("property" in ast.unparse(one) for one in node.decorator_list):
                word = text.split()[0].rstrip(",:;.")
                noun = not word.isalpha() or re.search("[^s]s$", word) or word.lower() in NO_VERB
                odd += [f"{path.relative_to(ROOT)}: {node.name}: {word}"] if noun else []
    assert odd == []
