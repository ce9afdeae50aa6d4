"""Recognise the MRI sequence in a name: ``x7_T1_post_Gd``, ``t2f``, ``ax T2 FLAIR``.

A scan taken for another sequence is segmented all the same, and wrongly. So a name is read as a
whole, and where it leaves a doubt it means nothing: plain T1 is never read from a name that also
holds a word for contrast agent, T2 never from one that says FLAIR, T2*, STIR or a map.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

_WORDS: Mapping[str, str] = {
    "t1": "t1",
    "t2": "t2",
    "flair": "flair fla darkfluid",
    # Contrast agent, whatever it stands beside.
    "contrast": (
        "ce gd gad gado gadolinium gddtpa km contrast contraste contrasted kontrast kontrastmittel "
        "enhanced injected injecte inject postcontrast postgd postgad postkm postce gadovist "
        "gadavist dotarem clariscan magnevist omniscan prohance multihance vueway elucirem"
    ),
    # Contrast agent behind T1; elsewhere initials, or after an operation.
    "after": "c post plus pc cc cm mdc",
    "without": (
        "pre native nativ unenhanced precontrast pregd pregad prekm noncontrast nonenhanced "
        "nocontrast nogd nokm nonce noce"
    ),
    # Other images that are made by, or from, a sequence of T1 or T2.
    "other": (
        "star map maps mapping stir swi swan dwi adc dti dce dsc perf perfusion pwi asl hemo haemo "
        "medic mra angio pd pdw subtraction subtr ratio trace tracew diffusion bold fmri mrs"
    ),
    "derived": "sub diff rho tof",  # the same behind a sequence; elsewhere parts of other words
    "inversion": "tirm",
    "t2star": "gre ffe epi ep2d",  # gradient echoes: T1 or T2*, never T2
    "neutral": (
        "w wi weighted ax axial tra trans transversal transverse sag sagittal cor coronal 3d 2d se "
        "tse fse mprage mpr mp2rage spgr fspgr bravo space spc vibe tfe tfl ir irfspgr cube vista "
        "blade propeller brain bet with"
    ),
}
_KINDS = {word: kind for kind, words in _WORDS.items() for word in words.split()}
_NOT = frozenset({"pre", "non", "no", "without", "wo", "ohne", "sans", "senza", "sin", "sem"})
_OPERATED = frozenset(
    {"op", "operative", "surgery", "surgical", "treatment", "rt", "chemo", "resection", "biopsy"}
)
"""After ``pre`` and ``post``: a time, no contrast agent."""

_AGENT_LIKE = re.compile(
    r"contr(?!ol)|kontr(?!ol)|gado|enhanc|inj|^gd|gd$|km$"
    r"|^post(?!op|proc|erior|treat|surg|rt|rad|chemo|resect|biop)"
)
"""In a word that is not known otherwise."""

_LABELS = frozenset(
    {"seg", "segm", "segmentation", "label", "labels", "mask", "brainmask", "tumormask", "truth"}
    | {"groundtruth", "gt", "roi", "probabilities", "entropy"}
)
"""Words of files that are no scan; the last two are files that ``pmixseg segment`` writes."""

_NEVER = {"inversion": ("t1", "t2"), "t2star": ("t2",)}
"""Kind of a word -> sequences that an image with such a word in its name is not."""

_ANOTHER = "makes it another image than"
"""Part of a phrase by which a name is surely not a common sequence's."""

_SHOWN = {"t1": "T1", "t2": "T2", "flair": "FLAIR", "t1ce": "contrast-enhanced T1"}


@dataclass(frozen=True)
class Reading:
    """What a name means.

    Args:
        kind: ``scan`` of a modality of the task, ``foreign`` if it is surely a common sequence that
            the task lacks, ``other`` image such as a map, ``label`` map or result, or ``unknown``.
        modality: of the scan.
        doubt: a phrase that says why it is foreign or unknown.
    """

    kind: Literal["scan", "foreign", "other", "label", "unknown"]
    modality: str | None = None
    doubt: str = ""


@dataclass(frozen=True)
class _Piece:
    """A part of a name: a word, or what one is made of (``t1`` and ``ce`` of ``t1ce``)."""

    text: str
    kind: str
    word: int


def modality_of(name: str, modalities: Iterable[str]) -> str | None:
    """Return the modality that a name means, if it surely means one.

    Args:
        name: of a channel or a file, without its ending.
        modalities: names that a task gives its sequences, in any of the usual ways of writing.

    Example:
        >>> modality_of("x7_T1_post_Gd", ("flair", "t1ce", "t1", "t2"))
        't1ce'
        >>> modality_of("T1-weighted", ("t1_native", "T1-Gd"))
        't1_native'
    """
    return read_name(name, modalities).modality


