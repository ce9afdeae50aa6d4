"""Seeded mutations of what a user can give, each judged: right, one sentence, or a fault.

A generator of further inputs (checkpoints, flags, the environment) is one class: derive it from
:class:`Generator`, and add an instance to ``GENERATORS`` of a test module beside
``test_data_inputs.py``.
"""

import contextlib
import io
import re
import shutil
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pmixseg.cli import main
from pmixseg.errors import InputError


@dataclass(frozen=True)
class Answer:
    """What a command did: its exit code, what it printed, and a traceback that it should not."""

    code: int | None
    text: str
    traceback: str = ""


class Generator(ABC):
    """One kind of input: how it is made, damaged, used, and when the result is right."""

    name: str

    @abstractmethod
    def damage(self, folder: Path, random: np.random.Generator) -> str:
        """Make one input in a new folder and damage it; return what was done, in words."""

    @abstractmethod
    def use(self, folder: Path) -> Answer:
        """Give it to the product."""

    @abstractmethod
    def is_right(self, folder: Path) -> bool:
        """Whether the result of exit code 0 is what the damaged input truly says."""

    def shrink(self, folder: Path) -> None:  # noqa: B027  # most inputs are small as they are
        """Make the input of a fault smaller; one damage of a small input is small already."""


@dataclass
class Tally:
    """Counts of a campaign, and its faults."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def table(self) -> str:
        names = sorted({name for name, _ in self.counts})
        return "\n".join(
            f"{name:16s}"
            + "  ".join(f"{v} {self.counts[name, v]}" for v in ("right", "sentence", "fault"))
            for name in names
        )


TOTAL = Tally()
"""Of all campaigns of this process."""


def verdict(generator: Generator, folder: Path, answer: Answer) -> str:
    if answer.traceback:
        return "fault"
    if answer.code == 0:
        return "right" if generator.is_right(folder) else "fault"
    told = answer.text.strip()
    return "sentence" if told and "Traceback" not in told else "fault"


def campaign(generator: Generator, seeds: range, work: Path, keep: Path, tally: Tally) -> None:
    """Run a generator on seeds; the folder of a fault is kept, its first of a kind only."""
    seen: set[str] = set()
    for seed in seeds:
        folder = work / f"{generator.name}-{seed}"
        folder.mkdir(parents=True)
        done = generator.damage(folder, np.random.default_rng(seed))
        answer = generator.use(folder)
        judgement = verdict(generator, folder, answer)
        for counts in (tally.counts, TOTAL.counts):
            counts[generator.name, judgement] += 1
        if judgement == "fault":
            last = answer.traceback.strip().splitlines()[-1:] or [answer.text.strip()[-300:]]
            for faults in (tally.faults, TOTAL.faults):
                faults.append(f"{generator.name} seed {seed}: {done}: {last[0]}")
            place = "".join(answer.traceback.splitlines()[-3:-1])
            if place not in seen:
                seen.add(place)
                generator.shrink(folder)
                shutil.copytree(folder, keep / folder.name, dirs_exist_ok=True)
        shutil.rmtree(folder)


def run(call: Callable[[], int]) -> Answer:
    """Call something of the product, as the command line would be called."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code: int | None = call()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except KeyboardInterrupt:
            raise  # the campaign itself is stopped
        except BaseException:
            return Answer(None, said.getvalue(), traceback.format_exc())
    return Answer(code, said.getvalue())


def asked(ask: Callable[[], object]) -> Answer:
    """Ask the library, with an exit code as the command line gives it."""

    def call() -> int:
        try:
            ask()
        except InputError as error:
            print(error)  # noqa: T201  # as the command does
            return 1
        return 0

    return run(call)


def command(*args: object) -> Answer:
    """Run a command in this process; what it prints through rich's console is not caught."""
    return run(lambda: main([str(a) for a in args]))


# ------------------------------------------------------------------- mutations


def flip_bits(raw: bytes, random: np.random.Generator, limit: int | None = None) -> bytes:
    """One to three flipped bits among the first ``limit`` bytes."""
    made = bytearray(raw)
    for at in random.integers(0, min(limit or len(made), len(made)), random.integers(1, 4)):
        made[int(at)] ^= 1 << int(random.integers(8))
    return bytes(made)


def damage_text(text: str, random: np.random.Generator) -> bytes:
    """Cut, double, swap or replace a piece of a text, or flip bits of it."""
    a, b = sorted(random.integers(0, len(text) + 1, 2).tolist())
    lines = text.splitlines(keepends=True) or [""]
    at = int(random.integers(len(lines)))
    number = re.compile(r"\d+(\.\d+)?")
    odd = ("", "null", "-1", "1e999", "NaN", '"', "{", "[", "\0", "ü", "true", "[[]]", "*a", "!!x")
    changes = [
        lambda: (text[:a] + text[b:]).encode(),
        lambda: (text[:b] + text[a:]).encode(),
        lambda: (text[:a] + odd[int(random.integers(len(odd)))] + text[min(a + 3, b) :]).encode(),
        lambda: text[:a].encode(),
        lambda: flip_bits(text.encode(), random),
        lambda: text.encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + text.encode(),
        # What people and spreadsheets do to a file by hand:
        lambda: "".join([*lines[: at + 1], *lines[at:]]).encode(),
        lambda: "".join([*lines[:at], *lines[at + 1 :]]).encode(),
        lambda: "".join([*lines[:at], " " + lines[at], *lines[at + 1 :]]).encode(),
        lambda: "".join([*lines[:at], "\t" + lines[at].lstrip(), *lines[at + 1 :]]).encode(),
        lambda: text.replace("\n", "\r\n").encode(),
        lambda: text.replace(",", ";").encode(),
        lambda: number.sub(lambda m: m[0].replace(".", ","), text).encode(),
        lambda: number.sub(lambda m: f'"{m[0]}"', text, count=a % 9 + 1).encode(),
        lambda: (text + "\n\n  \n").encode(),
        lambda: text.upper().encode(),
        lambda: text.replace('"', "\u201d").replace("'", "\u2019").encode(),
        lambda: text.encode("cp1252", "replace"),
    ]
    return changes[int(random.integers(len(changes)))]()
