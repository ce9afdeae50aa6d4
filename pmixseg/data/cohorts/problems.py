"""Report one problem of many cases in one line, with a count."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from pmixseg.errors import count_of

FEW = 5
"""Names that are listed in a line; the rest is counted."""

_ALONE = 3
"""Cases of one problem up to which each has a line of its own."""


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are.

    Example:
        >>> listed(["a", "b", "c", "d", "e", "f", "g"])
        'a, b, c, d, e and 2 more'
    """
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more


def grouped(sentences: Iterable[tuple[str, str]]) -> list[str]:
    """Return one line for each problem that more than three cases share, else one for each case.

    Sentences are of one problem if they differ in the case's name, folders and numbers only. They
    come as (case, sentence), in the order of the lines.

    Example:
        >>> many = [(f"p{i}", f"case 'p{i}': t1 has {i} ml.") for i in range(1, 51)]
        >>> grouped(many)
        ["50 cases (p1, p2, p3, p4, p5 and 45 more), such as case 'p1': t1 has 1 ml."]
    """
    alike: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for case, sentence in sentences:
        alike[_shape(case, sentence)].append((case, sentence))
    lines: list[str] = []
    for group in alike.values():
        names = list(dict.fromkeys(case for case, _ in group))
        if len(names) <= _ALONE:
            lines += [sentence for _, sentence in group]
        else:
            lines.append(f"{len(names)} cases ({listed(names)}), such as {group[0][1]}")
    return lines


def ignored_lines(ignored: Mapping[str, Mapping[int, int]]) -> list[str]:
    """Say which label numbers became background, in how many voxels of how many cases.

    Example:
        >>> ignored_lines({"a": {4: 10}, "b": {4: 5}, "c": {}})
        ['label value 4 is ignored, it becomes background: 15 voxels in 2 cases (a, b)']
    """
    voxels: Counter[int] = Counter()
    cases: dict[int, list[str]] = {}
    for case, numbers in sorted(ignored.items()):
        for number, count in numbers.items():
            voxels[number] += count
            cases.setdefault(number, []).append(case)
    return [
        f"label value {number} is ignored, it becomes background: {count_of(count, 'voxel')} in "
        f"{count_of(len(cases[number]), 'case')} ({listed(cases[number])})"
        for number, count in sorted(voxels.items())
    ]


def same_scans(scans: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    """Return pairs of cases that share the hash of a scan: mostly one patient under two names.

    Example:
        >>> same_scans({"a": ["1", "2"], "b": ["3"], "c": ["2"]})
        [('a', 'c')]
    """
    owner: dict[str, str] = {}
    held = [(case, one) for case, hashes in scans.items() for one in hashes]
    return sorted({(first, c) for c, one in held if (first := owner.setdefault(one, c)) != c})


def doubled_line(scans: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Return a sentence about :func:`same_scans`, if there are any."""
    pairs = [" and ".join(pair) for pair in same_scans(scans)]
    hold = "hold" if len(pairs) > 1 else "holds"
    sentence = (
        f"{count_of(len(pairs), 'pair')} of cases {hold} the same scan ({listed(pairs)}), so one "
        "patient counts twice and may come into training and test; keep one of each."
    )
    return (sentence,) if pairs else ()


def _shape(case: str, sentence: str) -> str:
    """Return a sentence without what differs between cases."""
    plain = re.sub(r"[^\s'()]*/", "", sentence.replace(case, "@"))
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", plain)