def read_name(name: str, modalities: Iterable[str]) -> Reading:
    """Read the name of a file, without folder and ending.

    A modality of the task that is no T1, T2 or FLAIR is looked for by its own name.

    Example:
        >>> read_name("t2_star", ("t1", "t2")).doubt
        "'star' makes it another image than T2"
    """
    names = list(modalities)
    words = _words(name)
    own, rest = _named_outright(words, names)
    pieces = _pieces(rest)
    base = _base(pieces)
    # A label map, unless a sequence comes after the word that says so.
    labels = [i for i, word in enumerate(rest) if word in _LABELS]
    if labels:
        sure = not any(pieces[i].word > labels[-1] for i in base)
        return Reading("label") if sure else Reading("unknown", doubt="it may be a label map")
    # A modality of the task that is named as it is.
    if own:
        tells = {"contrast", "after"}
        clash = base or any(p.kind in tells and p.word > own[0][1] for p in pieces)
        if len(own) > 1 or clash:
            return Reading("unknown", doubt="it names more than one sequence")
        return Reading("scan", own[0][0])
    # A common sequence, in whatever words, and which modality of the task it is.
    sequence, doubt = _sequence(pieces)
    if sequence is None:
        return Reading("other" if _ANOTHER in doubt else "unknown", doubt=doubt)
    fitting = [m for m in names if common_sequence(m) == sequence]
    if len(fitting) > 1:
        return Reading("unknown", doubt=f"it may be any of {', '.join(fitting)}")
    if not fitting:
        return Reading("foreign", doubt=f"it is {_SHOWN[sequence]}")
    return Reading("scan", fitting[0])


def _words(name: str) -> list[str]:
    text = name.lower().replace("tumour", "tumor")
    # Of BIDS names, what says who and when but not which sequence; it always comes first.
    text = re.sub(r"^sub-[a-z0-9]+(_ses-[a-z0-9]+)?", "", text).replace("+", " plus ")
    # "T1 C-" is the radiologist's T1 without contrast agent; the hyphen of "t1-c-x7" is a gap.
    text = re.sub(r"(?<![a-z0-9])(t1[a-z]*|c|ce|gd|km)-(?=[_ .]|$)", r"\1 minus ", text)
    return re.findall(r"[^\W_]+", re.sub(r"(?<![a-z0-9])w[ _-]o(?![a-z0-9])", "wo", text))


def _named_outright(
    words: Sequence[str], modalities: Sequence[str]
) -> tuple[list[tuple[str, int]], list[str]]:
    """Find modalities that only their own name tells, and where; return the other words too."""
    meanings = [common_sequence(m) for m in modalities]
    own = [m for m, k in zip(modalities, meanings, strict=True) if not k or meanings.count(k) > 1]
    left = list(words)
    named = []
    for modality in sorted(own, key=len, reverse=True):
        plain = "".join(_words(modality))
        for start in range(len(left)):
            for stop in range(start + 1, len(left) + 1):
                if plain and "".join(left[start:stop]) == plain:
                    left[start:stop] = [""] * (stop - start)
                    named.append((modality, start))
    return named, left


@cache
def common_sequence(modality: str) -> str | None:
    """Tell which common sequence a task's own name for a modality means, if it means one.

    Example:
        >>> common_sequence("T1-Gd"), common_sequence("dwi")
        ('t1ce', None)
    """
    return _sequence(_pieces(_words(modality)))[0]


def _pieces(words: Sequence[str]) -> list[_Piece]:
    """Return words taken apart; what says nothing about a sequence is of kind ``""``."""
    pieces: list[_Piece] = []
    for index, word in enumerate(words):
        before = pieces[-1] if pieces else None
        if word in _OPERATED and before is not None and before.text in ("pre", "post"):
            pieces[-1] = _Piece(before.text, "", before.word)
        pieces += [_Piece(text, kind, index) for text, kind in _parts(word)]
    return _joined(pieces)


