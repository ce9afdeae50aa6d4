from dataclasses import replace

import pytest

from pmixseg.data.splits import PUBLISHED, hash_cases
from pmixseg.evaluation.records import published
from pmixseg.evaluation.records.published import (
    SOURCES,
    published_dice,
    recognised_split,
    references,
)
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.records.sidecar import Sidecar
from pmixseg.task import BRATS, Task

SPLIT = "BraTS 2018 split 1 (199/29/57)"


@pytest.fixture
def on_split(monkeypatch, rows):
    """Records whose cases are taken for the published split's."""
    cases = {row["case"] for row in rows}
    hashes = ("train", "val", hash_cases(cases))
    monkeypatch.setattr(published, "PUBLISHED", {**PUBLISHED, hashes: SPLIT})

    def made(chosen=rows, task=BRATS, **about):
        sidecar = replace(Sidecar(task, split=SPLIT, part="test", phantom=False), **about)
        return Records.from_rows(chosen, "r", sidecar)

    return made


def test_every_row_has_a_source():
    table = published_dice()
    assert len(table) == 1488
    assert {tuple(x) for x in table[["table_source", "dataset"]].drop_duplicates().values} == set(
        SOURCES
    )
    named = {name for source in SOURCES.values() for name in source.splits}
    assert named <= set(PUBLISHED.values())


def test_rows_are_in_the_order_of_the_task(on_split):
    found = references(on_split())
    assert len(found) == 5 * 3
    rfnet = next(r for r in found if (r.method, r.region) == ("RFNet", "WT"))
    # FLAIR, T1ce, T1, T2, then pairs: as printed in the public table.
    assert rfnet.values[:5] == (86.46, 74.93, 74.68, 84.30, 89.17)
    assert rfnet.values[-1] == 90.26
    assert rfnet.stated == 85.67
    assert rfnet.mean == pytest.approx(85.67, abs=0.01)
    assert {r.source for r in found} == {SOURCES["DeMoSeg", "BraTS2018"]}


def test_stated_means_that_are_not_the_mean_of_their_row(on_split):
    odd = {(r.method, r.region) for r in references(on_split()) if abs(r.stated - r.mean) > 0.05}
    assert odd == {("MAVP", "TC")}  # docs/method/published.md: re-averages to 76.09


def test_nothing_beside_anything_else(on_split, rows):
    assert recognised_split(on_split()) == SPLIT
    assert references(on_split(phantom=True)) == []
    assert references(on_split(split=None)) == []
    assert references(on_split(split="0123456789abcdef")) == []
    assert references(on_split([r for r in rows if r["case"] != "case_000"])) == []
    lesions = Task("lesions", BRATS.modalities, BRATS.labels, BRATS.regions)
    assert references(on_split(task=lesions)) == []
