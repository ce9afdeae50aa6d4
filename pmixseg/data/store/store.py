"""A store: the prepared copy of a cohort, read by patches in every training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pmixseg.argument_checks import checked
from pmixseg.data.store.arrays import open_maps
from pmixseg.data.store.prepare import prepare
from pmixseg.data.store.report import PrepareReport
from pmixseg.data.store.stored import CASES, FORMAT, STORE_JSON, StoredCase, read_meta, unseal
from pmixseg.errors import InputError, count_of, explained
from pmixseg.task import Task

__all__ = ["PrepareReport", "Store", "StoredCase", "prepare"]


class Store:
    """Open a prepared cohort for reading; cheap to send to a worker.

    Use :meth:`open`.

    Args:
        root: the store's folder.
        description: contents of ``store.json``.
        cases: names of the prepared cases, sorted.
    """

    unlisted: tuple[str, ...] = ()
    """Folders of cases that cannot be used; see :meth:`open`."""

    def __init__(self, root: Path, description: Mapping[str, Any], cases: tuple[str, ...]) -> None:
        self.root, self._description = root, description
        self.task = Task.from_dict(description["task"])
        spacing = description["parameters"]["spacing"]
        self.spacing: tuple[float, float, float] | None = tuple(spacing) if spacing else None
        self.normalisation: str = description["parameters"]["normalisation"]
        self.dtype: str = description["parameters"]["dtype"]
        self.cases = cases
        self._opened: dict[str, StoredCase] = {}
        self._proved: set[str] = set()
        self._maps = open_maps()

    @classmethod
    @checked
    def open(cls, root: Path | str) -> Store:
        """Open a store and list its cases.

        Cases that are incomplete, damaged, renamed or prepared with parameters other than the
        store's present ones are not listed, but named in ``unlisted``.

        Raises:
            InputError: there is no store, or one of another format version.
        """
        root = Path(root)
        path = root / STORE_JSON
        if not path.is_file():
            raise InputError(
                f"{root} is not a prepared store (no {STORE_JSON}); make one with "
                "`pmixseg prepare ROOT STORE`."
            )
        # The description, then the cases that were prepared as it says.
        description = unseal(path)
        if description is None or description.get("format") != FORMAT:
            raise InputError(_no_description(path))
        advice = "run `pmixseg prepare` again"
        with explained(f"{root / CASES} cannot be read", advice, OSError):
            folders = sorted(f for f in (root / CASES).iterdir() if f.name[0] != ".")
        metas = {f.name: read_meta(f) for f in folders}
        says = description["parameters"]
        names = tuple(
            n for n, m in metas.items() if m and (m["case_id"], m["parameters"]) == (n, says)
        )
        store = cls(root, description, names)
        store.unlisted = tuple(name for name in metas if name not in names)
        return store

    @checked
    def read(self, case_id: str, prove: bool = False) -> StoredCase:
        """Open one case; opening it again is free.

        Args:
            case_id: name of the case.
            prove: compare its arrays with their checksums, the first time that this is asked for.

        Raises:
            InputError: the store has no such case, or its arrays are not those that were written.
        """
        if case_id not in self._opened:
            if case_id not in self.cases:
                raise InputError(
                    f"store {self.root} has no case '{case_id}' among its "
                    f"{count_of(len(self.cases), 'case')}; see `pmixseg inspect`, or prepare it."
                )
            self._opened[case_id] = StoredCase.open(self.root / CASES / case_id, self._maps)
        if prove and case_id not in self._proved:
            self._opened[case_id].prove()
            self._proved.add(case_id)
        return self._opened[case_id]

    def __len__(self) -> int:
        return len(self.cases)

    def __reduce__(self) -> tuple[type[Store], tuple[Any, ...]]:
        return Store, (self.root, self._description, self.cases)


def _no_description(path: Path) -> str:
    """Say why a store's description is refused; those of an older format have no seal."""
    try:
        version = json.loads(path.read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        version = None
    if isinstance(version, int) and version != FORMAT:
        return (
            f"{path.parent} has store format {version}, but this version reads {FORMAT}; run "
            "`pmixseg prepare` again."
        )
    return f"{path} is damaged or was edited; run `pmixseg prepare` again."