@cache
def _parts(word: str) -> list[tuple[str, str]]:
    """Return the pieces of a word: T1 and contrast of ``t1wce``, contrast alone of ``post1``."""
    if word in _KINDS or word == "minus":
        return [(word, _KINDS.get(word, word))]
    kinds: Mapping[str, str] = {w: k for w, k in _KINDS.items() if len(w) > 1}
    if re.search("t1|t2|fla", word):
        # Letters that mean something directly behind a sequence only.
        if parts := _split(word, {**_KINDS, "n": "without", "f": "flair"}):
            # In one word with T1 a "c" is a contrast agent on whichever side it stands.
            return [(t, "contrast" if k == "after" else k) for t, k in parts]
        if re.match(r"t[12](?!\d)", word) or "flair" in word:
            return [(word, "odd")]
    parts = _split(re.sub(r"\d+$", "", word), kinds) or []
    if any(k == "contrast" or t == "post" for t, k in parts):
        return [(word, "after")]
    return [(word, "doubtful" if _AGENT_LIKE.search(word) else "")]


def _split(word: str, kinds: Mapping[str, str]) -> list[tuple[str, str]] | None:
    """Split a word into known words without gaps, the longest first; ``None`` if a rest is left."""
    if not word:
        return []
    for size in range(len(word), 0, -1):
        kind = kinds.get(word[:size])
        if kind is not None and (tail := _split(word[size:], kinds)) is not None:
            return [(word[:size], kind), *tail]
    return None


def _joined(pieces: list[_Piece]) -> list[_Piece]:
    """Join pairs of words with one meaning: ``dark fluid``, ``without contrast``, ``ce-none``."""
    joined: list[_Piece] = []
    for piece in pieces:
        before = joined[-1] if joined else _Piece("", "", -1)
        kind = None
        if (before.text, piece.text) in (("dark", "fluid"), ("da", "fl")):
            kind = "flair"
        elif (before.kind, piece.text) == ("contrast", "none") or (
            before.text in _NOT
            and piece.kind in ("contrast", "after")
            and piece.text != "post"
            # "pre ce t1" may be a T1 with contrast agent before an operation.
            and (before.text != "pre" or piece.text == "contrast" or _base(joined))
        ):
            kind = "without"
        if kind is None:
            joined.append(piece)
        else:
            joined[-1] = _Piece(f"{before.text} {piece.text}", kind, before.word)
    return joined


def _base(pieces: Sequence[_Piece]) -> list[int]:
    """Return the place where a sequence is named, known or not."""
    return [i for i, p in enumerate(pieces) if p.kind in ("t1", "t2", "flair", "odd")]


def _sequence(pieces: Sequence[_Piece]) -> tuple[str | None, str]:
    """Return the one common sequence that a name means, or a phrase that says why there is none."""
    base = _base(pieces)
    if not base:
        return None, "its name tells no sequence"
    odd = [pieces[i].text for i in base if pieces[i].kind == "odd"]
    if odd:
        return None, f"'{odd[0]}' is no known sequence"
    kinds = {pieces[i].kind for i in base}
    between = {pieces[k].kind for i, j in pairwise(base) for k in range(i + 1, j)}
    # "T1 to T1ce" may be either; FLAIR is a T2 that is named twice.
    once = len(base) == len(kinds) and (len(kinds) == 1 or kinds == {"t2", "flair"})
    if not once or not between <= {"neutral", "inversion"}:
        return None, "it names more than one sequence"
    sequence = "flair" if "flair" in kinds else kinds.pop()
    first = pieces[base[0]].word
    never = {k for k, shown in _NEVER.items() if sequence in shown}
    for piece in pieces:
        if piece.kind == "other" or (piece.kind == "derived" and piece.word >= first):
            return None, f"'{piece.text}' {_ANOTHER} {_SHOWN[sequence]}"
    if told := [piece.text for piece in pieces if piece.kind in never]:
        return None, f"'{told[0]}' makes it no {_SHOWN[sequence]}"
    return _with_contrast(pieces, sequence, first)


def _with_contrast(pieces: Sequence[_Piece], sequence: str, first: int) -> tuple[str | None, str]:
    """Tell contrast-enhanced from plain, or say why that is unclear."""
    # A word such as "post" means contrast agent behind the sequence; before it, perhaps not.
    behind = [p for p in pieces if p.kind == "after" and p.word >= first]
    kinds = {p.kind for p in pieces}
    agents = [p.text for p in pieces if p.kind == "contrast" or p in behind]
    unsure = [p.text for p in pieces if p.kind in ("doubtful", "after") and p not in behind]
    if "minus" in kinds:
        return None, "its hyphen may mean 'without contrast agent'"
    if agents and sequence != "t1":
        return None, f"'{agents[0]}' makes it a contrast-enhanced {_SHOWN[sequence]}"
    if agents and "without" in kinds:
        return None, "it says both with and without contrast agent"
    if unsure and sequence == "t1" and not agents:
        return None, f"'{unsure[0]}' may mean contrast agent"
    return ("t1ce" if agents else sequence), ""
