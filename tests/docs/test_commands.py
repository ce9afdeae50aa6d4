"""Every command that README and the experiments show is one that the program takes."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from pmixseg.cli import TRAINING, import_modules, parse_plain, segment
from pmixseg.cli.training import TrainingCLI
from pmixseg.task import BRATS
from tests.docs.pages import DOCS, ROOT

TEXTS = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("experiments/*/*.md"))]
FENCE = re.compile(r"^ *```(?P<tag>[^\n]*)\n(?P<body>.*?)^ *```", re.MULTILINE | re.DOTALL)
SHELL = ("bash", "sh", "shell", "console", "")


def commands(path):
    """The arguments of every ``pmixseg`` in a page; shell variables stand as VARIABLE."""
    for fence in FENCE.finditer(path.read_text()):
        if (fence["tag"].split() or [""])[0] not in SHELL:
            continue
        lines = fence["body"].replace("\\\n", " ").splitlines()
        for line in lines:
            text = re.sub(r"\$\(.*?\)|\$\{?\w+\}?", "VARIABLE", line.strip().removeprefix("$ "))
            words = shlex.shlex(text, posix=True, punctuation_chars="|&;>")
            words.whitespace_split = True
            try:
                tokens = list(words)
            except ValueError:  # a quotation over several lines: no command of ours
                continue
            ends = [i for i, token in enumerate(tokens) if set(token) <= set("|&;>")]
            for first, last in itertools.pairwise([-1, *ends, len(tokens)]):
                part = tokens[first + 1 : last]
                if "pmixseg" in part[:8] and not {"install", "docker", "apptainer"} & set(part):
                    yield part[part.index("pmixseg") + 1 :]


SHOWN = [
    pytest.param(words, id=f"{path.relative_to(ROOT)}: {' '.join(words)[:60]}")
    for path in TEXTS
    for words in commands(path)
]


class OnlyParsed(TrainingCLI):
    """Reads the command line and files, and stops there."""

    def instantiate_classes(self):
        pass

    def after_instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


def test_commands_are_found():
    assert len(SHOWN) > 20


@pytest.mark.parametrize("words", SHOWN)
def test_a_command_is_taken(words, checkpoint, monkeypatch):
    monkeypatch.chdir(ROOT)
    if "..." in words or "…" in words or not words or words[0].isupper():
        pytest.skip("a sketch of a command, not one to copy")
    if any(word.startswith("VARIABLE") or word == "--data.task" for word in words):
        pytest.skip("flags or files of the page's own shell")
    if "--import" in words:
        pytest.skip("needs the module that the page's text writes; pages that are run try it")
    words, modules = import_modules(words)
    if words[0] in TRAINING:
        written = [w for w in words if w.endswith((".yaml", ".yml")) and not Path(w).is_file()]
        if written:
            pytest.skip(f"{written[0]} is written by the page's text; pages that are run try it")
        if words[0] != "fit":
            index = next(i for i, w in enumerate(words) if w.startswith("--ckpt_path"))
            gap = words[index] == "--ckpt_path"
            words = [*words[:index], f"--ckpt_path={checkpoint}", *words[index + 1 + gap :]]
        OnlyParsed(words, modules)
    elif words[0] == segment.NAME:
        _, rest = segment.parser_for(BRATS).parse_known_args(words[1:])
        assert not rest
    elif words[-1] not in ("--help", "--version"):
        parse_plain(words)


def test_the_laptop_configuration_is_taken():
    files = [
        f"--config={ROOT}/experiments/brats2018/{n}.yaml" for n in ("data", "laptop", "student")
    ]
    OnlyParsed(["fit", *files, "--data.store=store", "--data.split=Fractions"])
